"""What of a trained layer goes to the device: integers, folded scales and biases.

The same values serve the export and the exact simulation of the device, so that there is one source of both.
"""
from __future__ import annotations

from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.fake_quant import integer_levels
from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.callbacks.layers import is_depthwise
from slimtrain.callbacks.recording import Plan
from slimtrain.core import SMALLEST_SCALE, Grid, PlannedCall, quantize
from slimtrain.proto.deployed import DeployedLayer

# below this MNN's depthwise kernel computes with 1e-6 instead
_SMALLEST_DEPTHWISE_SCALE = 2e-6


class IntegerLayer(NamedTuple):
    """A layer with everything folded into integers and per-channel vectors, on the layer's device."""

    levels: Tensor          #: float32 with integer values, [O, I / groups, ...]
    weight_scales: Tensor   #: float32 [O], positive
    bias: Tensor            #: float32 [O]; of a depthwise layer in whole accumulator units
    float_bias: Tensor      #: float64 [O], before that
    factor: Tensor          #: float64 [O], by which the folded batch norm multiplies; ones without one
    input_scale: Tensor     #: float32 scalar
    output_scale: Tensor    #: float32 scalar


def deployed_layers(model: nn.Module, plan: Plan, scales: Mapping[str, LayerScales]) -> List[DeployedLayer]:
    """Every use of a quantized layer of a model, in execution order."""
    modules = dict(model.named_modules())
    return [_deployed(call, modules, scales) for call in plan.calls]


def _deployed(call: PlannedCall, modules: Mapping[str, nn.Module], scales: Mapping[str, LayerScales]) -> DeployedLayer:
    layer = modules[call.layer]
    norm = modules[call.batch_norm] if call.batch_norm else None
    with torch.no_grad():
        integer = integer_layer(layer, norm, call, scales)
        own = scales[call.layer]
        weight = _kept_weight(layer, own)
    bias = _array(integer.bias)
    _check_finite(call.layer, weight, integer)
    return DeployedLayer(
        call.layer, _array(weight.double()), _array(integer.levels).astype(np.int32), _array(integer.weight_scales),
        bias if np.any(bias) or layer.bias is not None else None, _array(integer.float_bias.float()),
        _array(integer.factor), norm is not None, call.activation, int(getattr(layer, "groups", 1)), call,
        integer.input_scale.item(), integer.output_scale.item(),
        scales[call.input.layer].grid(call.input.role), output_grid(call, scales), _either_sign(own.weight_grid))


def _check_finite(name: str, weight: Tensor, integer: IntegerLayer) -> None:
    broken = [what for what, values in (("weights", weight), ("bias or batch norm", integer.float_bias),
                                        ("weight scales", integer.weight_scales), ("input scale", integer.input_scale),
                                        ("output scale", integer.output_scale)) if not torch.isfinite(values).all()]
    if broken:
        raise ValueError("layer %r cannot be deployed, its %s are not finite: training has diverged, start again from "
                         "an earlier checkpoint" % (name, " and ".join(broken)))


def _either_sign(grid: Grid) -> Grid:
    """The levels that folding a batch norm, whose factor may be negative, can make of a grid's."""
    largest = max(-grid.lower, grid.upper)
    return grid._replace(lower=-largest, upper=largest)


def output_grid(call: PlannedCall, scales: Mapping[str, LayerScales]) -> Grid:
    """Integer levels that leave the layer; the 6 of a ReLU6 reaches MNN as the upper end of the range."""
    owner = scales[call.output.layer]
    grid = owner.grid(call.output.role)
    if call.activation != "relu6":
        return grid
    scale = owner.activation_scale(call.output.role).detach().cpu().numpy()
    return grid._replace(upper=int(quantize(np.array(6, np.float32), scale, grid)))


def integer_layer(layer: nn.Module, norm: Optional[nn.Module], call: PlannedCall,
                  scales: Mapping[str, LayerScales]) -> IntegerLayer:
    """Fold a layer and its batch norm (in evaluation mode) into integers; per-channel vectors in float64."""
    own = scales[call.layer]
    weight = _kept_weight(layer, own)
    factor, shift = _affine(norm, weight)
    # float32, as training computes the levels
    levels = own.rounded(integer_levels(weight.float(), own.weight_scale().float(), own.weight_range()), weight)
    columns = (-1,) + (1,) * (weight.dim() - 1)
    levels = levels * torch.sign(factor).float().reshape(columns)
    folded = own.weight_scale().double() * factor.abs()
    bias = shift + layer.bias.double() * factor if isinstance(layer.bias, Tensor) else shift
    correction = own.bias_correction()
    corrected = bias if correction is None else bias + correction * factor
    smallest = _SMALLEST_DEPTHWISE_SCALE if is_depthwise(layer) else SMALLEST_SCALE
    # channels whose scale MNN cannot divide by are rounded anew, which makes almost all of their weights zero
    ratio = torch.where(folded < smallest, folded / smallest, 1.0).reshape(columns)
    levels = torch.round(levels * ratio).float()
    folded32 = folded.clamp_min(smallest).float()
    input_scale = scales[call.input.layer].activation_scale(call.input.role).float()
    output_scale = scales[call.output.layer].activation_scale(call.output.role).float()
    deployed = _in_units(corrected, input_scale.double() * folded32.double()) if is_depthwise(layer) else corrected
    return IntegerLayer(levels, folded32, deployed.float(), bias, factor, input_scale, output_scale)


def _kept_weight(layer: nn.Module, scales: LayerScales) -> Tensor:
    """The weight with those that are to stay zero at zero."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # choose_layers takes no other layers
    return weight if scales.keep is None else weight * scales.keep


def _affine(norm: Any, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """The per-channel ``factor * y + shift`` of a batch norm in evaluation mode, float64."""
    ones = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    if norm is None:
        return ones, torch.zeros_like(ones)
    gamma = ones if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(ones) if norm.bias is None else norm.bias.double()
    factor = gamma / torch.sqrt(norm.running_var.double() + norm.eps)
    return factor, beta - norm.running_mean.double() * factor


def _in_units(bias: Tensor, unit: Tensor) -> Tensor:
    """A depthwise bias in whole accumulator units, a few float32 steps away from zero so that truncation finds them."""
    units = bias / unit
    return torch.sign(units) * torch.floor(units.abs() + 0.5) * unit * (1 + 2.0 ** -21)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
