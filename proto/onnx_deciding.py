"""From scales and levels to layers as they are deployed, once the structure of an ONNX file is known."""
from __future__ import annotations

from typing import Dict, Mapping, NamedTuple, Optional

import numpy as np

from slimtrain.core import SMALLEST_SCALE, Grid, PlannedCall, Quantizer, capped_grid, stored_zero_point
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_layers import FloatLayer
from slimtrain.proto.onnx_rewrite import Rewritten

# below this MNN's depthwise kernel computes with 1e-6 instead
_SMALLEST_DEPTHWISE_SCALE = 2e-6


class TensorScale(NamedTuple):
    """Scale and levels of an activation."""

    scale: float
    grid: Grid


class LayerWeight(NamedTuple):
    """A layer's weight on its grid, and its bias."""

    levels: np.ndarray           #: int32, the shape of the weight
    scales: np.ndarray           #: float32 [O]
    bias: Optional[np.ndarray]   #: float [O]
    grid: Grid


def smallest_weight_scale(layer: FloatLayer) -> np.float32:
    """The smallest scale of a weight with which MNN computes what it should."""
    return np.float32(_SMALLEST_DEPTHWISE_SCALE if layer.depthwise else SMALLEST_SCALE)


def planned_calls(structure: Rewritten, layers: Mapping[str, FloatLayer]) -> Dict[str, PlannedCall]:
    """Output of each convolution -> how it is called in the deployed model."""
    calls = {call.tensor: call for call in structure.placement.calls}
    planned = {}
    for output, rough in structure.layers.items():
        call = calls[output]
        # an activation that the converter does not fuse stays an operation of its own
        activation = layers[rough.name].activation if call.fused != call.tensor else ""
        planned[output] = PlannedCall(rough.name, call.input, call.output, "", activation)
    return planned


def decided_layer(layer: FloatLayer, call: PlannedCall, weight: LayerWeight,
                  tensors: Mapping[Quantizer, TensorScale]) -> DeployedLayer:
    """A layer with everything decided."""
    source, target = tensors[call.input], tensors[call.output]
    bias = np.zeros(len(layer.weight)) if weight.bias is None else np.asarray(weight.bias, np.float64)
    if layer.depthwise:
        unit = np.float64(source.scale) * weight.scales.astype(np.float64)
        bias = _in_units(bias + _lost_of_zero_point(source, target, weight.scales) * unit, unit)
    output_grid = capped_grid(target.grid, target.scale) if call.activation == "relu6" else target.grid
    return DeployedLayer(
        name=layer.name, trained_weight=layer.weight.astype(np.float64), levels=weight.levels,
        weight_scales=weight.scales, bias=bias.astype(np.float32) if bias.any() or layer.bias is not None else None,
        float_bias=np.zeros(len(bias), np.float32) if layer.bias is None else layer.bias,
        factor=np.ones(len(bias)), folds_batch_norm=False, activation=call.activation, groups=layer.groups, call=call,
        input_scale=source.scale, output_scale=target.scale, input_grid=source.grid, output_grid=output_grid,
        weight_grid=weight.grid)


def _in_units(bias: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """A depthwise bias in whole accumulator units, a few float32 steps away from zero so that truncation finds them."""
    count = np.floor(np.abs(bias) / unit + 0.5)
    return np.asarray(np.sign(bias) * count * unit * (1 + 2.0 ** -21))


def _lost_of_zero_point(source: TensorScale, target: TensorScale, scales: np.ndarray) -> np.ndarray:
    """What MNN cuts off where it adds the output's zero point to the integer bias, in accumulator units."""
    ratio = np.float32(source.scale) / np.float32(target.scale)
    units = np.float32(stored_zero_point(target.grid)) / (scales.astype(np.float32) * ratio)
    return np.asarray((units - np.trunc(units)).astype(np.float64))
