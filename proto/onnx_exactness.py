"""Making MNN compute what is simulated, whichever operations it chooses to run on integers.

MNN runs an operation on integers when all the tensors around it are described, and a few of its integer kernels are
not those of the float operation (measured on MNN 3.6): average pools round down, max pools compare signed levels as
unsigned ones, interpolation and the larger of two tensors mix up scales. An *island* keeps such an operation in float:
its inputs are doubled and its result is halved, which is exact, and descriptions do not spread through a product.

The other way round, a tensor that a float operation makes and a quantized layer reads is on the layer's grid for that
layer only; where others read it too, it is put on the grid in the file itself.
"""
from __future__ import annotations

from typing import Dict, List, Mapping, Set

import numpy as np
import onnx
from onnx import helper

from slimtrain.core import Grid, Placement, Quantizer, stored_zero_point
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_misread import added_offsets
from slimtrain.proto.onnx_placement import is_fusable

_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
          "DepthToSpace", "SpaceToDepth", "Expand", "Dropout", "Pad", "Concat", "MaxPool")
_INT8_ARITHMETIC = ("Add", "Sub", "Mul")
_GRID_NODE = "on_grid/"


class Step:
    """Scale and integer levels of a tensor."""

    def __init__(self, scale: float, grid: Grid) -> None:
        self.scale = np.float32(scale)
        self.grid = grid


# -- islands


def make_islands(graph: OnnxGraph, placement: Placement, steps: Mapping[Quantizer, Step], changes: List[str]) -> None:
    """Keep every operation in float that MNN computes differently on integers, and write offsets as it reads them."""
    for node in added_offsets(graph):
        _write_difference(graph, node)
        changes.append("wrote the sum %s as a difference: MNN may add it before the activation" % node.output[0])
    # max pools compare stored levels as unsigned numbers, which orders those of one sign and without a zero point
    ordered = {owner for owner in placement.non_negative
               if owner not in steps or not stored_zero_point(steps[owner].grid)}
    # of which the opposite does not fit int8
    lowest = {owner for owner, step in steps.items() if step.grid.lower < -127}
    for node in list(graph.nodes):
        inputs = [name for name in node.input if name in placement.on_grid]
        if node.op_type == "GlobalAveragePool":
            graph.replace([node], [_mean(graph, node)])
            changes.append("wrote the global average pool %s as a mean" % node.output[0])
        elif _shares_its_range(graph, node, placement) or (inputs and _differs_on_integers(
                node, placement.on_grid[inputs[0]] in ordered, placement.on_grid[inputs[0]] in lowest)):
            _make_island(graph, node)
            changes.append("keeps %s %s in float" % (node.op_type, node.output[0]))


def _write_difference(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Write ``x + k`` as ``x - (-k)``, which is the same to the last bit."""
    if graph.constant(node.input[0]) is not None:
        node.input[:] = [node.input[1], node.input[0]]
    offset = graph.constant(node.input[1])
    assert offset is not None
    node.op_type = "Sub"
    node.input[1] = graph.add_constant(np.asarray(-offset, np.float32), node.input[1] + "/negative")
    graph.refresh()


def _differs_on_integers(node: onnx.NodeProto, is_ordered: bool, has_lowest: bool) -> bool:
    if node.op_type in ("MaxPool", "GlobalMaxPool"):
        return not is_ordered
    if node.op_type == "Resize":
        return attribute(node, "mode", b"nearest") != b"nearest"
    return node.op_type in ("AveragePool", "Max", "Min") or (has_lowest and node.op_type in ("Abs", "Neg"))


def _shares_its_range(graph: OnnxGraph, node: onnx.NodeProto, placement: Placement) -> bool:
    """Whether an activation of its own would spread the range of its result, without negative levels, to others."""
    if node.op_type not in ("Relu", "Clip") or not is_fusable(graph, node):
        return False
    fused = any(call.fused == node.output[0] for call in placement.calls)
    shared = len(graph.consumers.get(node.input[0], [])) > 1 or node.input[0] in graph.outputs
    return not fused and shared and node.output[0] in placement.quantizers


def _make_island(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    before = []
    for index, name in enumerate(list(node.input)):
        if name and graph.constant(name) is None and (index == 0 or node.op_type in ("Max", "Min")):
            doubled = graph.new_name(name + "/doubled")
            before.append(_product(graph, name, 2.0, doubled))
            node.input[index] = doubled
    if node.op_type in ("Clip", "Max", "Min"):
        for index in range(node.op_type == "Clip", len(node.input)):
            bound = graph.constant(node.input[index])
            if bound is not None:
                node.input[index] = graph.add_constant(np.asarray(bound * 2, np.float32), node.output[0] + "/bound")
    output = node.output[0]
    node.output[0] = graph.new_name(output + "/doubled")
    graph.replace([node], [*before, node, _product(graph, node.output[0], 0.5, output)])


def _product(graph: OnnxGraph, source: str, factor: float, output: str) -> onnx.NodeProto:
    constant = graph.add_constant(np.asarray(factor, np.float32), "factor")
    return helper.make_node("Mul", [source, constant], [output], name=output)


def _mean(graph: OnnxGraph, node: onnx.NodeProto) -> onnx.NodeProto:
    rank = len(graph.shapes().get(node.input[0], (0,) * 4))
    axes = list(range(2, rank))
    if graph.opset < 18:
        return helper.make_node("ReduceMean", [node.input[0]], [node.output[0]], axes=axes, keepdims=1)
    axes_name = graph.add_constant(np.array(axes, np.int64), "mean_axes")
    return helper.make_node("ReduceMean", [node.input[0], axes_name], [node.output[0]], keepdims=1)


# -- grids


def put_on_grid(graph: OnnxGraph, placement: Placement, steps: Mapping[Quantizer, Step], changes: List[str]) -> None:
    """Put tensors on their grid that a float operation makes, and not only quantized layers read."""
    fused = {call.fused for call in placement.calls}
    layers = {call.tensor for call in placement.calls}
    for name, owner in placement.quantizers.items():
        if name not in fused and not _made_on_integers(graph, name, placement) and _read_in_float(graph, name, layers):
            nodes, output = _grid_nodes(graph, name, steps[owner])
            graph.insert_behind(name, nodes, output)
            changes.append("puts %s on its grid for all that read it" % name)


def _made_on_integers(graph: OnnxGraph, name: str, placement: Placement) -> bool:
    """Whether MNN makes a tensor on integers: sums and products of described tensors, with an activation behind."""
    node = graph.producer.get(name)
    if node is not None and is_fusable(graph, node):
        node = graph.producer.get(node.input[0])
    if node is None or node.name.startswith(_GRID_NODE):
        return node is not None
    return node.op_type in _INT8_ARITHMETIC and all(source in placement.on_grid for source in node.input)


def _read_in_float(graph: OnnxGraph, name: str, layers: Set[str]) -> bool:
    if name in graph.outputs:
        return True
    for node in graph.consumers.get(name, []):
        if node.op_type in _MOVES or (node.op_type == "Resize" and attribute(node, "mode", b"nearest") == b"nearest"):
            if any(_read_in_float(graph, output, layers) for output in node.output):
                return True
        elif node.output[0] not in layers:
            return True
    return False


def _grid_nodes(graph: OnnxGraph, name: str, step: Step) -> tuple[List[onnx.NodeProto], str]:
    """``clip(sign(t) * floor(abs(t) + 0.5)) * scale`` with ``t = x * (1 / scale)``, as the runtime rounds."""
    values: Dict[str, float] = {"inverse": float(np.float32(1) / step.scale), "half": 0.5, "scale": float(step.scale),
                                "lower": step.grid.lower, "upper": step.grid.upper}
    constant = {key: graph.add_constant(np.asarray(value, np.float32), "%s/%s" % (name, key))
                for key, value in values.items()}
    recipe = (("Mul", (name, constant["inverse"]), "level"), ("Abs", ("level",), "size"),
              ("Add", ("size", constant["half"]), "raised"), ("Floor", ("raised",), "whole"),
              ("Sign", ("level",), "sign"), ("Mul", ("whole", "sign"), "rounded"),
              ("Clip", ("rounded", constant["lower"], constant["upper"]), "clipped"),
              ("Mul", ("clipped", constant["scale"]), "on_grid"))
    made = {made: graph.new_name("%s/%s" % (name, made)) for _, _, made in recipe}
    nodes = [helper.make_node(kind, [made.get(read, read) for read in reads], [made[output]],
                              name="%s%s/%s" % (_GRID_NODE, name, output)) for kind, reads, output in recipe]
    return nodes, made["on_grid"]
