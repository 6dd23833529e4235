"""Which weights of a graph can be pruned, and why the others are left."""
from __future__ import annotations

from typing import Any, Collection, Dict, NamedTuple, Optional, Sequence, Set

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import select
from slimtrain.hooks.graph import (
    ancestors,
    constant_tensors,
    find_tensor,
    is_backward,
    ordered_variable,
    variables_by_name,
)
from slimtrain.hooks.insertion import is_ours
from slimtrain.hooks.layers import Layer, LayerKind, find_layers


class PrunableWeight(NamedTuple):
    """A variable that layers read as their weight."""

    name: str       #: of the variable's operation
    variable: Any
    layer: Layer    #: the first that reads it

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Values in the variable's layout as [output channels, inputs, kernel places]."""
        shape = self.layer.kernel.shape.as_list()
        kernel = values.reshape(shape)
        if self.layer.kind is LayerKind.MATMUL:
            return (kernel if self.layer.channel_axis == 0 else kernel.T)[:, :, None]
        height, width, inputs, outputs = shape
        if self.layer.kind is LayerKind.DEPTHWISE:
            return kernel.transpose(2, 3, 0, 1).reshape(inputs * outputs, 1, height * width)
        return kernel.transpose(3, 2, 0, 1).reshape(outputs, inputs, height * width)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`rows`."""
        shape = self.layer.kernel.shape.as_list()
        if self.layer.kind is LayerKind.MATMUL:
            kernel = rows[:, :, 0] if self.layer.channel_axis == 0 else rows[:, :, 0].T
        elif self.layer.kind is LayerKind.DEPTHWISE:
            kernel = rows.reshape(shape[2], shape[3], shape[0], shape[1]).transpose(2, 3, 0, 1)
        else:
            kernel = rows.reshape(shape[3], shape[2], shape[0], shape[1]).transpose(2, 3, 1, 0)
        return np.ascontiguousarray(kernel).reshape(self.variable.shape.as_list())


class PrunableWeights(NamedTuple):
    """The weights of a graph, in the order in which their layers were made."""

    weights: Dict[str, PrunableWeight]   #: by the name of the variable
    layers: Dict[str, Layer]             #: every layer of the forward graph, by operation name
    left: Dict[str, str]                 #: layer -> reason
    within: Set[str]                     #: names of all operations of the forward graph


class LayerSparsity(NamedTuple):
    """One line of a pruner's report."""

    name: str
    parameters: int   #: number of weights
    ratio: float      #: share of them that is pruned
    reason: str       #: why it is not, or not fully, subject to pruning; ""


def forward_operations(graph: tf.Graph, output_names: Optional[Sequence[str]]) -> Set[str]:
    """Names of the operations that lead to the outputs; without outputs, of all that gradients did not bring.

    Raises:
        ValueError: an output that does not exist.
    """
    if output_names:
        return ancestors([find_tensor(graph, name).op for name in output_names])
    return {op.name for op in graph.get_operations() if not is_backward(op)}


def prunable_weights(graph: tf.Graph, output_names: Optional[Sequence[str]], skip: Collection[str] = (),
                     skip_first: bool = False, skip_last: bool = False, depthwise: bool = False) -> PrunableWeights:
    """Split the layers of a graph into those whose variables can be pruned, and the others.

    Args:
        graph: with or without gradients.
        output_names: what leaves the network; None to take everything.
        skip: names or patterns of layers (operations) to leave alone.
        skip_first, skip_last: leave the first or last prunable weight alone, in the order of the graph.
        depthwise: whether depthwise convolutions count as prunable.

    Raises:
        ValueError: an entry of ``skip`` names no layer; nothing is left to prune.
        RuntimeError: the graph is quantized already.
    """
    within = forward_operations(graph, output_names)
    layers = find_layers(graph, within, constant_tensors(graph), set())
    if any(is_ours(layer.kernel.op.name) for layer in layers.values()):
        raise RuntimeError("the graph is quantized already: construct the pruner (or its hook) before the quantizer")
    skipped = set(select(list(layers), list(skip)))
    known = variables_by_name(graph)
    weights: Dict[str, PrunableWeight] = {}
    left: Dict[str, str] = {}
    for name, layer in layers.items():
        reason = "named in skip_layers" if name in skipped else _why_not(layer, known, weights, depthwise)
        if reason:
            left[name] = reason
        else:
            variable = ordered_variable(layer.kernel)
            weights.setdefault(variable, PrunableWeight(variable, known[variable], layer))
    names = list(weights)
    for wanted, ends, reason in ((skip_first, names[:1], "the first layer"), (skip_last, names[-1:], "the last layer")):
        for name in ends if wanted else ():
            if name in weights:
                left[weights.pop(name).layer.name] = reason
    if not weights:
        found = "; ".join("%s: %s" % item for item in left.items()) or "no layer with a variable weight was found"
        raise ValueError("nothing to prune (%s)" % found)
    return PrunableWeights(weights, layers, left, within)


def _why_not(layer: Layer, known: Dict[str, Any], weights: Dict[str, PrunableWeight], depthwise: bool) -> str:
    if layer.kind is LayerKind.DEPTHWISE and not depthwise:
        return "a depthwise convolution has few weights per channel, and MNN stores them dense"
    variable = ordered_variable(layer.kernel)
    if variable not in known:
        return "its weight is computed, or partitioned over several variables"
    if layer.kernel.dtype.base_dtype != tf.float32 or not layer.kernel.shape.is_fully_defined():
        return "its weight is no float32 array of known shape"
    if layer.kind is LayerKind.CONV and layer.input.shape.rank and layer.op.get_attr("data_format") == b"NHWC":
        inputs = layer.input.shape.as_list()[-1]
        if inputs is not None and inputs != layer.kernel.shape.as_list()[2]:
            return "a grouped convolution has few weights per channel, and MNN's TensorFlow converter does not read it"
    other = weights.get(variable)
    if other is not None and (other.layer.kind, other.layer.channel_axis) != (layer.kind, layer.channel_axis):
        return "it shares its weight with %s, which reads it in another way" % other.layer.name
    return ""
