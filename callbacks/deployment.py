"""What of a trained layer goes to the device: integers, folded scales and biases, computed in float64."""
from __future__ import annotations

from typing import List, Mapping, NamedTuple, Optional

import numpy as np
from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.callbacks.recording import Plan, PlannedCall
from slimtrain.callbacks.simulation import is_depthwise
from slimtrain.core import SMALLEST_SCALE, Grid, Role, capped_grid, fold_factor, quantize, round_half_away

# below this MNN's depthwise kernel computes with 1e-6 instead
_SMALLEST_DEPTHWISE_SCALE = 2e-6


class DeployedLayer(NamedTuple):
    """One use of a quantized layer, as the converter shall see it."""

    name: str
    trained_weight: np.ndarray   #: float [O, I / groups, ...] as the model holds it, to recognise it in a file
    levels: np.ndarray           #: int32, the same shape, after folding
    weight_scales: np.ndarray    #: float32 [O], positive, after folding
    bias: Optional[np.ndarray]   #: float32 [O], after folding; of a depthwise layer in whole accumulator units
    float_bias: np.ndarray       #: float32 [O], after folding
    factor: np.ndarray           #: float64 [O], by which the folded batch norm multiplies; ones without one
    folds_batch_norm: bool
    activation: str              #: "relu", "relu6" or ""
    groups: int
    input_scale: float
    output_scale: float
    input_grid: Grid
    output_grid: Grid
    weight_grid: Grid

    @property
    def weight(self) -> np.ndarray:
        """Float32 weights on the grid, [O, I / groups, ...]."""
        return self.levels.astype(np.float32) * _columns(self.weight_scales, self.levels)


def deployed_layers(model: nn.Module, plan: Plan, scales: Mapping[str, LayerScales]) -> List[DeployedLayer]:
    """Every use of a quantized layer of a model, in execution order."""
    modules = dict(model.named_modules())
    return [_deploy(call, modules, scales, call.pooled and call.input not in plan.non_negative) for call in plan.calls]


def _deploy(call: PlannedCall, modules: Mapping[str, nn.Module], all_scales: Mapping[str, LayerScales],
            signed_pool: bool) -> DeployedLayer:
    layer, scales = modules[call.layer], all_scales[call.layer]
    weight = _array(layer.weight) if scales.keep is None else _array(layer.weight * scales.keep)
    scale = _array(scales.weight_scale())
    factor, shift = _affine(modules[call.batch_norm] if call.batch_norm else None, len(weight))
    # float32, as training computes the levels; the fold is computed in float64
    levels = quantize(weight.astype(np.float32), scale.astype(np.float32), scales.weight_grid, axis=0)
    levels = levels * _columns(np.sign(factor).astype(np.int32), levels)
    folded = scale * np.abs(factor)
    bias = shift if layer.bias is None else shift + _array(layer.bias) * factor
    owner = all_scales[call.input.layer]
    input_scale = owner.activation_scale(call.input.role).item()
    output = all_scales[call.output.layer]
    output_scale = output.activation_scale(call.output.role).item()
    output_grid = output.grid(Role.OUTPUT)
    if call.activation == "relu6":
        output_grid = capped_grid(output_grid, output_scale)
    smallest = _SMALLEST_DEPTHWISE_SCALE if is_depthwise(layer) else SMALLEST_SCALE
    levels, folded32 = _without_tiny_scales(levels, folded, smallest)
    deployed_bias = _on_grid(bias, np.float32(input_scale), folded32) if is_depthwise(layer) else bias
    return DeployedLayer(
        call.layer, weight, levels, folded32, deployed_bias.astype(np.float32) if np.any(bias) else None,
        bias.astype(np.float32), factor, bool(call.batch_norm), call.activation, int(getattr(layer, "groups", 1)),
        _apart(input_scale) if signed_pool else input_scale, output_scale,
        owner.grid(call.input.role), output_grid, scales.weight_grid)


def _affine(norm: Optional[nn.Module], channels: int) -> "tuple[np.ndarray, np.ndarray]":
    """The per-channel ``factor * y + shift`` of a batch norm in evaluation mode."""
    if norm is None:
        return np.ones(channels), np.zeros(channels)
    gamma = np.ones(channels) if norm.weight is None else _array(norm.weight)
    beta = np.zeros(channels) if norm.bias is None else _array(norm.bias)
    factor = fold_factor(gamma, _array(norm.running_var), norm.eps)
    return factor, beta - _array(norm.running_mean) * factor


def _without_tiny_scales(levels: np.ndarray, scales: np.ndarray, smallest: float) -> "tuple[np.ndarray, np.ndarray]":
    """Raise scales that MNN cannot divide by; the channel's weights are re-rounded, which makes almost all of them 0."""
    tiny = scales < smallest
    if tiny.any():
        ratio = _columns(np.where(tiny, scales / smallest, 1.0), levels)
        levels = round_half_away(levels * ratio).astype(np.int32)
    return levels, np.where(tiny, smallest, scales).astype(np.float32)


def _on_grid(bias: np.ndarray, input_scale: np.float32, weight_scales: np.ndarray) -> np.ndarray:
    """A depthwise bias in whole accumulator units, a few float32 steps away from zero so that truncation finds them."""
    unit = np.float64(input_scale) * weight_scales.astype(np.float64)
    return round_half_away(bias / unit) * unit * (1 + 2.0 ** -21)


def _apart(scale: float) -> float:
    """A scale just different from the pool's: with equal ones MNN pools signed bytes as unsigned (wrong results)."""
    return float(np.float32(scale) * np.float32(1 + 2.0 ** -22))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _columns(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape((-1,) + (1,) * (like.ndim - 1))
