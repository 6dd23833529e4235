"""Where a scale starts: from the largest value, from the LSQ paper, from the least squared error, or from ADMM.

All return float32 (0-d, or 1-D along ``axis``) and never less than ``SMALLEST_SCALE``.
"""

from __future__ import annotations

import math
from typing import Optional

import numpy as np

from slimtrain.core.grid import Grid

SMALLEST_SCALE = 1e-6
"""The scale of a channel of zeros. MNN computes depthwise channels with a smaller one as if it were this."""

_SAMPLES = 2**16
_COARSE = np.geomspace(0.02, 1.2, 33)
_FINE = np.geomspace(0.9, 1.1, 25)
_REFINEMENTS = 4
_ADMM_ROUNDS = 100


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


def mse_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None,
              counts: Optional[np.ndarray] = None) -> np.ndarray:
    """The scale with the least squared error of ``fake_quantize(x)``, by search.

    The best of 33 candidates between 0.02 and 1.2 of the max-abs scale, then of 25 around that one, is
    refined by turns of "levels for the scale" and "least-squares scale for the levels". Without an axis,
    arrays above 2**16 elements are searched on an evenly strided sample, the same one each time.

    Args:
        x: any shape.
        grid: the integer levels.
        axis: the axis of the scales; None for one scale.
        counts: how often each value occurs, [values] for 1-D ``x`` without an axis; None for once.

    Raises:
        ValueError: ``x`` is empty or not finite, or has no such axis; ``counts`` do not fit it.
    """
    rows = _rows(x, axis)
    full = _largest(rows, grid) / grid.upper
    if counts is not None:
        return _finish(_search(rows, full, grid, _checked_counts(counts, rows, axis)), axis)
    if axis is None:
        rows = _sample(rows)
    # Blocks that fit the processor's cache are several times faster than one pass over everything.
    blocks = min(len(rows), -(-rows.size // _SAMPLES))
    found = [_search(part, start, grid)
             for part, start in zip(np.array_split(rows, blocks), np.array_split(full, blocks))]
    return _finish(np.concatenate(found), axis)


def admm_scale(x: np.ndarray, grid: Grid, axis: Optional[int] = None,
               counts: Optional[np.ndarray] = None) -> np.ndarray:
    """The scale that alternating updates reach: levels for the scale, then the least-squares scale for the levels.

    This is the projection step of ADMM quantization (Leng et al., AAAI 2018, equation 11), from the max-abs scale
    on, until no level changes or 100 rounds have passed. The error never grows, but the optimum is a local one.

    Args:
        x, grid, axis, counts: as :func:`mse_scale`.

    Raises:
        ValueError: as :func:`mse_scale`.
    """
    rows = _rows(x, axis)
    scale = np.maximum(_largest(rows, grid) / grid.upper, SMALLEST_SCALE)
    weights = None if counts is None else _checked_counts(counts, rows, axis)
    for _ in range(_ADMM_ROUNDS):
        following = np.maximum(_least_squares(rows, scale, grid, weights), SMALLEST_SCALE)
        if np.allclose(following, scale, rtol=1e-9, atol=0.0):
            break
        scale = following
    return _finish(scale, axis)


def _checked_counts(counts: np.ndarray, rows: np.ndarray, axis: Optional[int]) -> np.ndarray:
    weights = np.asarray(counts, dtype=np.float64).reshape(1, -1)
    if axis is not None or weights.shape != rows.shape:
        raise ValueError(f"counts must hold one number per value of x, without an axis; got shape "
                         f"{np.shape(counts)} for {rows.size} values and axis {axis}")
    if not (weights >= 0).all() or not weights.any():
        raise ValueError("counts must not be negative, and not all of them zero")
    return weights


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


def _search(rows: np.ndarray, full: np.ndarray, grid: Grid, counts: Optional[np.ndarray] = None) -> np.ndarray:
    """The best scale of each row, ``full`` being the max-abs scales: [channels]."""
    coarse = _best_of(rows, full[:, None] * _COARSE, grid, counts)
    scale = _best_of(rows, coarse[:, None] * _FINE, grid, counts)
    for _ in range(_REFINEMENTS):
        scale = _least_squares(rows, scale, grid, counts)
    return scale


def _best_of(rows: np.ndarray, candidates: np.ndarray, grid: Grid, counts: Optional[np.ndarray]) -> np.ndarray:
    """The candidate [channels, candidates] with the least error in each row: [channels]."""
    errors = np.stack([_squared_error(rows, column, grid, counts) for column in candidates.T])
    return candidates[np.arange(len(rows)), np.argmin(errors, axis=0)]


def _squared_error(rows: np.ndarray, scale: np.ndarray, grid: Grid, counts: Optional[np.ndarray]) -> np.ndarray:
    rest = _levels(rows, scale, grid)
    rest *= scale[:, None]
    rest -= rows
    return _sum_of_products(rest, rest, counts)


def _least_squares(rows: np.ndarray, scale: np.ndarray, grid: Grid, counts: Optional[np.ndarray]) -> np.ndarray:
    """The best scale for the levels that ``scale`` gives; rounding again at it never increases the error."""
    levels = _levels(rows, scale, grid)
    product, square = _sum_of_products(rows, levels, counts), _sum_of_products(levels, levels, counts)
    return np.where(square > 0, product / np.maximum(square, 1), scale)


def _sum_of_products(first: np.ndarray, second: np.ndarray, counts: Optional[np.ndarray]) -> np.ndarray:
    return np.einsum("ij,ij->i", first, second if counts is None else second * counts)


def _levels(rows: np.ndarray, scale: np.ndarray, grid: Grid) -> np.ndarray:
    levels = rows / np.maximum(scale, SMALLEST_SCALE)[:, None]
    levels += np.copysign(0.5, levels)  # a search rounds all weights a hundred times: in place, half away from zero
    return np.clip(np.trunc(levels, out=levels), grid.lower, grid.upper, out=levels)
