"""The variables of an over-parameterized layer: where they start, and the kernels that are computed from them."""
from __future__ import annotations

from typing import Any, NamedTuple, Optional, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.hooks.own_weights import OwnWeight, make_part

#: scope of all operations of expanded layers
SCOPE = "LOP"
_EPS = 1e-5


class Expansion(NamedTuple):
    """How layers are expanded."""

    rate: int             #: channels in between over channels of the layer
    batchnorm: bool       #: normalize in between
    bypass: bool          #: add the input to the output where they have one shape
    keep_weights: bool    #: equal the layer in evaluation; otherwise start at random


class Statistics(NamedTuple):
    """Of the two normalizations: variances [rI], [rO] and mean [rO]."""

    first_var: tf.Tensor
    middle_mean: tf.Tensor
    middle_var: tf.Tensor


class Parts(NamedTuple):
    """Variables of an expanded layer; without batch normalization the last five are None."""

    first: Any          #: [I, rI]
    middle: Any         #: [h, w, rI, rO] or [rI, rO]
    last: Any           #: [rO, O]
    first_gain: Any     #: [rI]
    middle_gain: Any    #: [rO]
    first_var: Any
    middle_mean: Any
    middle_var: Any

    def running(self) -> Optional[Statistics]:
        """The averages of the statistics, as they are now."""
        if self.first_var is None:
            return None
        return Statistics(*(variable.read_value() for variable in (self.first_var, self.middle_mean, self.middle_var)))

    def first_end(self, statistics: Optional[Statistics]) -> tf.Tensor:
        """``first`` with the scale of the normalization that follows it."""
        first = self.first.read_value()
        return first if statistics is None else first * _scale(self.first_gain, statistics.first_var)

    def last_end(self, statistics: Optional[Statistics]) -> tf.Tensor:
        """``last`` with the scale of the normalization that precedes it."""
        last = self.last.read_value()
        return last if statistics is None else last * tf.expand_dims(_scale(self.middle_gain, statistics.middle_var), 1)


def _scale(gain: Any, variance: tf.Tensor) -> tf.Tensor:
    return gain.read_value() * tf.rsqrt(variance + _EPS)


def make_parts(own: OwnWeight, how: Expansion, tap: Optional[Sequence[int]]) -> Parts:
    """Make the variables of a layer, in no collection yet.

    Args:
        own: the layer.
        how: it is expanded.
        tap: the position of the kernel that passes the input through, or None.

    Raises:
        RuntimeError: the layer was expanded before.
    """
    inputs, outputs = channels_of(own)
    inner, outer, extents = how.rate * inputs, how.rate * outputs, own.shape[:-2]
    trained = any(item is own.variable for item in own.variable.graph.get_collection(
        tf.GraphKeys.TRAINABLE_VARIABLES))
    uniform = tf.variance_scaling_initializer(1 / 3, "fan_in", "uniform")
    with tf.device(own.variable.device), tf.name_scope("{}/{}/initial/".format(SCOPE, own.layer.op.name)):
        starts = [uniform(shape, tf.float32) for shape in (
            [inputs, inner], extents + [inner, outer], [outer, outputs])]
    first, last = make_part(own, "first", starts[0], trained), make_part(own, "last", starts[2], trained)
    if how.keep_weights:
        with tf.device(own.variable.device), tf.name_scope("{}/{}/initial/".format(SCOPE, own.layer.op.name)):
            starts[1] = _keeping(own, first, starts[1], last, tap)
    middle = make_part(own, "middle", starts[1], trained)
    if not how.batchnorm:
        return Parts(first, middle, last, None, None, None, None, None)
    ones = {"first": tf.ones([inner]), "middle": tf.ones([outer])}
    gains = [make_part(own, name + "_gain", value, trained) for name, value in ones.items()]
    averages = [make_part(own, name, value, False) for name, value in (
        ("first_var", ones["first"] - _EPS), ("middle_mean", tf.zeros([outer])), ("middle_var", ones["middle"] - _EPS))]
    return Parts(first, middle, last, gains[0], gains[1], averages[0], averages[1], averages[2])


def _keeping(own: OwnWeight, first: Any, middle: tf.Tensor, last: Any, tap: Optional[Sequence[int]]) -> tf.Tensor:
    """The start of ``middle`` with which the layer keeps its weights: a random one, and the smallest change of it.

    The new scales are ones at the start. Whoever initializes ``middle`` initializes the other two with it.
    """
    with tf.control_dependencies([first.initializer, last.initializer]):
        before, after = (tf.cast(tf.identity(part.read_value()), tf.float64) for part in (first, last))
    start = tf.cast(middle, tf.float64)
    target = tf.cast(own.as_kernel(own.variable.initial_value), tf.float64)
    target = tf.transpose(target) if own.transposed else target
    missing = target - with_tap(chain(before, start, after), tap)
    left = tf.matmul(before, tf.linalg.inv(tf.matmul(before, before, transpose_b=True)), transpose_a=True)
    right = tf.matmul(tf.linalg.inv(tf.matmul(after, after, transpose_a=True)), after, transpose_b=True)
    return tf.cast(start + chain(left, missing, right), tf.float32)


def channels_of(own: OwnWeight) -> Tuple[int, int]:
    """Numbers of inputs and outputs."""
    first, second = own.shape[-2:]
    return (second, first) if own.transposed else (first, second)


def chain(first: tf.Tensor, middle: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
    """first [i, s] times middle [..., s, r] times last [r, o]: [..., i, o]."""
    shape = middle.shape.as_list()
    # one product, not one for each position, whose gradients of ``last`` would have to be summed up
    product = tf.matmul(tf.reshape(middle, [-1, shape[-1]]), last)
    return absorbed(first, tf.reshape(product, shape[:-1] + last.shape.as_list()[1:]))


def with_tap(kernel: tf.Tensor, tap: Optional[Sequence[int]]) -> tf.Tensor:
    """A kernel [..., I, O] that also adds its input to its output, at the position ``tap``; itself without one."""
    if tap is None:
        return kernel
    shape = kernel.shape.as_list()
    eye = tf.reshape(tf.eye(shape[-1], dtype=kernel.dtype), [1] * len(tap) + shape[-2:])
    around = [[place, extent - 1 - place] for place, extent in zip(tap, shape)]
    return kernel + tf.pad(eye, around + [[0, 0], [0, 0]])


def absorbed(first: tf.Tensor, middle: tf.Tensor) -> tf.Tensor:
    """first [i, s] and then middle [..., s, r] as one kernel [..., i, r]."""
    return tf.matmul(first, middle)
