"""What a quantizer must remember: variables of the graph, so that every checkpoint holds them.

They are made on the device of the model variable they belong to: with a parameter server, all workers share them.
"""
from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import SMALLEST_SCALE, Grid
from slimtrain.hooks.graph import variable_device

#: graph collection of every variable that quantization added
COLLECTION = "MNN_QAT_variables"
#: scope of every operation that quantization added
SCOPE = "MNN_QAT"
#: how a float32 stores its exponent: what is added to it, and the bits below it
_FLOAT32_BIAS, _FLOAT32_FRACTION = 127, 23


class Scale(NamedTuple):
    """One scale: as the training run uses it, and as it can be read at any time without feeding data."""

    used: tf.Tensor
    stored: tf.Tensor
    ready: tf.Tensor    #: bool; whether ``stored`` means anything yet


def make_variable(name: str, value: np.ndarray, beside: tf.Tensor, trainable: bool = False,
                  collections: Sequence[str] = (COLLECTION,)) -> Any:
    """A variable of the state, on the device of the variable behind ``beside``.

    It is in ``collections`` beside the global variables.
    """
    with tf.device(None), tf.device(variable_device(beside)), tf.control_dependencies(None):
        return tf.Variable(value, name=name, trainable=trainable,
                           collections=[tf.GraphKeys.GLOBAL_VARIABLES, *collections])


def started_scale(name: str, shape: List[int], beside: tf.Tensor, values: tf.Tensor,
                  start: Callable[[np.ndarray], np.ndarray], waiting: Optional[tf.Tensor] = None) -> Scale:
    """A learned scale that takes its start from the first values that it sees, once in the life of a checkpoint.

    What the optimizer learns is the scale in units of its size at the start, see :func:`in_units`.

    Args:
        name: of the variable.
        shape: of the scale.
        beside: on whose device it lives.
        values: what it starts from.
        start: numpy function from the values to the scale.
        waiting: bool; whether it is too early to start.
    """
    variable = make_variable(name, np.ones(shape, np.float32), beside, trainable=True)
    size = make_variable(name + "_size", np.array(1.0, np.float32), beside)
    flag = make_variable(name + "_initialized", np.array(False), beside)

    def initialize() -> tf.Tensor:
        first = tf.reshape(tf.numpy_function(_named(start, variable.op.name), [tf.stop_gradient(values)], tf.float32),
                           shape)
        unit = _power_of_two(first)
        with tf.control_dependencies([tf.assign(variable, first / unit), tf.assign(size, unit)]):
            with tf.control_dependencies([tf.assign(flag, True)]):
                return tf.constant(True)

    # the branch is a control dependency only: a gradient through cond is dead in version 1 of control flow
    done = tf.cond(unless(flag.read_value(), waiting), lambda: tf.constant(True), initialize)
    with tf.control_dependencies([done]):
        used = positive(in_units(variable.read_value(), size.read_value()))
    return Scale(used, positive(variable.read_value() * size.read_value()), flag.read_value())


def unless(settled: tf.Tensor, waiting: Optional[tf.Tensor]) -> tf.Tensor:
    """Whether there is nothing to do: it is done already, or its time has not come."""
    return settled if waiting is None else tf.logical_or(settled, waiting)


@tf.custom_gradient
def in_units(learned: tf.Tensor, size: tf.Tensor) -> Tuple[tf.Tensor, Callable]:
    """``learned * size``, whose gradient is divided by the size instead of multiplied.

    An optimizer that divides gradients by their own size (Adam and its kin) moves every variable by about its learning
    rate, which is the whole of a scale of 0.001: so what it sees is about 1, and the rate counts in units of the scale.
    One that moves variables in proportion to their gradients moves the scale exactly as if it were the variable, since
    the size is a power of two.
    """
    return learned * size, lambda dy: [dy / size, None]


def _power_of_two(scales: tf.Tensor) -> tf.Tensor:
    """The power of two next to the geometric mean of some scales."""
    exponents = tf.log(positive(scales)) / np.float32(np.log(2.0))
    exponent = tf.cast(tf.round(tf.reduce_mean(exponents)), tf.int32)
    return tf.bitcast(tf.bitwise.left_shift(exponent + _FLOAT32_BIAS, _FLOAT32_FRACTION), tf.float32)  # exact


def _named(start: Callable[[np.ndarray], np.ndarray], name: str) -> Callable[[np.ndarray], np.ndarray]:
    """``start`` whose errors say which scale they are about."""
    def run(values: np.ndarray) -> np.ndarray:
        try:
            return start(values).astype(np.float32)
        except ValueError as error:
            raise ValueError("{} cannot start from the first values that it sees: {}".format(name, error)) from error
    return run


def positive(scale: tf.Tensor) -> tf.Tensor:
    """The scale that is used for a learned value, which an optimizer step may take below zero."""
    return tf.maximum(tf.abs(scale), SMALLEST_SCALE)


def max_abs(values: tf.Tensor, grid: Grid, axes: List[int]) -> tf.Tensor:
    """The scale that puts the largest magnitude on the last level; the ``max_abs_scale`` of core, in the graph."""
    return scale_to(tf.reduce_max(tf.abs(tf.stop_gradient(values)), axis=axes), grid)


def scale_to(largest: tf.Tensor, grid: Grid) -> tf.Tensor:
    """The scale that puts a magnitude on the last level."""
    return tf.maximum(largest / float(grid.upper), SMALLEST_SCALE)
