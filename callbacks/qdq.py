"""A standard quantized ONNX file (QuantizeLinear / DequantizeLinear), which onnxruntime runs in int8.

MNN does not read this form as int8; it is for every other runtime. Rounding of exact ties differs: QuantizeLinear
rounds half to even.
"""
from __future__ import annotations

import os
from typing import Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import onnx
from onnx import helper

from slimtrain.core import Grid, write_whole
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_match import match_layers, node_weight
from slimtrain.proto.onnx_rewrite import fused_output

PathLike = Union[str, "os.PathLike[str]"]

# per-channel DequantizeLinear came with this operator set
_SMALLEST_OPSET = 13


class _Step(NamedTuple):
    scale: float
    grid: Grid


def write_qdq(source: PathLike, layers: Sequence[DeployedLayer], target: PathLike) -> None:
    """Write a QDQ version of an exported (rewritten) model.

    Args:
        source: the ONNX file written by ``export``.
        layers: the layers it holds.
        target: the file to write.

    Raises:
        ValueError: the operator set of ``source`` is older than 13.
    """
    graph = OnnxGraph(onnx.load(os.fspath(source)))
    if graph.opset < _SMALLEST_OPSET:
        raise ValueError("a quantized ONNX file needs opset %d or later, %s has %d" % (
            _SMALLEST_OPSET, os.fspath(source), graph.opset))
    steps: Dict[str, _Step] = {}
    for match in match_layers(graph, layers):
        layer, node = match.layer, match.node
        _dequantize_weight(graph, layer, node)
        steps.setdefault(node.input[0], _Step(layer.input_scale, layer.input_grid))
        steps[fused_output(graph, node.output[0])] = _Step(layer.output_scale, layer.output_grid)
    for name, step in steps.items():
        _quantize_tensor(graph, name, step)
    model = graph.model()
    onnx.checker.check_model(model)
    write_whole(target, model.SerializeToString(deterministic=True))


def _dequantize_weight(graph: OnnxGraph, layer: DeployedLayer, node: onnx.NodeProto) -> None:
    weight = node_weight(graph, node)
    assert weight is not None
    levels = layer.levels.astype(np.int8).reshape(weight.shape)
    names = [graph.add_constant(levels, layer.name + ".levels"),
             graph.add_constant(layer.weight_scales, layer.name + ".scales"),
             graph.add_constant(np.zeros(len(levels), np.int8), layer.name + ".zero")]
    output = graph.new_name(layer.name + "/weight")
    made = helper.make_node("DequantizeLinear", names, [output], axis=0)
    node.input[1] = output
    graph.nodes.insert(0, made)
    graph.refresh()


def _quantize_tensor(graph: OnnxGraph, name: str, step: _Step) -> None:
    """Put a tensor on its grid for all its readers; the name goes to the quantized tensor of an output of the graph."""
    before = graph.new_name(name + "/float") if name in graph.outputs else name
    after = name if name in graph.outputs else graph.new_name(name + "/quantized")
    if before != name:
        producer = graph.producer[name]
        producer.output[list(producer.output).index(name)] = before
    else:
        for node in graph.consumers.get(name, []):
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = after
    nodes, quantized = _clip(graph, before, step)
    scale = graph.add_constant(np.float32(step.scale), name + ".scale")
    zero = graph.add_constant(np.int8(0), name + ".zero")
    middle = graph.new_name(name + "/levels")
    nodes += [helper.make_node("QuantizeLinear", [quantized, scale, zero], [middle]),
              helper.make_node("DequantizeLinear", [middle, scale, zero], [after])]
    position = next((index + 1 for index, node in enumerate(graph.nodes) if before in node.output), 0)
    graph.nodes[position:position] = nodes
    graph.refresh()


def _clip(graph: OnnxGraph, name: str, step: _Step) -> Tuple[List[onnx.NodeProto], str]:
    """QuantizeLinear only knows the range of int8; any other is clipped before it."""
    if (step.grid.lower, step.grid.upper) == (-128, 127):
        return [], name
    bounds = [graph.add_constant(np.float32(level * step.scale), "%s.%s" % (name, end))
              for level, end in ((step.grid.lower, "lower"), (step.grid.upper, "upper"))]
    clipped = graph.new_name(name + "/clipped")
    return [helper.make_node("Clip", [name, *bounds], [clipped])], clipped
