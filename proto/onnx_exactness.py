"""Making MNN compute what is simulated, whichever operations it chooses to run on integers.

MNN runs an operation on integers when all the tensors around it are described, and a few of its integer kernels are
not those of the float operation (measured on MNN 3.6): average pools round down, max pools compare signed levels as
unsigned ones, interpolation, the larger of two tensors, a sign and its loss mix up scales, a batch norm that no layer
takes in is ruined when the input's size changes, and a ReLU on its own forgets the last values of a tensor. Activations
also spread the scale of what they read to what they make, and the other way round. An *island* keeps such an operation
in float: its inputs are doubled and its result is halved, which is exact, and descriptions do not spread through a
product.

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
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu")
# constants that double with what is read: bounds; offset and mean; what is compared
_DOUBLED = {"Clip": slice(1, 3), "BatchNormalization": slice(2, 4), "Max": slice(None), "Min": slice(None)}
_GRID_NODE = "on_grid/"


class Step:
    """Scale and integer levels of a tensor."""

    def __init__(self, scale: float, grid: Grid) -> None:
        self.scale = np.float32(scale)
        self.grid = grid


# -- islands


def make_islands(graph: OnnxGraph, placement: Placement, steps: Mapping[Quantizer, Step], changes: List[str]) -> None:
    """Keep every operation in float that MNN computes differently on integers, and write offsets as it reads them."""
    results = {name for call in placement.calls for name in (call.tensor, call.fused)}
    for node in {id(node): node for node in (*added_offsets(graph), *_moved_offsets(graph, results))}.values():
        _write_difference(graph, node)
        changes.append("wrote the sum %s as a difference: MNN may add it to the layer's bias" % node.output[0])
    # max pools compare stored levels as unsigned numbers, which orders those of one sign and without a zero point
    ordered = {owner for owner in placement.non_negative
               if owner not in steps or not stored_zero_point(steps[owner].grid)}
    _put_constants_last(graph)
    described = _described(graph, placement)
    for node in list(graph.nodes):
        # the range of what a pool or an interpolation makes spreads to what it reads
        spreads = node.output[:1] if node.op_type in ("AveragePool", "Resize") else []
        inputs = [name for name in (*node.input, *spreads) if name in placement.on_grid]
        if node.op_type == "GlobalAveragePool":
            graph.replace([node], [_mean(graph, node)])
            changes.append("wrote the global average pool %s as a mean" % node.output[0])
        elif _stands_alone(graph, node, placement, described) or (
                inputs and _differs_on_integers(node, placement, ordered)):
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


def _moved_offsets(graph: OnnxGraph, results: Set[str]) -> List[onnx.NodeProto]:
    """Constants that the converter would take into the bias of a layer whose result is quantized without them."""
    return [node for node in graph.nodes if node.op_type == "Add" and any(
        graph.constant(offset) is not None and _moved_only(graph, name) in results
        for name, offset in (tuple(node.input), tuple(node.input)[::-1]))]


def _moved_only(graph: OnnxGraph, name: str) -> str:
    """The tensor whose values another holds, if nothing else reads them on the way: the converter may reorder."""
    node = graph.producer.get(name)
    while node is not None and node.op_type in _MOVES and graph.only_consumer(name) is not None:
        name = node.input[0]
        node = graph.producer.get(name)
    return name if graph.only_consumer(name) is not None else ""


def _put_constants_last(graph: OnnxGraph) -> None:
    """Write sums, differences and products with their constant behind: otherwise MNN forgets to quantize the result."""
    for node in list(graph.nodes):
        if node.op_type not in _INT8_ARITHMETIC:
            continue
        first, second = node.input
        constant = graph.constant(first)
        if constant is None or constant.size == 1 or graph.constant(second) is not None:
            continue
        if node.op_type == "Sub":
            node.op_type = "Add"
            second = graph.new_name(second + "/negative")
            graph.replace([node], [_product(graph, node.input[1], -1.0, second), node])
        node.input[:] = [second, first]
    graph.refresh()


def _differs_on_integers(node: onnx.NodeProto, placement: Placement, ordered: Set[Quantizer]) -> bool:
    if node.op_type in ("MaxPool", "GlobalMaxPool"):
        return placement.on_grid[node.input[0]] not in ordered
    if node.op_type == "Resize":
        return attribute(node, "mode", b"nearest") != b"nearest"
    if node.op_type in ("Abs", "Neg", "BatchNormalization"):
        return node.output[0] in placement.on_grid
    return node.op_type in ("AveragePool", "Max", "Min")


def _stands_alone(graph: OnnxGraph, node: onnx.NodeProto, placement: Placement, described: Set[str]) -> bool:
    """Whether an activation is an operation of its own next to a described tensor, and not one that is exact."""
    if node.op_type not in _ACTIVATIONS:
        return False
    source, result = node.input[0], node.output[0]
    if source not in placement.on_grid and result not in placement.on_grid:
        return False
    if is_fusable(graph, node):
        before = graph.producer.get(source)
        into_sum = before is not None and before.op_type in _INT8_ARITHMETIC and graph.only_consumer(source) is node
        return not into_sum and all(call.fused != result for call in placement.calls)
    # with a scale on either side that is not spread it runs in float anyway
    return node.op_type == "PRelu" or source not in described or result not in described


def _described(graph: OnnxGraph, placement: Placement) -> Set[str]:
    """The tensors that the converter itself describes: what a convolution over images reads and makes.

    Around linear layers, convolutions over series and grouped ones it moves values, and describes what is in between.
    """
    described = set()
    for call in placement.calls:
        node = graph.producer[call.tensor]
        weight, groups = graph.constant(node.input[1]), attribute(node, "group", 1)
        if weight is None or weight.ndim != 4:
            continue
        if groups == 1 or (groups == len(weight) and weight.shape[1] == 1):
            described |= {node.input[0], call.fused}
    return described


def _make_island(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    before = []
    for index, name in enumerate(list(node.input)):
        if name and graph.constant(name) is None and (index == 0 or node.op_type in ("Max", "Min")):
            doubled = graph.new_name(name + "/doubled")
            before.append(_product(graph, name, 2.0, doubled))
            node.input[index] = doubled
    for index in range(len(node.input))[_DOUBLED.get(node.op_type, slice(0))]:
        constant = graph.constant(node.input[index])
        if constant is not None:
            node.input[index] = graph.add_constant(np.asarray(constant * 2, np.float32), node.output[0] + "/constant")
    for item in node.attribute:
        if node.op_type == "Clip" and item.name in ("min", "max"):  # before operator set 11
            item.f *= 2
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
    described = _described(graph, placement)
    for name, owner in placement.quantizers.items():
        if name not in fused and not _made_on_integers(graph, name, described) and _read_in_float(graph, name, layers):
            nodes, output = _grid_nodes(graph, name, steps[owner])
            graph.insert_behind(name, nodes, output)
            changes.append("puts %s on its grid for all that read it" % name)


def _made_on_integers(graph: OnnxGraph, name: str, described: Set[str]) -> bool:
    """Whether MNN makes a tensor on integers: sums and products of described tensors, with an activation behind.

    A description that only spreads to a tensor does not always reach it: that depends on the number of samples.
    """
    node = graph.producer.get(name)
    if node is not None and is_fusable(graph, node):
        node = graph.producer.get(node.input[0])
    if node is None or node.name.startswith(_GRID_NODE):
        return node is not None
    if node.op_type == "Mul" and len(set(node.input)) == 1:
        return False  # the converter writes a square, which runs in float
    return node.op_type in _INT8_ARITHMETIC and name in described and all(each in described for each in node.input)


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
