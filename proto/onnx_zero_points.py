"""Which activations of an ONNX model may have a zero point: those around which MNN computes with it as it should.

Measured on MNN 3.6: convolutions (padding included), sums, differences, concatenation and what only moves values are
exact on tensors with a zero point. Max pools take them for symmetric, and are kept in float; so does an activation that
is not fused into a convolution, which a grid without negative levels makes needless. All else may run on integers as
if there were none (a leaky ReLU, a product), and is kept in float by ``onnx_qdq_detach``.
"""
from __future__ import annotations

from typing import Collection, Mapping, Set

import onnx

from slimtrain.core import Placement, Quantizer
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_qdq_parts import FileGrid

_EXACT = ("Conv", "Add", "Sub", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Slice",
          "Split", "Gather", "Pad", "DepthToSpace", "SpaceToDepth", "Identity", "GlobalMaxPool")
# computed in float from what the tensor holds
_FLOAT = ("ReduceMean", "GlobalAveragePool", "Sigmoid", "Softmax", "ConvTranspose", "MatMul", "Gemm")


def with_zero_points(graph: OnnxGraph, placement: Placement) -> Set[Quantizer]:
    """The owners of scales of which every tensor may have a zero point.

    Args:
        graph: the model, its layers written as convolutions.
        placement: of its quantized tensors.
    """
    fused = {call.fused for call in placement.calls}
    wrong: Set[Quantizer] = set()
    for name, owner in placement.on_grid.items():
        made = graph.producer.get(name)
        makers = [] if made is None or name in fused else [made]
        if not all(computes_with_zero_points(graph, node) for node in makers + list(graph.consumers.get(name, []))):
            wrong.add(owner)
    return set(placement.on_grid.values()) - wrong


def computes_with_zero_points(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether MNN is exact on tensors with a zero point, on integers or since it computes in float."""
    if node.op_type == "Mul":
        return any(graph.constant(name) is not None for name in node.input)  # no integer product without two scales
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    return node.op_type in _EXACT + _FLOAT


def needless_relus(graph: OnnxGraph, grids: Mapping[str, FileGrid]) -> Set[str]:
    """Outputs of ReLUs behind a sum, of which the grid has no negative levels: rounding to it does the same."""
    found = set()
    for node in graph.nodes:
        made = graph.producer.get(node.input[0]) if node.op_type == "Relu" else None
        is_sum = made is not None and made.op_type in ("Add", "Concat") and all(
            graph.constant(name) is None for name in made.input)
        grid = grids.get(node.output[0])
        if is_sum and grid is not None and grid.lower >= 0 and not grid.is_symmetric and graph.only_consumer(
                node.input[0]) is not None:
            found.add(str(node.output[0]))
    return found


def without_relus(model: onnx.ModelProto, outputs: Collection[str]) -> onnx.ModelProto:
    """The model without some of its ReLUs; ``model`` is left as it is."""
    graph = OnnxGraph(model)
    for name in outputs:
        node = graph.producer[name]
        made = graph.producer[node.input[0]]
        graph.replace([node], [])
        made.output[0] = name
        graph.refresh()
    return graph.model()
