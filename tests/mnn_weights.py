"""The weights inside a .mnn file, decoded bit by bit: an oracle for what the converter really stored."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, NamedTuple

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
    found = {}
    for operator in operators(path):
        quantized = (operator.get("main") or {}).get("quanParameter")
        if quantized and quantized.get("type") == 1:
            found[operator["name"]] = _decode(quantized)
    return found


def decode_halves(path: str) -> Dict[str, np.ndarray]:
    """Every operator with half floats, weights or constants, by its name: float16 [count]."""
    found = {}
    for operator in operators(path):
        main = operator.get("main") or {}
        stored = main.get("uint8s") if main.get("dataType") == "DT_HALF" else None
        if main.get("quanParameter", {}).get("type") == 3:
            stored = main["quanParameter"]["buffer"]
        if stored is not None:
            found[operator["name"]] = np.array(stored, np.int64).astype(np.uint8).view("<f2")
    return found


def operators(path: str) -> List[Dict[str, Any]]:
    """The converter's own description of a file, operator by operator; those of branches follow."""
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "dump.json")
        subprocess.run([sys.executable, "-c", _DUMP, "mnnconvert", "-f", "MNN", "--modelFile", os.path.abspath(path),
                        "--JsonFile", target], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(target, encoding="utf-8") as file:
            text = re.sub(r"-?\b(nan|inf)\b(?=[,\s])", "0", file.read())
    net = json.loads(text)
    return net["oplists"] + [node for graph in net.get("subgraphs", []) for node in graph["nodes"]]


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
