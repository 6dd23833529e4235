"""Where a scale starts: from the largest value, from the LSQ paper, or from the least squared error.

All return float32 (0-d, or 1-D along ``axis``) and never less than ``SMALLEST_SCALE``.
"""

from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

from slimtrain.core.grid import Grid, round_half_away

SMALLEST_SCALE = 1e-6
"""The scale of a channel of zeros. MNN computes depthwise channels with a smaller one as if it were this."""

_SAMPLES = 2**16
_CANDIDATES = np.geomspace(0.02, 1.2, 49)
_REFINEMENTS = 12


def max_abs_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The scale that puts the largest |x| (unsigned grids: the largest x) on ``grid.upper``.

    Raises:
        ValueError: ``x`` is empty or not finite, or has no such axis.
    """
    return _finish(_largest(_rows(x, axis), grid) / grid.upper, axis)


def lsq_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The start value of Learned Step Size Quantization, 2 * mean|x| / sqrt(upper) (arXiv 1902.08153, 2.1).

    Raises:
        ValueError: ``x`` is empty or not finite, or has no such axis.
    """
    return _finish(2 * np.abs(_rows(x, axis)).mean(axis=1) / math.sqrt(grid.upper), axis)


def mse_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None) -> np.ndarray:
    """The scale with the least squared error of ``fake_quantize(x)``, by search.

    49 candidates between 0.02 and 1.2 of the max-abs scale, then golden sections around the best. Without
    an axis, arrays above 2**16 elements are searched on an evenly strided sample (the same one each time).

    Raises:
        ValueError: ``x`` is empty or not finite, or has no such axis.
    """
    rows = _rows(x, axis)
    full = _largest(rows, grid) / grid.upper
    if axis is None:
        rows = _sample(rows)
    # Blocks that fit the processor's cache are several times faster than one pass over everything.
    blocks = min(len(rows), -(-rows.size // _SAMPLES))
    found = [_search(part, start, grid)
             for part, start in zip(np.array_split(rows, blocks), np.array_split(full, blocks))]
    return _finish(np.concatenate(found), axis)


def _rows(x: np.ndarray, axis: Optional[int]) -> np.ndarray:
    """``x`` as float64 [channels, values]; one row without an axis."""
    values = np.asarray(x, dtype=np.float64)
    if values.size == 0:
        raise ValueError(f"a scale needs at least one value, got an array of shape {values.shape}")
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ValueError(f"a scale needs finite values, {broken} of {values.size} are not")
    if axis is None:
        return values.reshape(1, -1)
    if not -values.ndim <= axis < values.ndim:
        raise ValueError(f"axis {axis} does not exist in an array of shape {values.shape}")
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _largest(rows: np.ndarray, grid: Grid) -> np.ndarray:
    return np.abs(rows).max(axis=1) if grid.signed else np.maximum(rows.max(axis=1), 0.0)


def _finish(scale: np.ndarray, axis: Optional[int]) -> np.ndarray:
    safe = np.maximum(scale, SMALLEST_SCALE).astype(np.float32)
    return safe.reshape(()) if axis is None else safe


def _sample(rows: np.ndarray) -> np.ndarray:
    """Evenly strided columns; a stride coprime to their number meets every index of every axis of ``x``."""
    total = rows.shape[1]
    stride = -(-total // _SAMPLES)
    while math.gcd(stride, total) != 1:
        stride += 1
    return rows[:, ::stride]


def _search(rows: np.ndarray, full: np.ndarray, grid: Grid) -> np.ndarray:
    """The best scale of each row, ``full`` being the max-abs scales: [channels]."""
    errors = np.stack([_squared_error(rows, full * ratio, grid) for ratio in _CANDIDATES])
    best = np.argmin(errors, axis=0)
    last = len(_CANDIDATES) - 1
    refined, error = _golden_section(rows, full * _CANDIDATES[np.maximum(best - 1, 0)],
                                     full * _CANDIDATES[np.minimum(best + 1, last)], grid)
    return np.where(error < errors.min(axis=0), refined, full * _CANDIDATES[best])


def _squared_error(rows: np.ndarray, scale: np.ndarray, grid: Grid) -> np.ndarray:
    step = np.maximum(scale, SMALLEST_SCALE)[:, None]
    rest = np.clip(round_half_away(rows / step), grid.lower, grid.upper) * step - rows
    return np.einsum("ij,ij->i", rest, rest)


def _golden_section(rows: np.ndarray, left: np.ndarray, right: np.ndarray,
                    grid: Grid) -> Tuple[np.ndarray, np.ndarray]:
    """Golden-section search of every row's error between ``left`` and ``right``: (scales, errors)."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = right - ratio * (right - left), left + ratio * (right - left)
    at_low, at_high = _squared_error(rows, low, grid), _squared_error(rows, high, grid)
    for _ in range(_REFINEMENTS):
        shrink = at_low < at_high
        left, right = np.where(shrink, left, low), np.where(shrink, high, right)
        fresh = np.where(shrink, right - ratio * (right - left), left + ratio * (right - left))
        at_fresh = _squared_error(rows, fresh, grid)
        low, high = np.where(shrink, fresh, high), np.where(shrink, low, fresh)
        at_low, at_high = np.where(shrink, at_fresh, at_high), np.where(shrink, at_low, at_fresh)
    return np.where(at_low < at_high, low, high), np.minimum(at_low, at_high)
