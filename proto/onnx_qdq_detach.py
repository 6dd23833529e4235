"""Keeping the grids of a quantized ONNX file where MNN would mix them up, by leaving operations in float.

A tensor is detached by doubling and halving it, which is exact and which descriptions do not spread through: MNN
computes what lies behind in float, from what the tensor holds on its own grid.

All that a concatenation joins shares one scale in MNN: a tensor that others read too would be on the wide grid of the
result for these as well, and one that only the concatenation reads would be rounded once instead of twice. Inputs on
another grid than the result are detached; MNN puts them on that of the result, as the file says.

Operations that MNN may run on integers as if there were no zero point are detached on all sides.
"""
from __future__ import annotations

from typing import List, Mapping, Optional, Tuple

import numpy as np
import onnx
from onnx import helper

from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_placement import is_fusable
from slimtrain.proto.onnx_qdq_parts import FileGrid
from slimtrain.proto.onnx_zero_points import computes_with_zero_points

_MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Identity", "Dropout")
_LAYERS = ("Conv", "Gemm", "MatMul")
# kept in float wherever they stand (``onnx_exactness``)
_ISLANDS = ("AveragePool", "Max", "Min", "Resize")


def detach_concats(model: onnx.ModelProto, grids: Mapping[str, FileGrid]) -> Tuple[onnx.ModelProto, List[str]]:
    """The model with concatenations of one grid each, and a remark for each that has detached inputs.

    Args:
        model: a float model in normal form, left as it is.
        grids: those of the file, by tensor.
    """
    graph, remarks = OnnxGraph(model), []
    for node in [node for node in graph.nodes if node.op_type == "Concat"]:
        inputs = {str(name): _grid_before(graph, name, grids) for name in node.input}
        result = _grid_behind(graph, node.output[0], grids)
        known = {grid for grid in inputs.values() if grid is not None}
        if result is None and len(known) < 2:
            continue
        others = [name for name, grid in inputs.items() if grid is not None and grid != result]
        for name in others:
            _detach_input(graph, node, name)
        if others:
            remarks.append("the concatenation %s has another grid in the file than %s, which MNN puts on it in float"
                           % (node.output[0], ", ".join(others)))
    return graph.model(), remarks


def detach_operations(model: onnx.ModelProto, grids: Mapping[str, FileGrid]) -> Tuple[onnx.ModelProto, List[str]]:
    """The model with operations detached that may read or write a zero point that MNN overlooks, and a remark.

    Args:
        model: a float model in normal form, left as it is.
        grids: those of the file, by tensor, as far as MNN puts the tensor on a grid.
    """
    graph, names = OnnxGraph(model), []
    for node in list(graph.nodes):
        if computes_with_zero_points(graph, node) or node.op_type in _ISLANDS or _is_fused(graph, node):
            continue
        inputs = [str(name) for name in dict.fromkeys(node.input) if name and graph.constant(name) is None]
        around = [_grid_before(graph, name, grids) for name in inputs]
        around += [_grid_behind(graph, name, grids) for name in node.output]
        if any(grid is not None and not grid.is_symmetric for grid in around):
            for name in inputs:
                _detach_input(graph, node, name)
            for index in range(len(node.output)):
                _detach_output(graph, node, index)
            names.append("%s of %s" % (node.op_type, ", ".join(inputs)))
    remark = "computed in float, since MNN may overlook the zero points around them: %s" % ", ".join(names)
    return graph.model(), [remark] if names else []


def _is_fused(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether a layer computes an activation with it."""
    if not is_fusable(graph, node) or graph.only_consumer(node.input[0]) is None:
        return False
    made = graph.producer.get(node.input[0])
    if made is not None and made.op_type == "Add":  # the bias of a MatMul
        made = _multiplied(graph, made)
    return made is not None and made.op_type in _LAYERS


def _multiplied(graph: OnnxGraph, addition: onnx.NodeProto) -> Optional[onnx.NodeProto]:
    """The MatMul that an addition gives a constant bias."""
    if all(graph.constant(name) is None for name in addition.input):
        return None
    made = next((graph.producer[name] for name in addition.input if name in graph.producer), None)
    return made if made is not None and made.op_type == "MatMul" else None


def _detach_input(graph: OnnxGraph, node: onnx.NodeProto, name: str) -> None:
    detached = graph.new_name(name + "/detached")
    products = _products(graph, name, detached)
    node.input[:] = [detached if read == name else read for read in node.input]
    graph.replace([node], [*products, node])


def _detach_output(graph: OnnxGraph, node: onnx.NodeProto, index: int) -> None:
    name = str(node.output[index])
    node.output[index] = graph.new_name(name + "/attached")
    graph.replace([node], [node, *_products(graph, node.output[index], name)])


def _products(graph: OnnxGraph, source: str, target: str) -> List[onnx.NodeProto]:
    two, half = (graph.add_constant(np.asarray(value, np.float32), "factor") for value in (2.0, 0.5))
    doubled = graph.new_name(source + "/doubled")
    return [helper.make_node("Mul", [source, two], [doubled], name=doubled),
            helper.make_node("Mul", [doubled, half], [target], name=target)]


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
