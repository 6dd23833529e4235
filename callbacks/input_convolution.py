"""The convolution that reads a network's input, whose gradient nobody needs except the scale of that input.

Backward through a convolution into its input costs as much as the layer itself, and into a few channels of a large
image many times that. Autograd does it for the one number that the input's scale learns from. With ``y = conv(q)``,
where ``q`` is the input on its grid and ``dq/ds`` the gradient of LSQ, that number is the sum of
``grad * conv(dq/ds)``, because a convolution is linear: a pass forward instead of one backward, and the same value.
"""
from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as gradients

from slimtrain.callbacks.fake_quant import Source, source_gradient
from slimtrain.callbacks.handling import Call
from slimtrain.callbacks.operations import argument, function_name

_Sizes = Union[int, Tuple[int, ...]]


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: _Sizes
    padding: _Sizes
    dilation: _Sizes
    groups: int


def geometry_of(call: Call) -> Optional[Geometry]:
    """The geometry of a convolution; None for any other layer and where a padding is named instead of counted."""
    if function_name(call.function) not in ("conv1d", "conv2d"):
        return None
    found = Geometry(*(argument(call.args, call.kwargs, 3 + index, name, default)
                       for index, (name, default) in enumerate(zip(Geometry._fields, (1, 0, 1, 1)))))
    return None if isinstance(found.padding, str) else found


def convolve_input(x: Tensor, source: Source, scale: Tensor, weight: Tensor, bias: Optional[Tensor],
                   geometry: Geometry) -> Tensor:
    """Convolve a network's input.

    Args:
        x: the input on its grid, float32 [N, C, L] or [N, C, H, W].
        source: what it was made of.
        scale: the learned scale, a scalar, which gets the gradient.
        weight: [O, C / groups, ...].
        bias: [O].
        geometry: of the convolution.
    """
    return _InputConvolution.apply(x.detach(), source.x, source.scale, scale, weight, bias, source, geometry)


class _InputConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, used: Tensor, scale: Tensor, weight: Tensor, bias: Optional[Tensor],
                source: Source, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, raw, used, weight)
        ctx.levels, ctx.geometry, ctx.has_bias = source.levels, geometry, bias is not None
        return _convolution(x)(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, raw, used, weight = ctx.saved_tensors
        (grad,) = grads
        of_scale = of_weight = of_bias = None
        if ctx.needs_input_grad[3]:
            of_scale = source_gradient(Source(raw, used, ctx.levels), lambda change: torch.sum(
                grad * _convolution(x)(change, weight, None, *ctx.geometry)))
        if ctx.needs_input_grad[4]:
            weight_gradient = gradients.conv1d_weight if x.dim() == 3 else gradients.conv2d_weight
            of_weight = weight_gradient(x, weight.shape, grad, *ctx.geometry)
        if ctx.has_bias and ctx.needs_input_grad[5]:
            of_bias = grad.sum(dim=[0, *range(2, grad.dim())])
        return None, None, None, of_scale, of_weight, of_bias, None, None


def _convolution(x: Tensor) -> Any:
    return F.conv1d if x.dim() == 3 else F.conv2d
