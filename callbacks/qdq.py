"""A standard quantized ONNX file (QuantizeLinear / DequantizeLinear), which onnxruntime runs in int8.

MNN does not read this form as int8; it is for every other runtime. Rounding of exact ties differs: QuantizeLinear
rounds half to even, and biases are whole numbers of the accumulator in every layer.
"""
from __future__ import annotations

import logging
import os
from typing import Dict, List, NamedTuple, Sequence, Union

import numpy as np
import onnx
from onnx import helper

from slimtrain.core import Grid, write_whole
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_match import match_layers, node_weight
from slimtrain.proto.onnx_rewrite import fused_output

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

# per-channel DequantizeLinear came with this operator set
_SMALLEST_OPSET = 13
# levels are stored unsigned, this one standing for zero: products of signed and unsigned bytes saturate on older x86
_ZERO = 128


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
        _dequantize_constants(graph, layer, node)
        steps.setdefault(node.input[0], _Step(layer.input_scale, layer.input_grid))
        grid = layer.output_grid
        if _drop_activation(graph, node):
            grid = grid._replace(lower=max(grid.lower, 0))
        steps[node.output[0]] = _Step(layer.output_scale, grid)
    for name, step in steps.items():
        _quantize_tensor(graph, name, step)
    model = graph.model()
    onnx.checker.check_model(model)
    write_whole(target, model.SerializeToString(deterministic=True))


def _dequantize_constants(graph: OnnxGraph, layer: DeployedLayer, node: onnx.NodeProto) -> None:
    """Write weight and bias as integers; a runtime computes on integers only where both are."""
    weight = node_weight(graph, node)
    assert weight is not None
    levels = (layer.levels + _ZERO).astype(np.uint8).reshape(weight.shape)
    node.input[1] = _dequantized(graph, layer.name + "/weight", levels, layer.weight_scales, np.uint8(_ZERO))
    if layer.bias is not None:
        units = np.float32(layer.input_scale) * layer.weight_scales
        sums = np.rint(layer.bias.astype(np.float64) / units)
        if np.abs(sums).max() <= np.iinfo(np.int32).max:
            node.input[2] = _dequantized(graph, layer.name + "/bias", sums.astype(np.int32), units, np.int32(0))
        else:
            logger.warning("the bias of layer %r does not fit 32 bits at these scales: it stays float, and the layer "
                           "is computed in float", layer.name)
    graph.refresh()


def _dequantized(graph: OnnxGraph, name: str, levels: np.ndarray, scales: np.ndarray, zero: np.generic) -> str:
    names = [graph.add_constant(levels, name + ".levels"), graph.add_constant(scales, name + ".scales"),
             graph.add_constant(np.full(len(levels), zero), name + ".zero")]
    output = graph.new_name(name)
    graph.nodes.insert(0, helper.make_node("DequantizeLinear", names, [output], axis=0))
    return output


def _drop_activation(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Take the activation off a layer: the integers that its output is clipped to hold what it does."""
    fused = fused_output(graph, node.output[0])
    if fused == node.output[0]:
        return False
    graph.replace([graph.producer[fused]], [])
    node.output[0] = fused
    graph.refresh()
    return True


def _quantize_tensor(graph: OnnxGraph, name: str, step: _Step) -> None:
    """Put a tensor on its grid for all its readers; the name goes to the quantized tensor of an output of the graph."""
    before = graph.new_name(name + "/float") if name in graph.outputs else name
    after = name if name in graph.outputs else graph.new_name(name + "/quantized")
    if before != name:
        producer = graph.producer[name]
        producer.output[list(producer.output).index(name)] = before
    for node in graph.consumers.get(name, []):
        node.input[:] = [after if read == name else read for read in node.input]
    nodes = _grid_nodes(graph, before, after, step)
    position = next((index + 1 for index, node in enumerate(graph.nodes) if before in node.output), 0)
    graph.nodes[position:position] = nodes
    graph.refresh()


def _grid_nodes(graph: OnnxGraph, before: str, after: str, step: _Step) -> List[onnx.NodeProto]:
    """Quantize and dequantize; a narrower range than that of 8 bits is clipped between two such pairs.

    A runtime replaces a layer by an integer one where dequantization stands right before it and quantization right
    behind it, so the clip must not touch the layer.
    """
    scale = graph.add_constant(np.array(step.scale, np.float32), before + ".scale")
    zero = graph.add_constant(np.array(_ZERO, np.uint8), before + ".zero")

    def pair(source: str, target: str) -> List[onnx.NodeProto]:
        levels = graph.new_name(source + "/levels")
        return [helper.make_node("QuantizeLinear", [source, scale, zero], [levels]),
                helper.make_node("DequantizeLinear", [levels, scale, zero], [target])]

    if (step.grid.lower, step.grid.upper) == (-128, 127):
        return pair(before, after)
    bounds = [graph.add_constant(np.array(np.float32(level) * np.float32(step.scale)), "%s.%s" % (before, end))
              for level, end in ((step.grid.lower, "lower"), (step.grid.upper, "upper"))]
    wide, clipped = graph.new_name(before + "/wide"), graph.new_name(before + "/clipped")
    return [*pair(before, wide), helper.make_node("Clip", [wide, *bounds], [clipped]), *pair(clipped, after)]
