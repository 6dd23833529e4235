"""Where a scale starts: from the largest value, from the LSQ paper, or from the least squared error.

All return float32 (a 0-d array, or 1-D along ``axis``) and never 0: a channel of zeros gets
``SMALLEST_SCALE``, because a scale of 0 has no inverse and MNN computes garbage with it.
"""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

from slimtrain.core.grid import Grid, round_half_away

SMALLEST_SCALE = 1e-8
"""Scale of an all-zero channel. Its square is still a normal float32, so products of two scales stay safe."""

_SAMPLES = 2**16
_CANDIDATES = np.geomspace(0.02, 1.2, 49)
_REFINEMENTS = 12


def max_abs_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The scale that puts the largest |x| (unsigned grids: the largest x) on ``grid.upper``.

    Raises:
        ValueError: ``x`` is empty or not finite.
    """
    return _finish(_largest(_channels(x, axis), grid) / grid.upper, axis)


def lsq_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The start value of Learned Step Size Quantization, 2 * mean|x| / sqrt(upper) (arXiv 1902.08153, section 2.1).

    Raises:
        ValueError: ``x`` is empty or not finite.
    """
    return _finish(2 * np.abs(_channels(x, axis)).mean(axis=1) / math.sqrt(grid.upper), axis)


def mse_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The scale with the least mean squared error of ``fake_quantize(x)``, by search.

    49 candidates from 0.02 to 1.2 of the max-abs scale, then golden-section steps around the best.
    Without an axis, arrays above 2**16 elements are searched on an evenly strided sample.

    Raises:
        ValueError: ``x`` is empty or not finite.
    """
    rows = _channels(x, axis)
    full = _largest(rows, grid) / grid.upper
    if axis is None:
        rows = _sample(rows)
    errors = np.stack([_squared_error(rows, full * ratio, grid) for ratio in _CANDIDATES])
    best = np.argmin(errors, axis=0)
    left = full * _CANDIDATES[np.maximum(best - 1, 0)]
    right = full * _CANDIDATES[np.minimum(best + 1, len(_CANDIDATES) - 1)]
    found, error = _golden_section(rows, left, right, grid)
    return _finish(np.where(error < errors.min(axis=0), found, full * _CANDIDATES[best]), axis)


def _channels(x: np.ndarray, axis: Optional[int]) -> np.ndarray:
    """``x`` as float64 [channels, values]; one row without an axis."""
    values = np.asarray(x, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a scale needs at least one value, got an array of shape {}".format(values.shape))
    if not np.isfinite(values).all():
        raise ValueError("a scale needs finite values, {} of {} are not".format(
            int((~np.isfinite(values)).sum()), values.size))
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _largest(rows: np.ndarray, grid: Grid) -> np.ndarray:
    return np.abs(rows).max(axis=1) if grid.signed else np.maximum(rows.max(axis=1), 0.0)


def _finish(scale: np.ndarray, axis: Optional[int]) -> np.ndarray:
    safe = np.maximum(scale, SMALLEST_SCALE).astype(np.float32)
    return safe.reshape(()) if axis is None else safe


def _sample(rows: np.ndarray) -> np.ndarray:
    """Evenly strided columns; the stride is coprime to their number, so it visits all indexes of every inner axis."""
    total = rows.shape[1]
    stride = -(-total // _SAMPLES)
    while math.gcd(stride, total) != 1:
        stride += 1
    return rows[:, ::stride]


def _squared_error(rows: np.ndarray, scale: np.ndarray, grid: Grid) -> np.ndarray:
    step = np.maximum(scale, SMALLEST_SCALE)[:, None]
    rest = np.clip(round_half_away(rows / step), grid.lower, grid.upper) * step - rows
    return np.einsum("ij,ij->i", rest, rest)


def _golden_section(rows, left, right, grid):
    """Golden-section search of each row's error in [left, right]: (scale, error)."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = right - ratio * (right - left), left + ratio * (right - left)
    at_low, at_high = _squared_error(rows, low, grid), _squared_error(rows, high, grid)
    for _ in range(_REFINEMENTS):
        go_left = at_low < at_high
        left, right = np.where(go_left, left, low), np.where(go_left, high, right)
        fresh = np.where(go_left, right - ratio * (right - left), left + ratio * (right - left))
        at_fresh = _squared_error(rows, fresh, grid)
        low, high = np.where(go_left, fresh, high), np.where(go_left, low, fresh)
        at_low, at_high = np.where(go_left, at_fresh, at_high), np.where(go_left, at_low, at_fresh)
    return np.where(at_low < at_high, low, high), np.minimum(at_low, at_high)
