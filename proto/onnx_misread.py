"""What MNN's converter reads otherwise than an ONNX file means it."""
from __future__ import annotations

from typing import List, Tuple

import numpy as np
import onnx
from onnx import numpy_helper

from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_placement import is_fusable
from slimtrain.proto.onnx_reductions import is_misread_reduction


def misread_operations(path: str) -> Tuple[str, ...]:
    """One line for each operation of a file that MNN reads otherwise; its weights are not read."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        count = min(int(np.prod(tensor.dims)), 2)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(count, np.float32), tensor.name))
    graph = OnnxGraph(model)
    lines = ["%s of %s (%s)" % (node.op_type, node.output[0], _misread(node)) for node in graph.nodes if _misread(node)]
    lines += ["Add of %s (its constant is added before the activation %s, not behind it; exchange its operands)" % (
        node.output[0], node.input[0]) for node in added_offsets(graph) if graph.constant(node.input[0]) is None]
    return tuple(lines)


def _misread(node: onnx.NodeProto) -> str:
    """What MNN 3.6 makes of a node by its attributes, "" when it reads it as it is meant."""
    if is_misread_reduction(node):
        return "it reduces all axes"
    if node.op_type == "MaxPool" and any(step != 1 for step in attribute(node, "dilations", [])):
        return "it leaves out the dilation"
    if node.op_type == "Resize" and attribute(node, "antialias", 0):
        return "it leaves out the antialiasing"
    aligned = attribute(node, "coordinate_transformation_mode", b"half_pixel") == b"align_corners"
    if node.op_type == "Resize" and attribute(node, "mode", b"nearest") == b"cubic" and not aligned:
        return "it interpolates between other points"
    return ""


def added_offsets(graph: OnnxGraph) -> List[onnx.NodeProto]:
    """Additions of a constant to an activation of a convolution that nothing else reads, either operand first.

    MNN 3.6 takes the constant for the convolution's bias where it is the second operand. Where it is the first, it
    rounds the sum of an int8 tensor otherwise than other sums.
    """
    return [node for node in graph.nodes if node.op_type == "Add" and len(set(node.input)) == 2 and any(
        _is_vector(graph, offset) and _is_activation(graph, name) and graph.only_consumer(name) is not None
        for name, offset in (tuple(node.input), tuple(node.input)[::-1]))]


def _is_activation(graph: OnnxGraph, name: str) -> bool:
    activation = graph.producer.get(name)
    if activation is None or not is_fusable(graph, activation):
        return False
    layer = graph.producer.get(activation.input[0])
    while layer is not None and (layer.op_type == "BatchNormalization" or _adds_constant(graph, layer)):
        layer = graph.producer.get(layer.input[0])
    return layer is not None and layer.op_type in ("Conv", "ConvTranspose")


def _is_vector(graph: OnnxGraph, name: str) -> bool:
    value = graph.constant(name)
    return value is not None and value.size > 1


def _adds_constant(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    return node.op_type == "Add" and graph.constant(node.input[1]) is not None
