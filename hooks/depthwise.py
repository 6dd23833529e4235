"""The bias of depthwise layers: MNN truncates it to an integer number of accumulator steps.

In tests the simulation has to do the same, or one result in a few hundred is off by a level. The bias that counts is
the one after batch normalization is folded; it is rounded to the nearest integer here, and the exported file holds a
value that truncates to that integer.
"""
from __future__ import annotations

from typing import Optional

import tensorflow.compat.v1 as tf

from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.fake_quant import round_half_away

#: more steps than this are left alone: beside such a bias the layer's sums are nothing
MOST_STEPS = float(2 ** 30)


def bias_on_grid(result: tf.Tensor, step: tf.Tensor, bias: Optional[tf.Tensor], norm: Optional[BatchNorm],
                 is_training: tf.Tensor) -> tf.Tensor:
    """Shift a depthwise result so that bias and batch norm add a whole number of accumulator steps to it.

    Args:
        result: what the convolution computed, [..., channels].
        step: real value of one accumulator step, [channels].
        bias: added to ``result`` next, or None.
        norm: applied after that, or None.
        is_training: nothing is shifted while it is true.
    """
    offset = tf.zeros_like(step) if bias is None else tf.reshape(bias, [-1])
    alive = tf.ones_like(step, tf.bool)
    if norm is not None:
        factor = norm.gamma * tf.rsqrt(norm.variance + norm.epsilon)
        alive = tf.not_equal(factor, 0)
        shift = norm.beta / tf.where(alive, factor, tf.ones_like(factor))
        offset = offset + (shift - norm.mean)
    steps = offset / step
    alive = tf.logical_and(alive, tf.abs(steps) < MOST_STEPS)
    correction = tf.where(alive, round_half_away(steps) * step - offset, tf.zeros_like(step))
    active = tf.cast(tf.logical_not(is_training), result.dtype)
    return result + tf.stop_gradient(correction * active)
