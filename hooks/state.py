"""What a quantizer must remember: variables of the graph, so that every checkpoint holds them.

They are made on the device of the model variable they belong to: with a parameter server, all workers share them.
"""
from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import SMALLEST_SCALE, Grid
from slimtrain.hooks.graph import variable_device

#: graph collection of every variable that quantization added
COLLECTION = "MNN_QAT_variables"
#: scope of every operation that quantization added
SCOPE = "MNN_QAT"


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
                  start: Callable[[np.ndarray], np.ndarray], trainable: bool) -> Scale:
    """A scale that takes its start from the first values that it sees, once in the life of a checkpoint.

    Args:
        name: of the variable.
        shape: of the scale.
        beside: on whose device it lives.
        values: what it starts from.
        start: numpy function from the values to the scale.
        trainable: let the optimizer learn it.
    """
    variable = make_variable(name, np.ones(shape, np.float32), beside, trainable)
    flag = make_variable(name + "_initialized", np.array(False), beside)

    def initialize() -> tf.Tensor:
        first = tf.numpy_function(_named(start, variable.op.name), [tf.stop_gradient(values)], tf.float32)
        with tf.control_dependencies([tf.assign(variable, tf.reshape(first, shape))]):
            with tf.control_dependencies([tf.assign(flag, True)]):
                return tf.constant(True)

    # the branch is a control dependency only: a gradient through cond is dead in version 1 of control flow
    done = tf.cond(flag.read_value(), lambda: tf.constant(True), initialize)
    with tf.control_dependencies([done]):
        used = positive(variable.read_value())
    return Scale(used, positive(variable.read_value()), flag.read_value())


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
