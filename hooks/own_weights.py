"""Layers whose weight can be computed from others: those that have a variable of their own, and why others not."""
from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import constant_tensors, inside_control_flow, variables_by_name
from slimtrain.hooks.layers import Layer, LayerKind, find_layers
from slimtrain.hooks.operations import forward_names

_SAME = frozenset({"Identity", "ReadVariableOp", "StopGradient"})
_RESHAPES = frozenset({"Reshape", "ExpandDims", "Squeeze"})
_VARIABLES = frozenset({"VariableV2", "Variable", "VarHandleOp"})


class OwnWeight(NamedTuple):
    """A layer and the variable that is its weight."""

    layer: Layer
    variable: Any
    path: Tuple[tf.Operation, ...]   #: operations that change the shape on the way from the variable to the layer

    @property
    def shape(self) -> List[int]:
        """Shape of the kernel as the layer reads it: [h, w, I, O], [I, O] or, transposed, [O, I]."""
        return [int(size) for size in self.layer.kernel.shape.as_list()]

    @property
    def transposed(self) -> bool:
        """Whether a matrix has its outputs first."""
        return self.layer.kind is LayerKind.MATMUL and self.layer.channel_axis == 0

    @property
    def spatial(self) -> Tuple[int, ...]:
        """The positions of height and width in the layer's input; () for a matrix product."""
        if self.layer.kind is LayerKind.MATMUL:
            return ()
        return (2, 3) if self.layer.op.get_attr("data_format") == b"NCHW" else (1, 2)

    @property
    def stride(self) -> Tuple[int, ...]:
        """Of height and width; () for a matrix product."""
        return tuple(self.layer.op.get_attr("strides")[axis] for axis in self.spatial)

    @property
    def dilation(self) -> Tuple[int, ...]:
        """Of height and width; () for a matrix product."""
        return tuple(self.layer.op.get_attr("dilations")[axis] for axis in self.spatial)

    def matrix(self, value: np.ndarray) -> np.ndarray:
        """The variable's value as [O, I, *extents], as ``slimtrain.core`` has weights."""
        for op in self.path:
            value = np.transpose(value, _permutation(op)) if op.type == "Transpose" else np.reshape(
                value, op.outputs[0].shape.as_list())
        return to_core(value, self.transposed)

    def as_kernel(self, value: tf.Tensor) -> tf.Tensor:
        """A value of the variable as the layer reads it."""
        for op in self.path:
            value = tf.transpose(value, [int(place) for place in _permutation(op)]) if op.type == "Transpose" \
                else tf.reshape(value, op.outputs[0].shape.as_list())
        return value

    def as_variable(self, kernel: tf.Tensor) -> tf.Tensor:
        """A kernel as the layer reads it, in the shape that the variable has."""
        for op in reversed(self.path):
            if op.type == "Transpose":
                kernel = tf.transpose(kernel, [int(place) for place in np.argsort(_permutation(op))])
            else:
                kernel = tf.reshape(kernel, op.inputs[0].shape.as_list())
        return kernel


def to_core(kernel: np.ndarray, transposed: bool) -> np.ndarray:
    """[h, w, I, O], [I, O] or, transposed, [O, I] as [O, I, *extents]."""
    if kernel.ndim == 2:
        return kernel if transposed else kernel.T
    return np.transpose(kernel, (3, 2, 0, 1))


def from_core(weight: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse of :func:`to_core`."""
    if weight.ndim == 2:
        return weight if transposed else weight.T
    return np.transpose(weight, (2, 3, 1, 0))


def find_own_weights(graph: tf.Graph) -> Tuple[Dict[str, Layer], Dict[str, OwnWeight], Dict[str, str]]:
    """Split the layers of a graph.

    Returns:
        every layer by operation name; of those with a variable of their own, that; for the others, the reason.
    """
    layers = find_layers(graph, forward_names(graph), constant_tensors(graph), set())
    known = variables_by_name(graph)
    sources = {name: _source(layer.kernel) for name, layer in layers.items()}
    found: Dict[str, OwnWeight] = {}
    reasons: Dict[str, str] = {}
    for name, layer in layers.items():
        source = sources[name]
        others = [other for other, theirs in sources.items()
                  if source and theirs and other != name and theirs[0] == source[0]]
        reason = _why_not(layer) or (
            "its weight is no variable, or one in several parts" if source is None or source[0] not in known else
            "its weight is also that of {}".format(", ".join(others)) if others else "")
        if reason or source is None:
            reasons[name] = reason
        else:
            found[name] = OwnWeight(layer, known[source[0]], source[1])
    return layers, found, reasons


def make_part(own: OwnWeight, name: str, value: Any, trainable: bool) -> Any:
    """A variable beside the weight that it is a part of, in no collection yet.

    Raises:
        RuntimeError: the graph has such a variable.
    """
    variable = own.variable
    full_name = "{}/{}".format(variable.op.name, name)
    with tf.device(variable.device), tf.control_dependencies(None), tf.name_scope(None):
        made = tf.Variable(value, name=full_name, trainable=trainable, collections=[],
                           use_resource=variable.op.type == "VarHandleOp")
    if made.op.name != full_name:
        raise RuntimeError("the graph has a variable {!r} already: {} was decomposed or expanded before".format(
            full_name, own.layer.name))
    # with ``trainable`` TensorFlow adds it to this collection whatever ``collections`` says
    trained = own.layer.op.graph.get_collection_ref(tf.GraphKeys.TRAINABLE_VARIABLES)
    trained[:] = [item for item in trained if item is not made]
    return made


def is_read(layer: Layer) -> bool:
    """Whether anything reads what the layer's operation computes."""
    return bool(layer.op.outputs[0].consumers())


UNREAD = "nothing reads its result yet, which others would go on fetching: add a bias or tf.identity behind it"


def _source(kernel: tf.Tensor) -> Optional[Tuple[str, Tuple[tf.Operation, ...]]]:
    """The variable behind a kernel and what reshapes it on the way; None where more happens."""
    path: List[tf.Operation] = []
    op = kernel.op
    while op.type not in _VARIABLES:
        if op.type in _RESHAPES or (op.type == "Transpose" and tf.get_static_value(op.inputs[1]) is not None):
            if not op.outputs[0].shape.is_fully_defined() or not op.inputs[0].shape.is_fully_defined():
                return None
            path.insert(0, op)
        elif op.type not in _SAME:
            return None
        op = op.inputs[0].op
    return str(op.name), tuple(path)


def _permutation(op: tf.Operation) -> np.ndarray:
    return np.asarray(tf.get_static_value(op.inputs[1]))


def _why_not(layer: Layer) -> str:
    """Why a layer cannot be written as a chain; "" when it can."""
    if layer.kind is LayerKind.DEPTHWISE:
        return "it is depthwise: its channels are factorized already"
    if inside_control_flow(layer.op):
        return "it lies inside a cond or while_loop"
    if layer.kernel.dtype.base_dtype != tf.float32:
        return "its weight is {}, not float32".format(layer.kernel.dtype.base_dtype.name)
    if not layer.kernel.shape.is_fully_defined():
        return "the shape of its weight is not known"
    if layer.kind is LayerKind.CONV and layer.input.shape.rank:
        axis = 1 if layer.op.get_attr("data_format") == b"NCHW" else 3
        inputs, expected = layer.input.shape.as_list()[axis], layer.kernel.shape.as_list()[2]
        if inputs is not None and inputs != expected:
            return "it is grouped ({} groups): its channels are factorized already".format(inputs // expected)
    return ""
