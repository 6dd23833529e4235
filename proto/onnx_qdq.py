"""Taking over an ONNX model that another tool has quantized (QuantizeLinear and DequantizeLinear around tensors).

MNN has one positive scale per output channel for weights, with zero point 0. Activations are taken as they are, with
their zero point, where every operation around them computes exactly with one (``onnx_zero_points``). Elsewhere the
symmetric grid over the same range takes its place, with a bit less, and a remark says so.
"""
from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import onnx

from slimtrain.core import ConversionError, Coverage, Grid, PlannedCall, Quantizer, max_abs_scale, quantize, weight_grid
from slimtrain.proto.onnx_deciding import LayerWeight, TensorScale, decided_layer, planned_calls, smallest_weight_scale
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_layers import FloatLayer, Layers, find_layers, undecided
from slimtrain.proto.onnx_match import node_weight
from slimtrain.proto.onnx_normal import graph_inputs, input_dtype, input_shape, normal_form
from slimtrain.proto.onnx_observation import Arrays
from slimtrain.proto.onnx_offline import coverage_of
from slimtrain.proto.onnx_qdq_detach import detach_concats, detach_operations
from slimtrain.proto.onnx_qdq_parts import StrippedQdq, node_key, strip_qdq
from slimtrain.proto.onnx_qdq_scales import choose_scales
from slimtrain.proto.onnx_rewrite import Rewritten, rewrite
from slimtrain.proto.onnx_zero_points import needless_relus, without_relus

_WEIGHT_GRID = Grid(8, -128, 127)
_GRID_TOLERANCE = 1e-3


class ImportedQdq(NamedTuple):
    """A model taken over."""

    rewritten: Rewritten
    coverage: Coverage
    remarks: Tuple[str, ...]              #: what MNN does not represent as the file has it
    ranges: Dict[str, Tuple[float, float]]  #: of quantized tensors of the clean model


def import_qdq(model: onnx.ModelProto, keep_zero_points: bool = True) -> ImportedQdq:
    """Take a quantized model over; ``model`` is left as it is.

    A layer stays float whose weights, input or output are not quantized in the file: MNN needs the scales of all.

    Args:
        model: with QuantizeLinear and DequantizeLinear around its tensors.
        keep_zero_points: where MNN computes exactly with them; False gives all activations symmetric grids.

    Raises:
        ConversionError: the model is not of this kind, or no layer of it is quantized.
    """
    stripped = strip_qdq(model)
    graph, layers, structure, tensors, remarks = _settle(normal_form(stripped.graph.model()), stripped,
                                                         keep_zero_points)
    by_name = {layer.name: layer for layer in layers.quantized}
    weights = {layer.name: _weight(graph, layer, stripped, remarks) for layer in layers.quantized}
    decided = [decided_layer(by_name[call.layer], call, weights[call.layer], tensors)
               for call in planned_calls(structure, by_name).values()]
    remarks += _not_rounded(graph, stripped, structure)
    spans = {name: (grid.lower * grid.scale, grid.upper * grid.scale) for name, grid in stripped.ranges.items()}
    return ImportedQdq(rewrite(graph.model(), decided), coverage_of(layers.quantized, layers.left_float, graph),
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


# -- scales


class _Settled(NamedTuple):
    """Layers and scales that go together."""

    graph: OnnxGraph
    layers: Layers
    structure: Rewritten
    tensors: Dict[Quantizer, TensorScale]
    remarks: List[str]


def _settle(normal: onnx.ModelProto, stripped: StrippedQdq, keep_zero_points: bool) -> _Settled:
    """Leave in float what MNN would compute otherwise than the file has it.

    Activations that a grid makes needless are dropped, but only where that grid is the one that MNN gets.
    """
    relus = needless_relus(OnnxGraph(normal), stripped.ranges) if keep_zero_points else set()
    while True:
        model, remarks = detach_concats(without_relus(normal, relus), stripped.ranges)
        settled = _settle_layers(model, stripped, keep_zero_points)
        if keep_zero_points:
            on_grid = {name: stripped.ranges[name] for name in settled.structure.placement.on_grid
                       if name in stripped.ranges}
            model, more = detach_operations(model, on_grid)
            remarks += more
            settled = _settle_layers(model, stripped, keep_zero_points) if more else settled
        owners = settled.structure.placement.on_grid
        needed = {name for name in relus
                  if name not in owners or settled.tensors[owners[name]].grid.lower != stripped.ranges[name].lower}
        if not needed:
            return settled._replace(remarks=remarks + settled.remarks)
        relus -= needed


def _settle_layers(normal: onnx.ModelProto, stripped: StrippedQdq, keep_zero_points: bool) -> _Settled:
    """Leave layers float until both tensors of all others have a scale."""
    graph, with_weights = OnnxGraph(normal), stripped.layers()
    skipped = {layer.name: "its weights are not quantized in the file" for layer in find_layers(graph).quantized
               if node_key(graph, graph.producer[layer.tensor]) not in with_weights}
    while True:
        layers = find_layers(graph, list(skipped))
        layers.left_float.update((name, reason) for name, reason in skipped.items() if name in layers.left_float)
        structure = rewrite(normal, [undecided(layer) for layer in layers.quantized], on_grid=False)
        tensors, remarks = choose_scales(structure, stripped.ranges, keep_zero_points)
        calls = planned_calls(structure, {layer.name: layer for layer in layers.quantized}).values()
        new = {call.layer: _why(call, tensors) for call in calls if not {call.input, call.output} <= set(tensors)}
        if not new:
            return _Settled(graph, layers, structure, tensors, remarks)
        skipped.update(new)
        if len(new) == len(layers.quantized):
            raise ConversionError("no layer has both its input and its output quantized in the file: %s" % (
                "; ".join("%s: %s" % item for item in sorted(new.items())[:5])))


def _why(call: PlannedCall, tensors: Mapping[Quantizer, TensorScale]) -> str:
    sides = [side for side, owner in (("input", call.input), ("output", call.output)) if owner not in tensors]
    return "its %s is not quantized in the file" % " and ".join(sides)


def _weight(graph: OnnxGraph, layer: FloatLayer, stripped: StrippedQdq, remarks: List[str]) -> LayerWeight:
    """A layer's integers as the file has them, or chosen anew where they cannot be."""
    scales = _channel_scales(graph.producer[layer.tensor], graph, layer, stripped)
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


def _not_rounded(graph: OnnxGraph, stripped: StrippedQdq, structure: Rewritten) -> List[str]:
    """Remarks on tensors that the file rounds and MNN does not, which is more accurate but not the same."""
    gone = [name for name in stripped.ranges if name in stripped.graph.producer and name not in graph.producer]
    fused = {call.tensor: call.fused for call in structure.placement.calls}
    float_ones = [name for name, grid in stripped.ranges.items() if name not in (*structure.placement.on_grid, *gone)
                  and stripped.ranges.get(fused.get(name, "")) != grid]
    texts = (("batch norms and offsets are folded into the layers before them, without rounding in between: %s", gone),
             ("not rounded, since no quantized layer reads or writes them: %s", float_ones))
    return [text % ", ".join(names[:8] + ["..."] * (len(names) > 8)) for text, names in texts if names]


def _channel_scales(node: onnx.NodeProto, graph: OnnxGraph, layer: FloatLayer,
                    stripped: StrippedQdq) -> Optional[np.ndarray]:
    """The scales of a weight in the file, float32 [O], with what was folded into it since.

    None where it has none, or not one per output channel.
    """
    layers = [known for known in stripped.graph.nodes if len(known.input) > 1 and known.input[1] in stripped.weights]
    same = [known for known in layers if known.input[1] == node.input[1]]
    same = same or [known for known in layers if node_key(stripped.graph, known) == node_key(graph, node)]
    before = node_weight(stripped.graph, same[0]) if len({known.input[1] for known in same}) == 1 else None
    if before is None:
        return None
    own = same[0]
    scales = stripped.weights[own.input[1]]
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        scales = scales.T
    rows = scales.reshape(len(scales), -1)
    if not np.array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape)):
        return None
    size = np.maximum(np.abs(before.astype(np.float64)).reshape(len(rows), -1).max(axis=1), np.finfo(np.float32).tiny)
    factor = np.abs(layer.weight.astype(np.float64)).reshape(len(rows), -1).max(axis=1) / size
    folded = np.where(factor > 0, factor, 1.0) if np.abs(factor - 1).max() > _GRID_TOLERANCE else 1.0
    return np.array(rows[:, 0] * folded, dtype=np.float32)
