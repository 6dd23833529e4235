"""Offline quantization of any ONNX file: observe, choose scales, put everything on its grid."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import onnx

from slimtrain.core import (
    ActivationMethod,
    Coverage,
    Grid,
    InputMoments,
    LayerCoverage,
    LayerState,
    Observation,
    Quantizer,
    WeightMethod,
    activation_grid,
    calibrated_scale,
    round_weight,
    weight_grid,
    weight_scales,
)
from slimtrain.proto.onnx_check import check_same
from slimtrain.proto.onnx_deciding import LayerWeight, TensorScale, decided_layer, planned_calls, smallest_weight_scale
from slimtrain.proto.onnx_equalization import equalize
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_layers import FloatLayer, find_layers, undecided
from slimtrain.proto.onnx_normal import graph_inputs, input_shape, normal_form
from slimtrain.proto.onnx_observation import Arrays, observe_onnx
from slimtrain.proto.onnx_rewrite import Rewritten, rewrite

_STORED_BITS = 8
# of the example that the exact, and slow, simulation computes
_SAMPLES = 4


@dataclass(frozen=True)
class OfflineSettings:
    """How an ONNX file is quantized.

    Attributes:
        method: for activations. With ``KL`` an input of the network takes its largest value, as MNN's tool has it.
        weight_method: for weights.
        bits: 2..8, for weights and activations.
        skip: names or patterns of layers that stay float.
        largest_level, largest_weight_level: clamps narrower than the bits give, 1..127; None for none.
        equalize: let layers in a row trade the ranges of their channels first.
        correct_bias: give the outputs of quantized layers their mean back.
        adaptive_rounding: round weights by what the layers compute, not to the nearest level.

    Raises:
        ValueError: bits outside 2..8, a clamp outside 1..127.
    """

    method: ActivationMethod = ActivationMethod.MSE
    weight_method: WeightMethod = WeightMethod.MSE
    bits: int = 8
    skip: Tuple[str, ...] = ()
    largest_level: Optional[int] = None
    largest_weight_level: Optional[int] = None
    equalize: bool = False
    correct_bias: bool = False
    adaptive_rounding: bool = False

    def __post_init__(self) -> None:
        activation_grid(self.bits)
        for name in ("largest_level", "largest_weight_level"):
            value = getattr(self, name)
            if value is not None and value not in range(1, 128):
                raise ValueError("%s must be 1..127, got %r" % (name, value))


class CalibratedTensor(NamedTuple):
    """What calibration saw of one scale's tensors, and what it chose."""

    name: str          #: of the layer that owns the scale
    role: str          #: "input" or "output"
    batches: int
    lowest: float
    highest: float
    scale: float
    saturated: float   #: share of the values beyond the last level


class QuantizedOnnx(NamedTuple):
    """A quantized model, before it is written."""

    rewritten: Rewritten
    coverage: Coverage                        #: every layer of the file, and why it is left float if it is
    tensors: Tuple[CalibratedTensor, ...]
    example: Arrays                           #: the first samples, to compare with


DEFAULTS = OfflineSettings()


def quantize_onnx(model: onnx.ModelProto, batches: Iterable[Arrays],
                  settings: OfflineSettings = DEFAULTS) -> QuantizedOnnx:
    """Quantize a float model from data, without training.

    Args:
        model: a float ONNX model; it is left as it is.
        batches: inputs by name; each is seen once, and none is kept but the first.
        settings: how.

    Raises:
        ValueError: there was no batch, a value is not finite, or a name in ``skip`` does not exist.
        ConversionError: the model cannot be read, rewritten or run; nothing in it can be quantized.
    """
    plain = normal_form(model)
    normal = equalize(plain) if settings.equalize else plain
    graph = OnnxGraph(normal)
    layers = find_layers(graph, settings.skip)
    structure = rewrite(normal, [undecided(layer) for layer in layers.quantized], on_grid=False)
    seen = observe_onnx(structure, batches, settings.correct_bias or settings.adaptive_rounding)
    example = _example(model, seen.first)
    check_same(model, plain, example)
    check_same(normal, structure.model, example)
    tensors = _choose_scales(structure, seen.tensors, settings)
    by_name = {layer.name: layer for layer in layers.quantized}
    decided = [decided_layer(by_name[call.layer], call,
                             _choose_weight(by_name[call.layer], seen.moments.get(output, InputMoments()), settings),
                             tensors)
               for output, call in planned_calls(structure, by_name).items()]
    return QuantizedOnnx(rewrite(normal, decided), coverage_of(layers.quantized, layers.left_float, graph),
                         _report(seen.tensors, tensors), example)


def coverage_of(quantized: Sequence[FloatLayer], left_float: Mapping[str, str], graph: OnnxGraph) -> Coverage:
    """Every layer of a file, the quantized ones first."""
    rows = [LayerCoverage(layer.name, layer.kind, int(layer.weight.size), LayerState.INT8) for layer in quantized]
    for name, reason in left_float.items():
        node = next(node for node in graph.nodes if name in (node.name, node.output[0]))
        weight = graph.constant(node.input[1])
        rows.append(LayerCoverage(name, str(node.op_type), 0 if weight is None else int(weight.size),
                                  LayerState.FLOAT, reason))
    return Coverage(tuple(rows))


def _example(model: onnx.ModelProto, first: Arrays) -> Arrays:
    """A few samples of the first batch, or all of it where the model fixes their number."""
    if any(not input_shape(value) or input_shape(value)[0] for value in graph_inputs(model)):
        return first
    return {name: value[:_SAMPLES] for name, value in first.items()}


def _choose_scales(structure: Rewritten, seen: Mapping[Quantizer, Observation],
                   settings: OfflineSettings) -> Dict[Quantizer, TensorScale]:
    """Scale and levels of each tensor; what no quantized layer reads keeps 8 bits, in which the device stores it."""
    placement = structure.placement
    read = {call.input for call in placement.calls}
    sources = {value.name for value in graph_inputs(structure.model)}
    tensors = {}
    for owner in dict.fromkeys(placement.quantizers.values()):
        names: Set[str] = {name for name, other in placement.quantizers.items() if other == owner}
        is_source = names <= sources
        positive = owner in placement.non_negative or (is_source and seen[owner].lowest >= 0)
        grid = activation_grid(settings.bits if owner in read else _STORED_BITS, signed=not positive)
        grid = _narrowed(grid, settings.largest_level)
        largest = settings.method is ActivationMethod.KL and is_source
        method = ActivationMethod.MAX_ABS if largest else settings.method
        tensors[owner] = TensorScale(calibrated_scale(seen[owner], grid, method), grid)
    return tensors


def _narrowed(grid: Grid, largest: Optional[int]) -> Grid:
    return grid if largest is None else Grid(grid.bits, max(grid.lower, -largest), min(grid.upper, largest))


def _choose_weight(layer: FloatLayer, moments: InputMoments, settings: OfflineSettings) -> LayerWeight:
    grid = _narrowed(weight_grid(settings.bits), settings.largest_weight_level)
    scales = np.maximum(weight_scales(layer.weight, grid, settings.weight_method), smallest_weight_scale(layer))
    rounded = round_weight(layer.weight, scales, grid, moments, adaptive=settings.adaptive_rounding,
                           correct_bias=settings.correct_bias)
    bias = layer.bias
    if rounded.correction is not None:
        bias = rounded.correction + (0.0 if bias is None else bias)
    return LayerWeight(rounded.levels, scales, bias, grid)


def _report(seen: Mapping[Quantizer, Observation],
            tensors: Mapping[Quantizer, TensorScale]) -> Tuple[CalibratedTensor, ...]:
    """What each observer saw.

    Raises:
        ValueError: one saw nothing.
    """
    empty = ["%s of %r" % (owner.role.value, owner.layer) for owner, state in seen.items() if not state.batches]
    if empty:
        raise ValueError("no batch reached %s" % ", ".join(empty))
    rows: List[CalibratedTensor] = []
    for owner, state in seen.items():
        scale, grid = tensors[owner]
        values, counts = state.distribution()
        outside = (values > (grid.upper + 0.5) * scale) | (values < (grid.lower - 0.5) * scale)
        rows.append(CalibratedTensor(owner.layer, owner.role.value, state.batches, state.lowest, state.highest, scale,
                                     float(counts[outside].sum() / counts.sum())))
    return tuple(rows)
