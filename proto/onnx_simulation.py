"""What MNN computes for a rewritten ONNX model: convolutions and means as it does, everything else by onnxruntime."""
from __future__ import annotations

from typing import Dict, List, Optional

import numpy as np
import onnx

from slimtrain.core import (
    Activation,
    IntegerConv,
    Quantizer,
    input_levels,
    simulate_conv,
    simulate_mean,
    stored_zero_point,
)
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_check import open_session
from slimtrain.proto.onnx_exactness import Step
from slimtrain.proto.onnx_geometry import as_image, conv_geometry
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_pooling import simulate_average_pool
from slimtrain.proto.onnx_rewrite import Rewritten, steps_of

Arrays = Dict[str, np.ndarray]

_ACTIVATIONS = {"": Activation.NONE, "relu": Activation.RELU, "relu6": Activation.RELU6}


def simulate_onnx(rewritten: Rewritten, inputs: Arrays) -> Arrays:
    """The outputs of a quantized model, by name.

    Every tensor with a scale is put on its grid where it is made, as the runtime does; layers are computed by
    :func:`slimtrain.core.simulate_conv`.

    Args:
        rewritten: a model on its grid.
        inputs: arrays by name.

    Raises:
        ConversionError: onnxruntime cannot run an operation.
    """
    graph = OnnxGraph(rewritten.model)
    placement, steps = rewritten.placement, steps_of(rewritten.layers.values())
    constants = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in graph.initializers.items()}
    fused = {call.tensor: call.fused for call in placement.calls}
    values: Arrays = {name: _on_grid(name, value, rewritten, steps) for name, value in inputs.items()}
    done: List[str] = []
    for node in graph.nodes:
        if node.output[0] in done:
            continue
        if node.output[0] in rewritten.layers:
            layer, end = rewritten.layers[node.output[0]], fused[node.output[0]]
            made = {node.output[0]: _convolution(node, layer, values[node.input[0]])}
            made[end] = made[node.output[0]]
            done.append(end)
        else:
            known = {name: constants[name] if name in constants else values[name] for name in node.input if name}
            mean = _mean(node, known)
            made = _run_node(node, known, rewritten.model) if mean is None else {node.output[0]: mean}
        values.update((name, _on_grid(name, value, rewritten, steps)) for name, value in made.items())
    return {value.name: values[value.name] for value in rewritten.model.graph.output}


def _on_grid(name: str, value: np.ndarray, rewritten: Rewritten, steps: Dict[Quantizer, Step]) -> np.ndarray:
    owner = rewritten.placement.quantizers.get(name)
    if owner is None:
        return value
    step = steps[owner]
    return np.asarray(input_levels(value, float(step.scale), step.grid).astype(np.float32) * np.float32(step.scale))


def _convolution(node: onnx.NodeProto, layer: DeployedLayer, x: np.ndarray) -> np.ndarray:
    shape = layer.levels.shape + (1,) * (x.ndim - layer.levels.ndim)
    geometry = conv_geometry(node, shape, x.shape[2:])
    levels = layer.levels.reshape(shape[:2] + geometry.kernel)
    conv = IntegerConv(levels, layer.weight_scales, layer.bias, layer.input_scale, layer.output_scale,
                       layer.output_grid, geometry.strides, geometry.padding, geometry.dilation, layer.groups,
                       _ACTIVATIONS[layer.activation], stored_zero_point(layer.input_grid))
    found = simulate_conv(input_levels(as_image(x), layer.input_scale, layer.input_grid), conv)
    result = found.astype(np.float32) * np.float32(layer.output_scale)
    return result if x.ndim == 4 else result[:, :, 0]


def _mean(node: onnx.NodeProto, known: Arrays) -> Optional[np.ndarray]:
    """A mean or an average pool in the order of MNN's sums; None for anything else."""
    if node.op_type == "AveragePool":
        return simulate_average_pool(node, known[node.input[0]])
    axes = _averaged_axes(node, known)
    return simulate_mean(known[node.input[0]], axes) if axes else None


def _averaged_axes(node: onnx.NodeProto, known: Arrays) -> int:
    """Over how many last axes a node takes the mean and keeps them; 0 for anything else."""
    if node.op_type != "ReduceMean" or not attribute(node, "keepdims", 1):
        return 0
    axes = known[node.input[1]] if len(node.input) > 1 and node.input[1] else attribute(node, "axes", ())
    rank = known[node.input[0]].ndim
    last = list(range(rank))[rank - len(axes):]
    return len(axes) if sorted(int(axis) % rank for axis in axes) == last and len(axes) < rank else 0


def _run_node(node: onnx.NodeProto, known: Arrays, model: onnx.ModelProto) -> Arrays:
    """Run one operation; its operands are constants of a model of its own."""
    constants = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in known.items()]
    outputs = [name for name in node.output if name]
    graph = onnx.helper.make_graph([node], "node", [], [onnx.ValueInfoProto(name=name) for name in outputs], constants)
    single = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return dict(zip(outputs, open_session(single.SerializeToString(), optimize=False).run(outputs, {})))
