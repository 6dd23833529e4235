"""What MNN's converter reads otherwise than an ONNX file means it."""
from __future__ import annotations

from typing import List, Tuple

import numpy as np
import onnx
from onnx import numpy_helper

from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_placement import is_fusable


def misread_operations(path: str) -> Tuple[str, ...]:
    """One line for each operation of a file that MNN reads otherwise; its weights are not read."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        count = min(int(np.prod(tensor.dims)), 2)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(count, np.float32), tensor.name))
    graph = OnnxGraph(model)
    return tuple("Add of %s (its constant is added before the activation %s, not behind it; exchange its operands)" % (
        node.output[0], node.input[0]) for node in added_offsets(graph) if graph.constant(node.input[0]) is None)


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
