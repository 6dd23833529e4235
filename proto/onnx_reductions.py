"""Norms and logarithms of sums, written with operations that MNN's converter reads as they are meant."""
from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np
import onnx
from onnx import helper

from slimtrain.proto.onnx_graph import OnnxGraph, attribute

# what stands before and behind the sum; a square is a product with itself
_RECIPES: Dict[str, Tuple[str, str]] = {
    "ReduceL1": ("Abs", ""), "ReduceL2": ("Mul", "Sqrt"), "ReduceSumSquare": ("Mul", ""), "ReduceLogSum": ("", "Log"),
    "ReduceLogSumExp": ("Exp", "Log"),
}
# from here on the axes of a sum are an input
_AXES_INPUT = 13


def is_misread_reduction(node: onnx.NodeProto) -> bool:
    """Whether MNN 3.6 reduces all axes instead of those named: it looks for them in an attribute only."""
    return node.op_type in _RECIPES and (len(node.input) > 1 or attribute(node, "keepdims") is None)


def write_reductions(graph: OnnxGraph) -> List[str]:
    """Write such reductions as a sum and what belongs before and behind it; returns a sentence for each."""
    found = [node for node in graph.nodes if is_misread_reduction(node)]
    for node in found:
        graph.replace([node], _as_sum(graph, node))
    return ["wrote %s %s as a sum" % (node.op_type, node.output[0]) for node in found]


def _as_sum(graph: OnnxGraph, node: onnx.NodeProto) -> List[onnx.NodeProto]:
    before, behind = _RECIPES[node.op_type]
    (source, *axes), output, new = list(node.input), node.output[0], []
    if before:
        made = graph.new_name(output + "/terms")
        new.append(helper.make_node(before, [source] * (2 if before == "Mul" else 1), [made], name=made))
        source = made
    options = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if "axes" in options and graph.opset >= _AXES_INPUT:
        axes = [graph.add_constant(np.array(options.pop("axes"), np.int64), output + "/axes")]
    total = graph.new_name(output + "/sum") if behind else output
    new.append(helper.make_node("ReduceSum", [source, *axes], [total], name=total, **options))
    if behind:
        new.append(helper.make_node(behind, [total], [output], name=output))
    return new
