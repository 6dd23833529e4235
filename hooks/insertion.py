"""Putting fake quantization onto the edges of a graph, and taking it off again by name.

Every inserted operation leaves two marks: ``MNN_QAT/<place>/source`` passes on what was there before and
``MNN_QAT/<place>/quantized`` is what is read instead. A tensor that the user fetches by itself has no edge to move: its
operation gets a twin that does the old work, and passes the quantized result of the twin on.
So a graph that was read from a checkpoint can be stripped without any object of ours.
"""
from __future__ import annotations

import re
from typing import Callable

import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import Edge, connect, edges_from
from slimtrain.hooks.state import SCOPE

#: additions, as of a bias
SUMS = frozenset({"BiasAdd", "Add", "AddV2"})
_RECTIFIERS = frozenset({"Relu"})
_QUANTIZED = re.compile(r"^(.*/)?{}/(.+)/quantized$".format(SCOPE))
_TWIN = re.compile(r"^(.*/)?{}/(.+)/twin$".format(SCOPE))

Change = Callable[[tf.Tensor], tf.Tensor]


def place_name(tensor: tf.Tensor) -> str:
    """A name for a tensor that can be part of a scope."""
    op, _, index = tensor.name.partition(":")
    return op if index == "0" else "{}_{}".format(op, index)


def change_edges(tensor: tf.Tensor, place: str, change: Change) -> None:
    """Let everything that reads ``tensor`` read ``change(tensor)`` instead."""
    edges = edges_from(tensor)
    with tf.name_scope("{}/{}/".format(SCOPE, place)):
        source = tf.identity(tensor, name="source")
        changed = tf.identity(change(source), name="quantized")
    changed.set_shape(tensor.shape)
    connect(edges, changed)


def change_edge(op: tf.Operation, index: int, place: str, change: Change) -> None:
    """Let one input of ``op`` pass through ``change``."""
    tensor = op.inputs[index]
    with tf.name_scope("{}/{}/".format(SCOPE, place)):
        changed = tf.identity(change(tf.identity(tensor, name="source")), name="quantized")
    changed.set_shape(tensor.shape)
    connect([Edge(op, index)], changed)


def can_change_result(tensor: tf.Tensor) -> bool:
    """Whether ``change_result`` knows how to let the operation behind ``tensor`` pass a value through unchanged."""
    return tensor.op.type in SUMS | _RECTIFIERS


def change_result(tensor: tf.Tensor, change: Change) -> None:
    """Let the operation behind ``tensor`` itself produce ``change`` of what it produced: a twin does its old work."""
    with tf.name_scope("{}/{}/".format(SCOPE, place_name(tensor))):
        changed = tf.identity(change(_twin(tensor.op)), name="passed_on")
    changed.set_shape(tensor.shape)
    pass_through(tensor, changed)


def pass_through(tensor: tf.Tensor, value: tf.Tensor) -> None:
    """Let the operation behind ``tensor`` produce ``value``, bit by bit.

    A sum then adds zero, and a rectifier sees what is rectified already.
    """
    op = tensor.op
    data = _data_input(op)
    if op.type in SUMS:
        other = op.inputs[1 - data]
        with tf.name_scope("{}/{}/".format(SCOPE, place_name(tensor))):
            connect([Edge(op, 1 - data)], tf.zeros(other.shape.as_list(), other.dtype.base_dtype, name="zeros"))
    connect([Edge(op, data)], value)


def _twin(op: tf.Operation) -> tf.Tensor:
    inputs = list(op.inputs)
    if op.type == "BiasAdd":
        return tf.nn.bias_add(inputs[0], inputs[1], name="twin")
    return tf.nn.relu(inputs[0], name="twin") if op.type in _RECTIFIERS else tf.raw_ops.AddV2(
        x=inputs[0], y=inputs[1], name="twin")


def _data_input(op: tf.Operation) -> int:
    """Which input of ``op`` has the shape of its result (the other is a bias)."""
    ranks = [tensor.shape.rank for tensor in op.inputs]
    return 1 if len(ranks) == 2 and ranks[1] == op.outputs[0].shape.rank and ranks[0] != ranks[1] else 0


def strip(graph: tf.Graph) -> int:
    """Take all fake quantization off the edges of ``graph``; returns how many edges moved.

    Sessions that already ran keep running the quantized graph; a ``GraphDef`` taken afterwards is the float one.
    """
    moved = 0
    for op in list(graph.get_operations()):
        if _QUANTIZED.match(op.name):
            source = graph.get_operation_by_name(op.name[:-len("quantized")] + "source")
            edges = edges_from(op.outputs[0])
            connect(edges, source.inputs[0])
            moved += len(edges)
        twin = _TWIN.match(op.name)
        if twin:
            original = graph.get_operation_by_name((twin.group(1) or "") + twin.group(2))
            for index, tensor in enumerate(op.inputs):
                moved += original.inputs[index].name != tensor.name
                connect([Edge(original, index)], tensor)
    return moved


def is_inserted(name: str) -> bool:
    """Whether an operation is what a quantized edge reads."""
    return _QUANTIZED.match(name) is not None


def is_ours(name: str) -> bool:
    """Whether an operation was added by quantization."""
    return name.startswith(SCOPE + "/") or "/{}/".format(SCOPE) in name
