"""MNN's int8 arithmetic, integer for integer: the judge of what is trained and what is deployed.

Dense and grouped convolutions add the float32 bias to the rescaled accumulator; depthwise ones truncate it
to an integer of the accumulator first. Both accumulate exactly and round half away from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional, Tuple

import numpy as np

from slimtrain.core.grid import Grid, checked_scale, round_half_away

Pair = Tuple[int, int]


class Activation(Enum):
    """The activation that MNN fuses into a convolution."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"


@dataclass(frozen=True, eq=False)
class IntegerConv:
    """A quantized 2-D convolution as MNN stores it (a linear layer is a 1x1 one).

    Attributes:
        weight: integer levels [O, I / groups, kh, kw].
        weight_scales: float32 [O].
        bias: float32 [O] in real units, or None.
        input_scale: step of the input levels.
        output_scale: step of the output levels.
        output_grid: levels that the output is clamped to.
        strides: (height, width).
        padding: ((top, bottom), (left, right)), so that TensorFlow's SAME can be told.
        dilation: (height, width).
        groups: I for depthwise.
        activation: fused, in real units.

    Raises:
        ValueError: a shape or a scale does not fit.
        TypeError: the weight does not hold integers.
    """

    weight: np.ndarray
    weight_scales: np.ndarray
    bias: Optional[np.ndarray]
    input_scale: float
    output_scale: float
    output_grid: Grid
    strides: Pair = (1, 1)
    padding: Tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Activation = Activation.NONE

    def __post_init__(self) -> None:
        if not np.issubdtype(self.weight.dtype, np.integer):
            raise TypeError("weight must hold integer levels, got {}".format(self.weight.dtype))
        if self.weight.ndim != 4 or self.groups < 1 or self.weight.shape[0] % self.groups:
            raise ValueError("weight must be [O, I / groups, kh, kw] with O a multiple of groups {}, got {}".format(
                self.groups, self.weight.shape))
        channels = (self.weight.shape[0],)
        if np.shape(self.weight_scales) != channels:
            raise ValueError("weight_scales must have shape {}, got {}".format(channels, np.shape(self.weight_scales)))
        if self.bias is not None and np.shape(self.bias) != channels:
            raise ValueError("bias must have shape {}, got {}".format(channels, np.shape(self.bias)))
        for scale in (self.weight_scales, self.input_scale, self.output_scale):
            checked_scale(scale, np.float32)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved on its own."""
        return self.groups == self.weight.shape[0] and self.groups > 1 and self.weight.shape[1] == 1


def simulate_conv(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Output levels of ``conv`` for input levels ``q_x``: int32 [N, O, H', W'] from integers [N, I, H, W].

    Raises:
        TypeError: ``q_x`` does not hold integers.
        ValueError: its shape does not fit the weight.
    """
    scale = (np.float32(conv.input_scale) * np.asarray(conv.weight_scales, np.float32))[:, None, None]
    bias = np.zeros(len(scale), np.float32) if conv.bias is None else np.asarray(conv.bias, np.float32)
    total = accumulate(q_x, conv)
    if conv.depthwise:
        total = total + np.trunc(bias[:, None, None] / scale).astype(np.int64)
        real = total.astype(np.float32) * scale
    else:
        real = total.astype(np.float32) * scale + bias[:, None, None]
    if conv.activation is not Activation.NONE:
        real = np.maximum(real, np.float32(0))
    if conv.activation is Activation.RELU6:
        real = np.minimum(real, np.float32(6))
    levels = round_half_away(real * (np.float32(1) / np.float32(conv.output_scale)))
    return np.clip(levels, conv.output_grid.lower, conv.output_grid.upper).astype(np.int32)


def simulate_linear(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Output levels of a linear layer, a 1x1 ``conv`` with weight [O, F, 1, 1], for levels [..., F]: int32 [..., O].

    Raises:
        TypeError: ``q_x`` does not hold integers.
        ValueError: the last axis does not fit, or the kernel is not 1x1.
    """
    if conv.weight.shape[2:] != (1, 1):
        raise ValueError("a linear layer needs a 1x1 kernel, got {}".format(conv.weight.shape))
    levels = np.asarray(q_x)
    flat = simulate_conv(levels.reshape(-1, levels.shape[-1], 1, 1), conv)
    return flat.reshape(levels.shape[:-1] + (conv.weight.shape[0],))


def accumulate(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Exact sums of products of input and weight levels, int64 [N, O, H', W'], before bias and scales.

    Raises:
        TypeError, ValueError: as ``simulate_conv``.
    """
    levels = np.asarray(q_x)
    if not np.issubdtype(levels.dtype, np.integer):
        raise TypeError("q_x must hold integer levels, got {}".format(levels.dtype))
    outputs, inner, kernel_h, kernel_w = conv.weight.shape
    if levels.ndim != 4 or levels.shape[1] != inner * conv.groups:
        raise ValueError("q_x must be [N, {}, H, W], got {}".format(inner * conv.groups, levels.shape))
    # Products of 8-bit levels sum exactly in float64 (below 2**53), where numpy has fast matrix products.
    padded = np.pad(levels.astype(np.float64), ((0, 0), (0, 0)) + tuple(conv.padding), mode="constant")
    size = [_output_size(padded.shape[2 + i], conv.weight.shape[2 + i], conv.strides[i], conv.dilation[i])
            for i in range(2)]
    grouped = padded.reshape((len(levels), conv.groups, inner) + padded.shape[2:])
    kernel = conv.weight.astype(np.float64).reshape(conv.groups, outputs // conv.groups, inner, kernel_h, kernel_w)
    total = np.zeros((len(levels), conv.groups, outputs // conv.groups, size[0] * size[1]))
    for y in range(kernel_h):
        for x in range(kernel_w):
            rows = slice(y * conv.dilation[0], y * conv.dilation[0] + (size[0] - 1) * conv.strides[0] + 1, conv.strides[0])
            columns = slice(x * conv.dilation[1], x * conv.dilation[1] + (size[1] - 1) * conv.strides[1] + 1, conv.strides[1])
            tap = grouped[:, :, :, rows, columns].reshape(len(levels), conv.groups, inner, -1)
            total += np.matmul(kernel[:, :, :, y, x], tap)
    return total.reshape(len(levels), outputs, size[0], size[1]).astype(np.int64)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> Pair:
    """TensorFlow's SAME padding of one axis, (before, after): the extra one goes after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _output_size(padded: int, kernel: int, stride: int, dilation: int) -> int:
    size = (padded - (kernel - 1) * dilation - 1) // stride + 1
    if size < 1:
        raise ValueError("a kernel of {} (dilation {}) does not fit {} padded inputs".format(kernel, dilation, padded))
    return size
