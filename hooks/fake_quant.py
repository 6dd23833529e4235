"""The fake-quantization operation of a graph; ``slimtrain.core`` is the oracle of its values and gradients.

``y = clip(round(x / s), lower, upper) * s``, rounding half away from zero. The gradient of ``x`` passes straight
through inside the range and is zero outside; that of a learned ``s`` is LSQ's (Esser et al., arXiv 1902.08153,
equations 3 and 5): the rounding error inside, the clip level outside, times ``1 / sqrt(N * upper)``.
"""
from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Grid


class Levels(NamedTuple):
    """The integer range of a quantizer: float32 scalars, numbers or tensors that do not change within a step."""

    lower: Any
    upper: Any
    positive: bool = False  #: the values are known to be >= 0, which saves half of the rounding


def levels_of(grid: Grid, positive: bool = False) -> Levels:
    """The fixed levels of a grid."""
    return Levels(float(grid.lower), float(grid.upper), positive)


def fake_quantize(x: tf.Tensor, scale: tf.Tensor, levels: Levels, axis: Optional[int] = None,
                  learned: bool = True, waiting: Optional[tf.Tensor] = None) -> tf.Tensor:
    """Quantize and dequantize ``x``.

    Args:
        x: float tensor.
        scale: positive; a scalar, or 1-D along ``axis``.
        levels: the integer range.
        axis: channel axis of ``x``; None for one scale.
        learned: give the scale LSQ's gradient; otherwise it has none.
        waiting: bool; as long as it is true, ``x`` is passed on as it is.

    Returns:
        a tensor of the shape of ``x``.
    """
    spread = _broadcastable(scale, x, axis)
    if not learned:
        spread = tf.stop_gradient(spread)

    @tf.custom_gradient
    def quantizer(values: tf.Tensor, step: tf.Tensor, lower: tf.Tensor, upper: tf.Tensor,
                  *off: tf.Tensor) -> Tuple[tf.Tensor, Callable]:
        t = values / step
        inner = tf.minimum(t, upper) if levels.positive else tf.raw_ops.ClipByValue(
            t=t, clip_value_min=lower, clip_value_max=upper)
        level = round_half_away(inner, levels.positive)

        def gradient(dy: tf.Tensor) -> List[Optional[tf.Tensor]]:
            inside = tf.logical_or(tf.equal(t, inner), *off) if off else tf.equal(t, inner)
            zero = tf.zeros_like(dy)
            dx = tf.where(inside, dy, zero)
            if not learned:
                return [dx, None, None, None] + [None] * len(off)
            slope = tf.where(inside, level - t, level)
            ds = _scale_gradient(dy * slope, step, upper)
            return [dx, tf.where(off[0], tf.zeros_like(ds), ds) if off else ds, None, None] + [None] * len(off)

        return tf.where(off[0], values, level * step) if off else level * step, gradient

    lower, upper = (tf.cast(value, x.dtype.base_dtype) for value in (levels.lower, levels.upper))
    result = quantizer(x, spread, lower, upper, *([] if waiting is None else [waiting]))
    result.set_shape(x.shape)
    return result


def round_half_away(t: tf.Tensor, positive: bool = False) -> tf.Tensor:
    """Nearest integer, ties away from zero: ``sign(t) * floor(|t| + 0.5)``."""
    if positive:
        return tf.floor(t + 0.5)
    return tf.sign(t) * tf.floor(tf.abs(t) + 0.5)


def _broadcastable(scale: tf.Tensor, x: tf.Tensor, axis: Optional[int]) -> tf.Tensor:
    if axis is None:
        return scale
    behind = x.shape.rank - 1 - axis % x.shape.rank
    return tf.reshape(scale, [-1] + [1] * behind) if behind else scale


def _scale_gradient(terms: tf.Tensor, step: tf.Tensor, upper: tf.Tensor) -> tf.Tensor:
    """Sum the terms of each scale, in the broadcast shape of ``step``, times ``1 / sqrt(N * upper)``."""
    if step.shape.rank == 0:
        return tf.reduce_sum(terms) * tf.rsqrt(tf.maximum(tf.cast(tf.size(terms), terms.dtype), 1) * upper)
    shape = step.shape.as_list()
    sizes = terms.shape.as_list()
    axes = [axis for axis, size in enumerate([1] * (len(sizes) - len(shape)) + shape) if size == 1]
    count = tf.maximum(tf.cast(tf.size(terms), terms.dtype) / float(np.prod(shape)), 1.0)
    return tf.reshape(tf.reduce_sum(terms, axis=axes), shape) * tf.rsqrt(count * upper)
