"""Writing a network the way MNN computes it as it was simulated.

Works on any graph that holds the network's operations by name: a private copy for export, or the user's own graph
when it is stripped. Nothing is deleted: replacements are added beside the old operations, and readers are moved over.
"""
from __future__ import annotations

from typing import Any, Dict, NamedTuple, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import Op, OpKind, Placement
from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.deployment import DeployedLayer, deployed_scope, live_name
from slimtrain.hooks.graph import Edge, connect, edges_from
from slimtrain.hooks.grids import InputGrid, rectifies_in_float
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.operations import Network
from slimtrain.hooks.padding import add_convolution
from slimtrain.hooks.state import SCOPE


class Rewriting(NamedTuple):
    """Everything that turns a network into its deployed form."""

    network: Network
    int8_safe: Tuple[str, ...]             #: see ``int8_safe``
    deployed: Tuple[DeployedLayer, ...]
    grids: Tuple[InputGrid, ...] = ()      #: of all quantized tensors that no quantized layer produces


Replacements = Dict[str, tf.Tensor]
#: computed in int8 with errors that training did not simulate, and homogeneous: see ``_run_in_float``
_FLOAT_ONLY = frozenset({"AvgPool", "MaxPool", "MaxPoolV2", "Maximum", "Minimum", "ResizeBilinear", "Abs", "Neg"})
#: activations and their largest values
_BOUNDS = {"Relu": None, "Relu6": 6.0}


def add_layers(graph: tf.Graph, deployed: Sequence[DeployedLayer]) -> Replacements:
    """Add every quantized layer in its deployed form; maps the tensors they replace to the new ones."""
    with graph.as_default(), tf.control_dependencies(None):
        return {layer.source.call.fused: _add_layer(graph, layer) for layer in deployed}


def _add_layer(graph: tf.Graph, deployed: DeployedLayer) -> tf.Tensor:
    layer = deployed.source.layer
    scope = deployed_scope(layer.name)
    with tf.name_scope(scope):
        kernel = tf.constant(deployed.kernel, name="kernel")
        bias = None if deployed.bias is None else tf.constant(deployed.bias, name="bias")
        existing = _existing(graph, scope + "convolution")
        if existing is not None:  # stripped before: only the numbers are new
            connect([Edge(existing, 1)], kernel)
            if bias is not None:
                connect([Edge(graph.get_operation_by_name(scope + "biased"), 1)], bias)
            end = scope + "result" if layer.kind is LayerKind.MATMUL else live_name(deployed.source, bias is not None)
            return graph.get_tensor_by_name(end + ":0")
        values = graph.get_tensor_by_name(layer.input.name)
        if layer.kind is LayerKind.MATMUL:
            values = tf.reshape(values, [-1, 1, 1, int(deployed.kernel.shape[2])], name="image")
        values = _convolution(graph.get_operation_by_name(layer.name), values, kernel, layer.kind)
        if bias is not None:
            values = tf.nn.bias_add(values, bias, name="biased")
        if deployed.source.activation:
            values = _ACTIVATIONS[deployed.source.activation](values, name=deployed.source.activation)
        if layer.kind is LayerKind.MATMUL:
            values = tf.reshape(values, [-1, layer.channels], name="result")
        return values


_ACTIVATIONS = {"relu": tf.nn.relu, "relu6": tf.nn.relu6}


def _existing(graph: tf.Graph, name: str) -> Any:
    try:
        return graph.get_operation_by_name(name)
    except KeyError:
        return None


def _convolution(op: tf.Operation, values: tf.Tensor, kernel: tf.Tensor, kind: LayerKind) -> tf.Tensor:
    if kind is LayerKind.MATMUL:
        return tf.raw_ops.Conv2D(input=values, filter=kernel, strides=[1, 1, 1, 1], padding="VALID", name="convolution")
    return add_convolution(op, kind, values, kernel, "convolution")


def add_float_operations(graph: tf.Graph, rewriting: Rewriting) -> Replacements:
    """Add poolings, and activations of their own, that MNN computes as TensorFlow does.

    Args:
        graph: the graph to add to.
        rewriting: what it computes, and where it is quantized.
    """
    added = {}
    fused = {layer.source.call.fused for layer in rewriting.deployed}
    with graph.as_default(), tf.control_dependencies(None):
        for op in list(graph.get_operations()):
            if op.name not in rewriting.network.within:
                continue
            if op.type in _FLOAT_ONLY and op.outputs[0].name not in rewriting.int8_safe:
                added[op.outputs[0].name] = _global_mean(op) if _is_global(op) else _run_in_float(op)
            elif op.type in _BOUNDS and _shares_its_range(op, rewriting):
                added[op.outputs[0].name] = _activate_in_float(op)
            elif rectifies_in_float(op) and op.outputs[0].name not in fused:
                added[op.outputs[0].name] = _run_in_float(op)
    return added


def _shares_its_range(op: tf.Operation, rewriting: Rewriting) -> bool:
    """Whether MNN would give what an activation reads, which others read too, the range of its result."""
    readers = [reader for reader in op.inputs[0].consumers() if reader.name in rewriting.network.within]
    shared = len(readers) > 1 or op.inputs[0].name in rewriting.network.outputs
    return shared and op.outputs[0].name in {grid.tensor for grid in rewriting.grids}


def _activate_in_float(op: tf.Operation) -> tf.Tensor:
    with tf.name_scope("{}/{}/float/".format(SCOPE, op.name)):
        doubled = tf.nn.relu(op.inputs[0] * 2.0)
        bound = _BOUNDS[op.type]
        return tf.multiply(doubled if bound is None else tf.minimum(doubled, 2.0 * bound), 0.5, name="halved")


def _is_global(op: tf.Operation) -> bool:
    if op.type != "AvgPool" or op.get_attr("data_format") != b"NHWC":
        return False
    before, after = op.inputs[0].shape.as_list(), op.outputs[0].shape.as_list()
    return after[1:3] == [1, 1] and before[1:3] == list(op.get_attr("ksize"))[1:3]


def _global_mean(op: tf.Operation) -> tf.Tensor:
    return tf.reduce_mean(op.inputs[0], axis=[1, 2], keepdims=True, name="{}/{}/float/mean".format(SCOPE, op.name))


def _run_in_float(op: tf.Operation) -> tf.Tensor:
    """The same operation between two exact multiplications.

    MNN passes scales through poolings and then runs them in int8, with the mean rounded down and signed values compared
    as unsigned ones; interpolated and absolute values of integers differ from those of floats, too. A multiplication
    passes no scale on, and doubling and halving lose no bit.
    """
    with tf.name_scope("{}/{}/float/".format(SCOPE, op.name)):
        doubled = [tensor * 2.0 if tensor.dtype.is_floating else tensor for tensor in op.inputs]
        again = op.graph.create_op(op.type, doubled, [tensor.dtype for tensor in op.outputs],
                                   attrs=dict(op.node_def.attr), name="pool")
        again.outputs[0].set_shape(op.outputs[0].shape)
        return tf.multiply(again.outputs[0], 0.5, name="halved")


def add_inference_norms(graph: tf.Graph, norms: Sequence[BatchNorm]) -> Replacements:
    """Add the inference form of batch norms that the graph has in training form."""
    added = {}
    with graph.as_default(), tf.control_dependencies(None):
        for norm in norms:
            x, gamma, beta, mean, variance = (
                graph.get_tensor_by_name(tensor.name)
                for tensor in (norm.input, norm.gamma, norm.beta, norm.mean, norm.variance))
            added[norm.output.name] = tf.raw_ops.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=norm.epsilon, is_training=False,
                name="{}/{}/inference".format(SCOPE, norm.output.op.name))[0]
    return added


def redirect(graph: tf.Graph, replacements: Replacements) -> None:
    """Move everything that reads a replaced tensor over to its replacement, or to what replaces that in turn."""
    edges = {name: edges_from(graph.get_tensor_by_name(name)) for name in replacements}
    for name, tensor in replacements.items():
        while tensor.name in replacements:
            tensor = replacements[tensor.name]
        connect(edges[name], tensor)


def int8_safe(placement: Placement, ops: Sequence[Op]) -> Tuple[str, ...]:
    """Names of tensors whose pooling MNN runs exactly in int8: the largest of values that are never negative."""
    producer = {op.output: op for op in ops}
    safe = []
    for op in producer.values():
        if op.kind is OpKind.MAX_POOL:
            source = op.inputs[0]
            while source not in placement.quantizers and source in producer and producer[source].kind in (
                    OpKind.VIEW, OpKind.MAX_POOL):
                source = producer[source].inputs[0]
            if placement.quantizers.get(source) in placement.non_negative:
                safe.append(op.output)
    return tuple(safe)
