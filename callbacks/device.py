"""A quantized layer computed as MNN computes it: integer sums, then float32 in MNN's order of operations.

``slimtrain.core.simulator`` describes that order and is the oracle of this module, which is the same on torch tensors.
"""
from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from slimtrain.callbacks.deployment import IntegerLayer
from slimtrain.callbacks.layers import is_depthwise
from slimtrain.core import Grid, simulate_mean

# x86 stores levels as unsigned bytes
_STORAGE_OFFSET = 128
# integers up to here are exact in float32
_EXACT = 1 << 24


def run_on_device(layer: nn.Module, integer: IntegerLayer, x: Tensor, function: Callable[..., Tensor],
                  rest: Sequence[Any], grids: tuple[Grid, Grid, Grid]) -> Tensor:
    """Compute a layer, with whatever is fused into it, on integers.

    Args:
        layer: the convolution or linear layer.
        integer: its folded integers.
        x: float32 input on the grid of ``integer.input_scale``.
        function: the torch function that the layer calls.
        rest: its arguments after the bias (stride, padding, ...).
        grids: integer levels of the input, the weight, and the output including what its activation cuts off.

    Returns:
        float32 on the grid of ``integer.output_scale``.
    """
    levels = torch.round(x / integer.input_scale)
    sums = _sums(function, levels, integer.levels, rest, grids[0], grids[1])
    channel_axis = -1 if isinstance(layer, nn.Linear) else 1
    requantize = _depthwise if is_depthwise(layer) else _dense
    result = requantize(sums, integer, lambda values: _along(values, sums, channel_axis))
    rounded = torch.sign(result) * torch.floor(result.abs() + 0.5)
    return rounded.clamp(grids[2].lower, grids[2].upper) * integer.output_scale


def input_levels(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """A float tensor on its grid, computed in float32; MNN multiplies by the reciprocal where training divides."""
    step = scale.float()
    levels = x.float() * (1 / step)
    return ((torch.sign(levels) * torch.floor(levels.abs() + 0.5)).clamp(grid.lower, grid.upper) * step).to(x.dtype)


def mean_on_device(x: Tensor, axes: int) -> Tensor:
    """:func:`slimtrain.core.simulate_mean` on float32 tensors."""
    return torch.from_numpy(simulate_mean(x.cpu().numpy(), axes)).to(x.device)


def _sums(function: Callable[..., Tensor], x: Tensor, weight: Tensor, rest: Sequence[Any], x_grid: Grid,
          weight_grid: Grid) -> Tensor:
    """Exact sums of products of levels: in float32 where no partial sum can leave its integers, else in float64."""
    largest = weight[0].numel() * _largest(x_grid) * _largest(weight_grid)
    dtype = torch.float32 if largest < _EXACT else torch.float64
    return function(x.to(dtype), weight.to(dtype), None, *rest)


def _dense(sums: Tensor, integer: IntegerLayer, column: Callable[[Tensor], Tensor]) -> Tensor:
    s_in, s_out = integer.input_scale, integer.output_scale
    kernel_sums = integer.levels.flatten(1).sum(dim=1)
    stored = (sums.double() + _STORAGE_OFFSET * column(kernel_sums).double()).float()
    shift = (integer.bias - kernel_sums * integer.weight_scales * float(_STORAGE_OFFSET) * s_in) / s_out
    return stored * column(integer.weight_scales) * (s_in / s_out) + column(shift)


def _depthwise(sums: Tensor, integer: IntegerLayer, column: Callable[[Tensor], Tensor]) -> Tensor:
    s_in, s_out = integer.input_scale, integer.output_scale
    offset = _STORAGE_OFFSET * integer.levels.flatten(1).sum(dim=1)
    # MNN keeps bias and offset together, in float32 on the way
    stored = torch.trunc(integer.bias / (s_in * integer.weight_scales)) - offset
    whole = sums.double() + column(offset.double() + stored.double())
    return whole.float() * column(integer.weight_scales * (s_in / s_out))


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _largest(grid: Grid) -> int:
    return max(-grid.lower, grid.upper)
