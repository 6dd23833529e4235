"""The deployed network run with the integer arithmetic of ``slimtrain.core``, the judge of training and device alike.

Fake quantization computes with real numbers: now and then it rounds a value that lies next to a tie to the other level
than the device, whose float32 arithmetic has another order. Here every quantized layer is computed from integers in the
order of MNN; all other operations are TensorFlow's.
"""
from __future__ import annotations

from typing import Any, Callable, List, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Activation, IntegerConv, input_levels, simulate_conv
from slimtrain.core.winograd import simulate_winograd
from slimtrain.hooks.deployment import DeployedLayer
from slimtrain.hooks.export import inference_copy, without_dropout
from slimtrain.hooks.geometry import convolution_geometry
from slimtrain.hooks.graph import connect, edges_from, find_tensor
from slimtrain.hooks.grids import InputGrid
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.rewriting import Rewriting, redirect


def simulate_network(session: tf.Session, clean: Any, rewriting: Rewriting, outputs: Sequence[str],
                     feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
    """Values of ``outputs``, float32, as the device computes them.

    Args:
        session: holds the trained variables.
        clean: GraphDef of the network as the user built it.
        rewriting: the network and its quantized layers.
        outputs: names of tensors or operations.
        feed_dict: arrays by tensor or tensor name of the network's inputs.
    """
    graph, replacements = inference_copy(clean, rewriting.network)
    with graph.as_default():
        for grid in rewriting.grids:
            _quantize_readers(graph, grid)
        layers = {layer.source.call.fused: _integer_layer(graph, layer) for layer in rewriting.deployed}
    replacements.update(layers)
    redirect(graph, {**replacements, **without_dropout(graph, rewriting.network)})
    named = [find_tensor(graph, name) for name in outputs]
    ends = [replacements.get(tensor.name, tensor) for tensor in named]
    frozen = tf.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [end.op.name for end in ends])
    feeds = {getattr(key, "name", key): value for key, value in feed_dict.items()}
    with tf.Graph().as_default() as runner:
        tf.import_graph_def(frozen, name="")
        with tf.Session(graph=runner) as run:
            return list(run.run([end.name for end in ends], feeds))


def _quantize_readers(graph: tf.Graph, grid: InputGrid) -> None:
    tensor = graph.get_tensor_by_name(grid.tensor)
    edges = edges_from(tensor)
    connect(edges, _call(lambda values: input_levels(values, grid.scale, grid.grid) * np.float32(grid.scale), tensor,
                         tensor.shape))


def _integer_layer(graph: tf.Graph, deployed: DeployedLayer) -> tf.Tensor:
    layer, params = deployed.source.layer, deployed.params

    def compute(values: np.ndarray) -> np.ndarray:
        levels = input_levels(values, params.input_scale, params.input_grid)
        image = levels[:, None, None, :] if layer.kind is LayerKind.MATMUL else levels
        conv = _integer_conv(deployed, image.shape[1:3])
        channels_first = np.moveaxis(image, -1, 1)
        result = simulate_conv(channels_first, conv) if params.winograd is None else simulate_winograd(
            channels_first, conv, params.winograd)
        real = np.moveaxis(result, 1, -1).astype(np.float32) * np.float32(params.output_scale)
        return real[:, 0, 0, :] if layer.kind is LayerKind.MATMUL else real

    fused = graph.get_tensor_by_name(deployed.source.call.fused)
    return _call(compute, graph.get_tensor_by_name(layer.input.name), fused.shape)


def _call(function: Callable[[np.ndarray], np.ndarray], tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    result = tf.numpy_function(lambda values: np.ascontiguousarray(function(values), np.float32), [tensor], tf.float32)
    result.set_shape(shape)
    return result


def _integer_conv(deployed: DeployedLayer, size: Sequence[int]) -> IntegerConv:
    """The convolution for inputs of ``size`` (height, width): TensorFlow's SAME padding depends on it."""
    layer, params = deployed.source.layer, deployed.params
    kernel = np.moveaxis(deployed.kernel, layer.channel_axis if layer.kind is LayerKind.DEPTHWISE else 3, 0)
    levels = np.rint(kernel.astype(np.float64) / params.weight_scales.reshape(-1, 1, 1, 1)).astype(np.int32)
    strides, padding, dilations = convolution_geometry(layer, kernel.shape[1:3], size)
    return IntegerConv(
        weight=np.moveaxis(levels, 3, 1), weight_scales=params.weight_scales, bias=deployed.bias,
        input_scale=params.input_scale, output_scale=params.output_scale, output_grid=params.output_grid,
        strides=strides, padding=padding, dilation=dilations,
        groups=layer.channels if layer.kind is LayerKind.DEPTHWISE else 1,
        activation=Activation(deployed.source.activation or "none"))
