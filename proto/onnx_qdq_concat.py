"""Concatenations of a quantized ONNX file whose inputs are on other grids than their result.

In MNN all of them share one scale, so that a tensor that others read too would be on the wide grid of the result for
these as well, and one that only the concatenation reads would be rounded once instead of twice. An input on another
grid is therefore detached: doubled and halved, which is exact, and which descriptions do not spread through. MNN then
puts it on the grid of the result from floats, as the file says.
"""
from __future__ import annotations

from typing import List, Mapping, Optional, Tuple

import numpy as np
import onnx
from onnx import helper

from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_qdq_parts import FileGrid

_MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Identity", "Dropout")


def detach_concat_inputs(model: onnx.ModelProto, grids: Mapping[str, FileGrid]) -> Tuple[onnx.ModelProto, List[str]]:
    """The model with concatenations of one grid each, and a remark for every input that was detached.

    Args:
        model: a float model in normal form, left as it is.
        grids: those of the file, by tensor.
    """
    graph, remarks = OnnxGraph(model), []
    for node in [node for node in graph.nodes if node.op_type == "Concat"]:
        inputs = {name: _grid_before(graph, name, grids) for name in node.input}
        result = _grid_behind(graph, node.output[0], grids)
        known = {grid for grid in inputs.values() if grid is not None}
        if result is None and len(known) < 2:
            continue
        others = [name for name, grid in inputs.items() if grid is not None and grid != result]
        for name in others:
            _detach(graph, node, name)
        if others:
            remarks.append("the concatenation %s has another grid in the file than %s, which MNN puts on it in float"
                           % (node.output[0], ", ".join(others)))
    return graph.model(), remarks


def _detach(graph: OnnxGraph, node: onnx.NodeProto, name: str) -> None:
    doubled, detached = graph.new_name(name + "/doubled"), graph.new_name(name + "/detached")
    two, half = (graph.add_constant(np.asarray(value, np.float32), "factor") for value in (2.0, 0.5))
    node.input[:] = [detached if read == name else read for read in node.input]
    graph.replace([node], [helper.make_node("Mul", [name, two], [doubled], name=doubled),
                           helper.make_node("Mul", [doubled, half], [detached], name=detached), node])


def _grid_before(graph: OnnxGraph, name: str, grids: Mapping[str, FileGrid]) -> Optional[FileGrid]:
    """The grid of a tensor, or that of the tensor it was moved from."""
    while name not in grids:
        node = graph.producer.get(name)
        if node is None or node.op_type not in _MOVES:
            return None
        name = str(node.input[0])
    return grids[name]


def _grid_behind(graph: OnnxGraph, name: str, grids: Mapping[str, FileGrid]) -> Optional[FileGrid]:
    """The grid of a tensor, or that of the tensor it is moved to."""
    while name not in grids:
        node = graph.only_consumer(name)
        if node is None or node.op_type not in _MOVES:
            return None
        name = str(node.output[0])
    return grids[name]
