"""Where MNN will quantize an ONNX graph: its nodes in the vocabulary of ``slimtrain.core.placement``."""
from __future__ import annotations

from typing import List, Mapping, Optional

import numpy as np
import onnx

from slimtrain.core import Op, OpKind, Placement, place
from slimtrain.proto.onnx_graph import OnnxGraph, attribute

_KINDS = {
    OpKind.RELU: ("Relu",),
    OpKind.NON_NEGATIVE: ("Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus", "Sqrt"),
    OpKind.COMBINE: ("Add", "Mul", "Div", "ReduceMean", "ReduceSum", "AveragePool", "GlobalAveragePool", "Max"),
    OpKind.VIEW: ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
                  "DepthToSpace", "SpaceToDepth", "Expand", "Dropout"),
    OpKind.CONCAT: ("Concat",),
    OpKind.MAX_POOL: ("MaxPool", "GlobalMaxPool"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


def place_onnx(graph: OnnxGraph, layers: Mapping[str, str]) -> Placement:
    """Place the quantizers of a graph.

    Args:
        graph: the graph, its layers written as convolutions.
        layers: output of a quantized convolution -> name of its layer.
    """
    ops: List[Op] = []
    for node in graph.nodes:
        inputs = tuple(name for name in node.input if name and graph.constant(name) is None)
        kind = _kind(graph, node, layers, len(inputs))
        if kind in (OpKind.LAYER, OpKind.VIEW):
            inputs = inputs[:1]
        if inputs:
            ops += [Op(name, kind, inputs, layers.get(name, "")) for name in node.output if name]
    return place(ops, sorted(graph.outputs))


def _kind(graph: OnnxGraph, node: onnx.NodeProto, layers: Mapping[str, str], inputs: int) -> OpKind:
    if node.output[0] in layers:
        return OpKind.LAYER
    if node.op_type == "Clip":
        return clip_kind(graph, node)
    if node.op_type == "Pad":
        given = len(node.input) > 2 and node.input[2]
        value = graph.constant(node.input[2]) if given else attribute(node, "value", 0.0)
        return OpKind.VIEW if value is not None and not np.any(value) else OpKind.OTHER
    if node.op_type == "Resize":
        return OpKind.VIEW if attribute(node, "mode", b"nearest") == b"nearest" else OpKind.RESIZE
    kind = _KIND_OF.get(node.op_type, OpKind.OTHER)
    if kind is OpKind.VIEW and graph.constant(node.input[0]) is not None:
        return OpKind.OTHER  # the values are constant and what is computed only tells which of them: an embedding
    constants = sum(1 for name in node.input if name) > inputs
    if kind in (OpKind.COMBINE, OpKind.CONCAT) and node.op_type in ("Add", "Mul", "Div", "Max", "Concat") and constants:
        return OpKind.OTHER  # a constant may be negative
    return kind


def clip_kind(graph: OnnxGraph, node: onnx.NodeProto) -> OpKind:
    """Whether a Clip is a ReLU6, which the converter fuses, or at least keeps values from being negative."""
    bounds: List[Optional[float]] = []
    for position, name in ((1, "min"), (2, "max")):
        value = graph.constant(node.input[position]) if len(node.input) > position else attribute(node, name)
        bounds.append(None if value is None else float(value))
    if bounds == [0.0, 6.0]:
        return OpKind.RELU6
    return OpKind.NON_NEGATIVE if bounds[0] is not None and bounds[0] >= 0 else OpKind.OTHER


def is_fusable(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether the converter fuses an activation into the convolution before it."""
    return node.op_type == "Relu" or (node.op_type == "Clip" and clip_kind(graph, node) is OpKind.RELU6)
