"""Values that MNN's converter and runtime take, checked one by one; every message names the layer."""

from __future__ import annotations

from typing import Iterable

import numpy as np

from slimtrain.core import Grid, stored_zero_point

# Fewer bits go into the clamps: another number here selects kernels that compute garbage.
WIRE_BITS = 8
#: how the output of an entry begins that has none, because it only stores weights
NO_TENSOR = "no tensor of "
# The converter divides by multiplying with 1 / scale in float32; a smaller scale has no finite reciprocal
# there.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def check_scales(layer: str, side: str, scales: Iterable[float]) -> None:
    """Raise ``ValueError`` unless every scale is a finite, positive, normal float32."""
    values = np.asarray(scales, dtype=np.float64).reshape(-1)
    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(np.float32)
    good = np.isfinite(stored) & (stored >= SMALLEST_SCALE)
    if not good.all():
        index = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"layer {layer!r}: {side} scale {index + 1} of {values.size} must be finite and at least "
            f"{SMALLEST_SCALE:.2g}, got {float(values[index])!r}"
        )


def check_clamps(layer: str, side: str, lower: int, upper: int) -> None:
    """Raise ``ValueError`` unless -128 <= lower <= upper <= 127."""
    if not -128 <= lower <= upper <= 127:
        raise ValueError(
            f"layer {layer!r}: {side} range must lie in [-128, 127] and not be empty, got [{lower}, {upper}]"
        )


def check_levels(layer: str, side: str, grid: Grid) -> None:
    """Raise ``ValueError`` unless activations of these levels fit int8, with the zero point that they need."""
    zero = stored_zero_point(grid)
    if zero and not -128 <= zero <= 127:
        raise ValueError(
            f"layer {layer!r}: {side} levels must hold zero, as padding needs it, got [{grid.lower}, {grid.upper}]"
        )
    check_clamps(layer, side, grid.lower + zero, grid.upper + zero)


def check_weight_only(layer: str, bits: int, block_size: int) -> None:
    """Raise ``ValueError`` unless bits are 2..8 and the block size is 0 or a positive multiple of 16."""
    if bits not in range(2, 9):
        raise ValueError(f"layer {layer!r}: weight-only bits must be 2..8, got {bits!r}")
    if block_size < 0 or block_size % 16:
        raise ValueError(f"layer {layer!r}: block_size must be 0 or a multiple of 16, got {block_size!r}")
