"""The weights inside a .mnn file, decoded bit by bit: an oracle for what the converter really stored."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, Dict, NamedTuple

import numpy as np

_DUMP = "import sys, _tools; _tools.mnnconvert(sys.argv[1:])"


class Decoded(NamedTuple):
    """One operator: int levels [rows, weights of a row] as stored, and the floats that belong to each row."""

    levels: np.ndarray   #: signed, -2^(bits-1) ..
    alpha: np.ndarray
    asymmetric: bool
    bits: int


def decode(path: str) -> Dict[str, Decoded]:
    """Every operator with stored integer weights, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "dump.json")
        subprocess.run([sys.executable, "-c", _DUMP, "mnnconvert", "-f", "MNN", "--modelFile", os.path.abspath(path),
                        "--JsonFile", target], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(target, encoding="utf-8") as file:
            text = re.sub(r"-?\b(nan|inf)\b(?=[,\s])", "0", file.read())
    found = {}
    for operator in json.loads(text)["oplists"]:
        quantized = (operator.get("main") or {}).get("quanParameter")
        if quantized and quantized.get("type") == 1:
            found[operator["name"]] = _decode(quantized)
    return found


def _decode(quantized: Dict[str, Any]) -> Decoded:
    data = np.array(quantized["buffer"], np.int64).astype(np.uint8)
    width = 4 if quantized.get("shapeInt32") else 2
    dims = int(data[0])
    sizes = np.frombuffer(data[1:1 + dims * width].tobytes(), np.uint32 if width == 4 else np.uint16)
    start = 1 + dims * width
    count = int(data[start]) or 256
    table = data[start + 1:start + 1 + count].astype(np.int8).astype(np.int64)
    bits = int(np.ceil(np.log2(count)))
    stream = np.unpackbits(data[start + 1 + count:])
    total = int(np.prod(sizes))
    index = stream[:total * bits].reshape(total, bits) @ (1 << np.arange(bits)[::-1])
    return Decoded(table[index].reshape(sizes), np.array(quantized["alpha"], np.float64),
                   bool(quantized.get("readType")), bits)
