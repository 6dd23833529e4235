"""The attributes by which MNN is told how a convolution is computed with Winograd's transforms in int8.

``units_attr`` is a row of int32: ``0`` (a version), the number of parts of the kernel, and for each part a length and
``first row, first column, kernel height, kernel width, unit height, unit width``, the scale of every transformed
input, its zero point, and the scale of every transformed weight, position by position with all output channels of
one. Scales are the bits of a float32. Kernels are not cut into parts here.
"""

from __future__ import annotations

from typing import List, Sequence

import numpy as np

from slimtrain.core import WinogradForm, WinogradScales
from slimtrain.proto.checks import check_scales

_VERSION = 0
_HEADER = 6


def check_winograd(layer: str, scales: WinogradScales, channels: int) -> None:
    """Raise ``ValueError`` unless there is a positive ratio for every position and channel."""
    positions = scales.form.positions
    for side, ratios, shape in (("input", scales.input_ratios, (positions,)),
                                ("weight", scales.weight_ratios, (positions, channels))):
        if np.shape(ratios) != shape:
            raise ValueError(
                f"layer {layer!r}: {scales.form} needs transformed {side} ratios of shape {shape}, "
                f"got {np.shape(ratios)}"
            )
        check_scales(layer, f"transformed {side}", np.asarray(ratios).ravel())


def units_attr(scales: WinogradScales, input_scale: float, weight_scales: np.ndarray) -> List[int]:
    """The attributes of one layer, from its scales before the transform."""
    form = scales.form
    inputs = np.asarray(scales.input_ratios * np.float64(np.float32(input_scale)), np.float32)
    weights = np.asarray(scales.weight_ratios * np.asarray(weight_scales, np.float64), np.float32)
    values = [0, 0, form.kernel, form.kernel, form.unit, form.unit]
    values += _bits(inputs) + [0] * form.positions + _bits(weights)
    return [_VERSION, 1, len(values)] + values


def check_units_attr(layer: str, values: Sequence[int], channels: int) -> None:
    """Raise ``ValueError`` where the runtime would read past the attributes or divide by zero."""
    if len(values) < 2 or values[0] != _VERSION or values[1] < 1:
        raise ValueError(f"layer {layer!r}: Winograd attributes must begin with version 0 and a count of parts, "
                         f"got {list(values[:2])}")
    start = 2
    for part in range(values[1]):
        header = list(values[start + 1 : start + 1 + _HEADER])
        if len(header) < _HEADER or min(header[2:]) < 1 or header[2] != header[3] or header[4] != header[5]:
            raise ValueError(f"layer {layer!r}: part {part + 1} of the Winograd attributes needs a square kernel and "
                             f"unit, got {header}")
        positions = WinogradForm(header[4], header[2]).positions
        length = _HEADER + 2 * positions + positions * channels
        if values[start] != length or len(values) < start + 1 + length:
            raise ValueError(f"layer {layer!r}: part {part + 1} of the Winograd attributes must have {length} values "
                             f"for {channels} output channels, it says {values[start]} and "
                             f"{len(values) - start - 1} are there")
        body = np.array(values[start + 1 + _HEADER : start + 1 + length], dtype=np.int32)
        check_scales(layer, "transformed input", body[:positions].view(np.float32))
        check_scales(layer, "transformed weight", body[2 * positions :].view(np.float32))
        start += 1 + length


def _bits(scales: np.ndarray) -> List[int]:
    return [int(value) for value in np.ascontiguousarray(scales, dtype=np.float32).view(np.int32).ravel()]
