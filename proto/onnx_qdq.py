"""Taking over an ONNX model that another tool has quantized (QuantizeLinear and DequantizeLinear around tensors).

MNN computes with symmetric levels: int8 with zero point 0 for activations, one positive scale per output channel for
weights. Where the file has such a grid it is taken as it is; where it has another (unsigned activations, zero points)
the symmetric grid over the same range takes its place, and a remark says so.
"""
from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from slimtrain.core import ConversionError, Coverage, Grid, PlannedCall, Quantizer, max_abs_scale, quantize, weight_grid
from slimtrain.proto.onnx_deciding import LayerWeight, TensorScale, decided_layer, planned_calls, smallest_weight_scale
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_layers import FloatLayer, Layers, find_layers, undecided
from slimtrain.proto.onnx_normal import graph_inputs, input_dtype, input_shape, normal_form
from slimtrain.proto.onnx_observation import Arrays
from slimtrain.proto.onnx_offline import coverage_of
from slimtrain.proto.onnx_rewrite import Rewritten, rewrite

_NON_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp")
_WEIGHT_GRID = Grid(8, -128, 127)
_GRID_TOLERANCE = 1e-3


class ImportedQdq(NamedTuple):
    """A model taken over."""

    rewritten: Rewritten
    coverage: Coverage
    remarks: Tuple[str, ...]              #: what MNN does not represent as the file has it
    ranges: Dict[str, Tuple[float, float]]  #: of quantized tensors of the clean model


class _Range(NamedTuple):
    """The grid of an activation in the file."""

    scale: float
    lower: int   #: smallest level, after the zero point
    upper: int

    def symmetric(self) -> TensorScale:
        """The grid in MNN: the same, or the symmetric one over the same range."""
        if self.is_exact:
            return TensorScale(self.scale, Grid(8, self.lower, self.upper))
        return TensorScale(float(np.float32(max(-self.lower, self.upper) * self.scale / 127)), Grid(8, -127, 127))

    @property
    def is_exact(self) -> bool:
        return self.lower >= -128 and self.upper <= 127


class _Stripped(NamedTuple):
    """The float model without its Q and DQ nodes."""

    graph: OnnxGraph
    ranges: Dict[str, _Range]                  #: tensor -> grid
    weights: Dict[str, np.ndarray]             #: name of a weight -> its scales, broadcast against it
    remarks: List[str]

    def layers(self) -> Set[Tuple[str, str, int]]:
        """Nodes with a quantized weight, by what folding does not change."""
        return {_key(self.graph, node) for node in self.graph.nodes
                if len(node.input) > 1 and node.input[1] in self.weights}


def _key(graph: OnnxGraph, node: onnx.NodeProto) -> Tuple[str, str, int]:
    weight = graph.constant(node.input[1])
    return str(node.name), str(node.input[0]), 0 if weight is None else int(weight.size)


def import_qdq(model: onnx.ModelProto) -> ImportedQdq:
    """Take a quantized model over; ``model`` is left as it is.

    A layer stays float whose weights, input or output are not quantized in the file: MNN needs the scales of all.

    Raises:
        ConversionError: the model is not of this kind, or no layer of it is quantized.
    """
    stripped = _strip(model)
    normal = normal_form(stripped.graph.model())
    graph = OnnxGraph(normal)
    layers, structure, tensors, remarks = _settle(normal, graph, stripped)
    by_name = {layer.name: layer for layer in layers.quantized}
    weights = {layer.name: _weight(graph, layer, stripped.weights, remarks) for layer in layers.quantized}
    decided = [decided_layer(by_name[call.layer], call, weights[call.layer], tensors)
               for call in planned_calls(structure, by_name).values()]
    spans = {name: (grid.lower * grid.scale, grid.upper * grid.scale) for name, grid in stripped.ranges.items()}
    return ImportedQdq(rewrite(normal, decided), coverage_of(layers.quantized, layers.left_float, graph),
                       tuple(stripped.remarks + remarks), spans)


def random_example(model: onnx.ModelProto, imported: ImportedQdq, seed: int = 0) -> Arrays:
    """Random inputs within the ranges of the file, two samples where the model lets it."""
    generator = np.random.RandomState(seed)
    example = {}
    for value in graph_inputs(model):
        shape = [size or 2 for size in input_shape(value)]
        low, high = imported.ranges.get(value.name, (-1.0, 1.0))
        numbers = np.clip(generator.normal(size=shape) * max(-low, high) / 3, low, high)
        example[value.name] = numbers.astype(input_dtype(value))
    return example


# -- the float model inside


def _strip(model: onnx.ModelProto) -> _Stripped:
    graph = OnnxGraph(model)
    result = _Stripped(graph, {}, {}, [])
    found = [node for node in graph.nodes if node.op_type == "DequantizeLinear"]
    if not found:
        raise ConversionError("the model has no DequantizeLinear: it is not quantized in this form")
    for node in found:
        if graph.constant(node.input[0]) is not None:
            _dequantize_constant(result, node)
        else:
            _drop_pair(result, node)
    left = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    if left:
        graph.replace(left, [])
    _restore_activations(result)
    return result


def _numbers(graph: OnnxGraph, node: onnx.NodeProto) -> Tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a Q or DQ node, float64 and int64."""
    scale = graph.constant(node.input[1])
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, np.uint8)
    if scale is None or zero is None:
        raise ConversionError("the scale of %s is computed by the model; MNN needs constant scales" % node.input[0])
    return scale.astype(np.float64), zero


def _dequantize_constant(stripped: _Stripped, node: onnx.NodeProto) -> None:
    graph = stripped.graph
    levels = graph.constant(node.input[0])
    assert levels is not None
    scale, zero = _numbers(graph, node)
    if scale.size > 1:
        shape = [1] * levels.ndim
        shape[int(attribute(node, "axis", 1))] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    whole = levels.astype(np.int64) - zero.astype(np.int64)
    name = node.output[0]
    graph.replace([node], [])
    graph.initializers[name] = numpy_helper.from_array((whole * scale).astype(np.float32), name)
    stripped.weights[name] = np.broadcast_to(scale.astype(np.float32), levels.shape)


def _drop_pair(stripped: _Stripped, node: onnx.NodeProto) -> None:
    graph = stripped.graph
    quantize_node = graph.producer.get(node.input[0])
    if quantize_node is None or quantize_node.op_type != "QuantizeLinear":
        raise ConversionError("%s is dequantized but not quantized by the model itself: expected QuantizeLinear before "
                              "DequantizeLinear" % node.input[0])
    scale, zero = _numbers(graph, node)
    if scale.size != 1:
        raise ConversionError("the activation %s has a scale per channel, MNN has one per tensor" % node.input[0])
    limits = np.iinfo(zero.dtype)
    source, level = str(quantize_node.input[0]), int(zero.reshape(-1)[0])
    stripped.ranges[source] = _Range(float(scale.reshape(-1)[0]), limits.min - level, limits.max - level)
    output = str(node.output[0])
    for reader in graph.consumers.get(output, []):
        for index, read in enumerate(reader.input):
            if read == output:
                reader.input[index] = source
    if output not in graph.outputs:
        graph.replace([node], [])
        return
    producer = graph.producer.get(source)
    if producer is None or source in graph.outputs:
        graph.replace([node], [helper.make_node("Identity", [source], [output])])
        return
    graph.replace([node], [])
    for other in graph.nodes:
        other.input[:] = [output if read == source else read for read in other.input]
        other.output[:] = [output if made == source else made for made in other.output]
    graph.refresh()
    stripped.ranges[output] = stripped.ranges.pop(source)


def _restore_activations(stripped: _Stripped) -> None:
    """Tools drop a ReLU where the grid behind it begins at zero; a symmetric grid needs it back."""
    graph = stripped.graph
    sources = {value.name for value in graph_inputs(graph.model())}
    for name, grid in list(stripped.ranges.items()):
        producer = graph.producer.get(name)
        if grid.lower < 0 or producer is None or producer.op_type in _NON_NEGATIVE:
            if grid.lower >= 0 and name in sources:
                stripped.remarks.append("the input %s is cut off below zero in the file, here it is not" % name)
            continue
        if producer.op_type not in ("Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "Sub", "Mul"):
            continue  # what selects, moves or averages values cannot make negative ones of positive ones
        output = graph.new_name(name + "/relu")
        graph.insert_behind(name, [helper.make_node("Relu", [name], [output])], output)
        if name not in graph.outputs:
            stripped.ranges[output] = stripped.ranges.pop(name)


# -- scales


def _settle(normal: onnx.ModelProto, graph: OnnxGraph, stripped: _Stripped) -> Tuple[
        Layers, Rewritten, Dict[Quantizer, TensorScale], List[str]]:
    """Leave layers float until both tensors of all others have a scale."""
    with_weights = stripped.layers()
    skipped = {layer.name: "its weights are not quantized in the file" for layer in find_layers(graph).quantized
               if _key(graph, graph.producer[layer.tensor]) not in with_weights}
    while True:
        layers = find_layers(graph, list(skipped))
        layers.left_float.update((name, reason) for name, reason in skipped.items() if name in layers.left_float)
        structure = rewrite(normal, [undecided(layer) for layer in layers.quantized], on_grid=False)
        tensors, remarks = _scales(structure, stripped.ranges)
        calls = planned_calls(structure, {layer.name: layer for layer in layers.quantized}).values()
        new = {call.layer: _why(call, tensors) for call in calls if not {call.input, call.output} <= set(tensors)}
        if not new:
            return layers, structure, tensors, remarks
        skipped.update(new)
        if len(new) == len(layers.quantized):
            raise ConversionError("no layer has both its input and its output quantized in the file: %s" % (
                "; ".join("%s: %s" % item for item in sorted(new.items())[:5])))


def _why(call: PlannedCall, tensors: Mapping[Quantizer, TensorScale]) -> str:
    sides = [side for side, owner in (("input", call.input), ("output", call.output)) if owner not in tensors]
    return "its %s is not quantized in the file" % " and ".join(sides)


def _scales(structure: Rewritten, ranges: Mapping[str, _Range]) -> Tuple[Dict[Quantizer, TensorScale], List[str]]:
    found: Dict[Quantizer, Dict[str, _Range]] = {}
    for name, owner in structure.placement.on_grid.items():
        if name in ranges:
            found.setdefault(owner, {})[name] = ranges[name]
    tensors, remarks, widened = {}, [], []
    for owner, grids in found.items():
        widest = max(grids.values(), key=lambda grid: max(-grid.lower, grid.upper) * grid.scale)
        tensors[owner] = widest.symmetric()
        if len(set(grids.values())) > 1:
            remarks.append("%s share one scale in MNN, in the file they have %d" % (
                ", ".join(sorted(grids)), len(set(grids.values()))))
        if not widest.is_exact:
            widened.append(min(grids))
    if widened:
        remarks.append("%d activations have unsigned levels or a zero point in the file; MNN gets the symmetric grid "
                       "over the same range, whose steps are up to twice as wide: %s" % (
                           len(widened), ", ".join(widened[:8]) + ("..." if len(widened) > 8 else "")))
    used: Set[Quantizer] = set(structure.placement.quantizers.values())
    return {owner: value for owner, value in tensors.items() if owner in used}, remarks


def _weight(graph: OnnxGraph, layer: FloatLayer, known: Mapping[str, np.ndarray],
            remarks: List[str]) -> LayerWeight:
    """A layer's integers as the file has them, or chosen anew where they cannot be."""
    scales = _channel_scales(graph, layer, known)
    if scales is not None:
        levels = layer.weight / scales.reshape((-1,) + (1,) * (layer.weight.ndim - 1)).astype(np.float64)
        whole = np.round(levels)
        usable = (scales >= smallest_weight_scale(layer)).all() and np.abs(levels - whole).max() < _GRID_TOLERANCE
        if usable and whole.min() >= _WEIGHT_GRID.lower and whole.max() <= _WEIGHT_GRID.upper:
            return LayerWeight(whole.astype(np.int32), scales, layer.bias, _WEIGHT_GRID)
    grid = weight_grid(8)
    remarks.append("the weights of %s are on no symmetric int8 grid in the file; they are rounded anew" % layer.name)
    fresh = np.maximum(max_abs_scale(layer.weight, grid, axis=0), smallest_weight_scale(layer))
    return LayerWeight(quantize(layer.weight, fresh, grid, axis=0), fresh, layer.bias, grid)


def _channel_scales(graph: OnnxGraph, layer: FloatLayer, known: Mapping[str, np.ndarray]) -> Optional[np.ndarray]:
    """The scales of a weight in the file, float32 [O]; None where it has none, or not one per output channel."""
    node = graph.producer[layer.tensor]
    scales = known.get(node.input[1])
    if scales is None:
        return None
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        scales = scales.T
    rows = scales.reshape(len(scales), -1)
    return np.array(rows[:, 0]) if np.array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape)) else None
