"""Which sums of a convolution would not fit 16 bits, told from its ordinary float result.

An integer sum is the real result divided by ``input step * weight step``. Float32 keeps it within a tenth of an
integer as far as a few times the 16-bit range, so comparing half-way between the last integer that fits and the next
is exact.
"""
from __future__ import annotations

import tensorflow.compat.v1 as tf

#: halfway between what fits into int16 and what does not
MOST, LEAST = 32767.5, -32768.5


def overflowing(result: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Where the integer sum behind ``result`` does not fit 16 bits.

    Args:
        result: what a convolution of fake-quantized values computed, [..., channels], without bias.
        step: real value of one unit of the sum, [channels].

    Returns:
        bool, the shape of ``result``.
    """
    sums = result / step
    return tf.logical_or(sums > MOST, sums < LEAST)


def peak(result: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """The largest magnitude of an integer sum, a scalar; more than ``MOST`` exactly when something overflows."""
    axes = list(range(result.shape.rank - 1))
    highest = tf.reduce_max(result, axis=axes) / step
    lowest = tf.reduce_min(result, axis=axes) / step
    return tf.reduce_max(tf.maximum(highest, -1.0 - lowest))
