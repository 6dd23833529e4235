"""Half floats that are rounded to the nearest: MNN cuts their last bits off, which costs about 13 dB.

The model is converted a second time without half precision. Its floats, batch norms folded, tell what the halves stand
for, and these are written over in place: same file, same bytes, other last bits. What is stored otherwise (integers of
full int8 and weight-only layers, biases) is no half float and not touched.
"""

from __future__ import annotations

import os
import struct
from itertools import zip_longest
from typing import Iterator, NamedTuple, Optional, Tuple

import numpy as np

from slimtrain.core import ConversionError
from slimtrain.proto.flatbuffer import Table

# Fields and values of MNN's schema. They never change: every version reads the files of the versions before.
_OPERATORS, _SUBGRAPHS, _OPERATORS_OF_SUBGRAPH = 3, 10, 4
_KIND, _MAIN, _NAME = 1, 2, 3
_BLOB, _CONVOLUTION = 7, 9
_WEIGHT, _QUANTIZED, _EXTERNAL_WEIGHT = 1, 3, 6
_BUFFER, _TYPE, _TYPE_HALF = 0, 2, 3
_BLOB_TYPE, _BYTES, _FLOATS, _EXTERNAL_BLOB = 2, 3, 7, 9
_DT_FLOAT, _DT_HALF = 1, 19

_LARGEST = float(np.finfo(np.float16).max)
_NOTHING = np.zeros(0, "<f4")


class RoundedHalves(NamedTuple):
    """Names of operators: ``saturated`` have numbers beyond the half floats, ``cut`` keep what MNN stored."""

    saturated: Tuple[str, ...]
    cut: Tuple[str, ...]


def round_halves(path: str, float_path: str) -> RoundedHalves:
    """Round the half floats of a model to the nearest, halves to even, in place.

    Numbers beyond the largest half float become the largest, as MNN has it.

    Args:
        path: a .mnn model with half floats.
        float_path: the same model, converted without half precision.

    Raises:
        ConversionError: one of the files is no .mnn model.
    """
    saturated, cut = [], []
    try:
        pairs = zip_longest(_operators(path, True), _operators(float_path, False), fillvalue=("", _NOTHING))
        for (name, halves), (float_name, floats) in pairs:
            if halves.dtype == floats.dtype or not halves.size:
                continue
            nearest = np.clip(floats, -_LARGEST, _LARGEST).astype("<f2")
            if name != float_name or not _is_cut(halves, nearest):
                cut.append(name)
                continue
            halves[:] = nearest
            if np.abs(floats).max() > _LARGEST:
                saturated.append(name)
    except (struct.error, ValueError) as error:
        raise ConversionError(f"{path}: cannot make sense of the converted model: {error!r}") from error
    return RoundedHalves(tuple(saturated), tuple(cut))


def _is_cut(halves: np.ndarray, nearest: np.ndarray) -> bool:
    """Whether each half is the nearest one or the one before: they stand for the same floats."""
    if halves.shape != nearest.shape:
        return False
    finite = np.isfinite(nearest)
    steps = nearest.view("<i2")[finite].astype(np.int32) - halves.view("<i2")[finite]
    return bool(((steps == 0) | (steps == 1)).all())


def _operators(path: str, writable: bool) -> Iterator[Tuple[str, np.ndarray]]:
    """The name of every operator and its weights in floats or halves, views of the file; empty for all others."""
    net = Table.root(_mapped(path, writable))
    weights = path + ".weight"
    external = _mapped(weights, writable) if os.path.exists(weights) and os.path.getsize(weights) else None
    subgraphs = [graph.tables(_OPERATORS_OF_SUBGRAPH) for graph in net.tables(_SUBGRAPHS)]
    for operators in (net.tables(_OPERATORS), *subgraphs):
        for operator in operators:
            yield operator.text(_NAME), _weights(operator, external)


def _mapped(path: str, writable: bool) -> np.ndarray:
    return np.memmap(path, np.uint8, "r+" if writable else "r")


def _weights(operator: Table, external: Optional[np.ndarray]) -> np.ndarray:
    main, kind = operator.table(_MAIN), operator.number(_KIND, "<B")
    if main is not None and kind == _BLOB:
        values, place = _blob(main), main.vector(_EXTERNAL_BLOB, "<i8")
    elif main is not None and kind == _CONVOLUTION:
        values, place = _convolution(main), main.vector(_EXTERNAL_WEIGHT, "<i8")
    else:
        return _NOTHING
    if values is None:
        return _NOTHING
    if external is not None and place.size > 1 and not values.size:
        # Where they begin in the file beside the model, and their bytes; the sizes of biases and others follow.
        return external[place[0] : place[0] + place[1]].view(values.dtype)
    return values


def _blob(blob: Table) -> Optional[np.ndarray]:
    kind = blob.number(_BLOB_TYPE, "<i")
    if kind == _DT_HALF:
        return blob.vector(_BYTES, "u1").view("<f2")
    return blob.vector(_FLOATS, "<f4") if kind == _DT_FLOAT else None


def _convolution(convolution: Table) -> Optional[np.ndarray]:
    quantized = convolution.table(_QUANTIZED)
    if quantized is None:
        return convolution.vector(_WEIGHT, "<f4")
    is_half = quantized.number(_TYPE, "<i") == _TYPE_HALF
    return quantized.vector(_BUFFER, "u1").view("<f2") if is_half else None
