"""Learned Step Size Quantization: the gradients that train a scale (arXiv 1902.08153).

The forward pass is ``fake_quantize``. This is the reference that the fused operations of the
frameworks are tested against; it is not meant to be fast.
"""

from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

from slimtrain.core.grid import ArrayLike, Grid, checked_operands, round_half_away


def lsq_gradient(dy: np.ndarray, x: np.ndarray, scale: ArrayLike, grid: Grid,
                 axis: Optional[int] = None) -> Tuple[np.ndarray, np.ndarray]:
    """Gradients of ``fake_quantize(x, scale, grid, axis)`` with respect to ``x`` and ``scale``.

    With v = x / scale, an element is inside when lower <= v <= upper (equations 3 and 5 of the paper, which
    counts the ends as outside; with them inside, a value that is a level already is left as it is).
    Inside, dx = dy and the scale receives dy * (round(v) - v); outside, dx = 0 and the scale receives
    dy * lower or dy * upper. The sum over the elements of a scale is multiplied by 1 / sqrt(N * upper),
    N being their number (section 2.2).

    Args:
        dy: gradient of the loss with respect to the output, the shape of ``x``.
        x: the input of the forward pass.
        scale: scalar, or 1-D along ``axis``.
        grid: the integer levels.
        axis: channel axis of ``x``; None for one scale.

    Returns:
        (dx of the shape of ``x``, dscale 0-d or 1-D), both in the dtype of ``x`` (float32, else float64);
        the sums are float64.

    Raises:
        ValueError: shapes differ, ``x`` is empty or has NaN, or a scale is not finite and positive.
    """
    values, step = checked_operands(x, scale, axis)
    upstream = np.asarray(dy, dtype=values.dtype)
    if values.shape != upstream.shape:
        raise ValueError(f"dy must have the shape of x {values.shape}, got {upstream.shape}")
    if not values.size:
        raise ValueError(f"a gradient needs at least one value, got an array of shape {values.shape}")
    v = values / step
    inside = (v >= grid.lower) & (v <= grid.upper)
    slope = np.clip(round_half_away(v), grid.lower, grid.upper) - np.where(inside, v, 0)
    others = tuple(i for i in range(v.ndim) if axis is None or i != axis % v.ndim)
    total = np.sum(upstream * slope, axis=others, dtype=np.float64)
    count = v.size if axis is None else v.size // v.shape[axis]
    dscale = total / math.sqrt(count * grid.upper)
    return np.where(inside, upstream, 0).astype(v.dtype), np.asarray(dscale, dtype=v.dtype)
