"""Learned Step Size Quantization: the gradients that train a scale (arXiv 1902.08153).

The forward pass is ``fake_quantize``. This is the reference that the fused operations of the
frameworks are tested against; it is not meant to be fast.
"""

from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

from slimtrain.core.grid import ArrayLike, Grid, along_axis, checked_scale, round_half_away


def lsq_gradient(dy: np.ndarray, x: np.ndarray, scale: ArrayLike, grid: Grid,
                 axis: Optional[int] = None) -> Tuple[np.ndarray, np.ndarray]:
    """Gradients of ``fake_quantize(x, scale, grid, axis)`` with respect to ``x`` and ``scale``.

    With v = x / scale, an element is inside when lower <= v <= upper (equation 3 and 5 of the paper,
    with the ends counted as inside). Inside, dx = dy and the scale receives dy * (round(v) - v);
    outside, dx = 0 and the scale receives dy * lower or dy * upper. The sum over the elements of a
    scale is multiplied by 1 / sqrt(N * upper), N being their number (section 2.2).

    Args:
        dy: gradient of the loss with respect to the output, the shape of ``x``.
        x: the input of the forward pass.
        scale: scalar, or 1-D along ``axis``.
        grid: the integer levels.
        axis: channel axis of ``x``; None for one scale.

    Returns:
        (dx of the shape of ``x``, dscale 0-d or 1-D), float64 when ``x`` is float64 and else float32;
        sums are float64.

    Raises:
        ValueError: shapes differ, or a scale is not finite and positive.
    """
    values, upstream = np.asarray(x), np.asarray(dy)
    if values.shape != upstream.shape:
        raise ValueError("dy must have the shape of x {}, got {}".format(values.shape, upstream.shape))
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    step = along_axis(checked_scale(scale, dtype), values.shape, axis, "scale")
    v = values.astype(dtype) / step
    inside = (v >= grid.lower) & (v <= grid.upper)
    slope = np.clip(round_half_away(v), grid.lower, grid.upper) - np.where(inside, v, 0)
    per_element = upstream.astype(np.float64) * slope
    others = tuple(i for i in range(values.ndim) if axis is None or i != axis % values.ndim)
    total = per_element.sum(axis=others)
    count = values.size if axis is None else values.size // values.shape[axis]
    dscale = total / math.sqrt(max(count, 1) * grid.upper)
    return np.where(inside, upstream, 0).astype(dtype), np.asarray(dscale, dtype=dtype)
