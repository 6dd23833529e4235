"""What torch functions do to the channels that flow through them, and arithmetic on shadows.

A shadow is an integer tensor beside a tensor of the network: for each value the channel it belongs to, or -1.
"""
from __future__ import annotations

from typing import List, Tuple

import numpy as np
import torch
from torch import Tensor

#: results stand where the values stood that they were computed from
KEEPS_PLACES = frozenset({
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "sigmoid", "sigmoid_", "hardsigmoid",
    "tanh", "tanh_", "gelu", "silu", "mish", "hardswish", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu",
    "softplus", "softsign", "logsigmoid", "abs", "abs_", "exp", "log", "sqrt", "rsqrt", "square", "neg", "__neg__",
    "to", "float", "half", "double", "type_as", "contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d",
    "feature_dropout", "alpha_dropout", "requires_grad_"})
#: results keep batch and channel, not the place
POOLS = frozenset({
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate", "upsample", "lp_pool1d", "lp_pool2d"})
#: results are computed from the values of several tensors at one place
JOINS = frozenset(form.format(name) for name in ("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum")
                   for form in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")) | {
                       "__truediv__", "__rtruediv__", "__itruediv__", "rsub"}
#: values move and stay what they are
MOVES = frozenset({
    "reshape", "view", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "T", "mT", "squeeze",
    "squeeze_", "unsqueeze", "unsqueeze_", "chunk", "split", "tensor_split", "unbind", "narrow", "select",
    "index_select", "__getitem__", "expand", "roll", "flip", "cat", "concat", "concatenate", "stack",
    "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "view_as", "reshape_as", "expand_as"})
#: of those, what cuts a tensor into parts of one size
EQUAL_PARTS = frozenset({"chunk", "split", "tensor_split", "unbind"})
#: dimensions vanish
REDUCES = frozenset({"mean", "sum", "amax", "amin"})


def spread(channels: Tensor, dim: int, like: Tensor) -> Tensor:
    """The shadow of ``like`` whose channels lie along one dimension."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return channels.reshape(shape).expand(like.shape)


def varying(shadow: Tensor) -> List[int]:
    """The dimensions along which channels change."""
    return [dim for dim in range(shadow.dim())
            if shadow.shape[dim] > 1 and bool((shadow != shadow.narrow(dim, 0, 1)).any())]


def varies_with(constant: Tensor, shadows: List[Tensor]) -> bool:
    """Whether a constant has its own value for each channel."""
    if constant.numel() == 1:
        return False
    dims = {dim - shadow.dim() for shadow in shadows for dim in varying(shadow)}
    return any(constant.dim() + dim >= 0 and constant.shape[dim] > 1 for dim in dims)


def pairs(first: Tensor, second: Tensor) -> Tuple[np.ndarray, np.ndarray]:
    """The channels that meet in two shadows of equal shape, each pair once."""
    met = torch.unique(torch.stack([first.reshape(-1), second.reshape(-1)], 1), dim=0)
    return met[:, 0].numpy(), met[:, 1].numpy()
