"""MNN's int8 convolution, integer for integer: the judge of what is trained and what is deployed.

The accumulation is exact; what takes care is the float32 arithmetic that turns a sum into an output level,
because rounding in another order moves results that lie next to a tie. This order was read in the sources of
MNN 3.6 and reproduces its x86 runtime level for level, ties included:

- dense (each group):  level = round(float(sum of (q_x + 128) * q_w) * s_w * (s_in / s_out) + shift),
  shift = (bias - sum of q_w * s_w * 128 * s_in) / s_out.
  x86 stores levels as unsigned bytes, hence the 128; without it about one level in a million differs.
- depthwise:  level = round(float(sum of q_x * q_w + trunc(bias / (s_in * s_w))) * (s_w * (s_in / s_out))).
  The bias is an integer of the accumulator, and scales below 1e-6 count as 1e-6.

Levels count from the real number 0 and are stored as int8 with a zero point ``z`` added, which is 0 for symmetric
grids. Otherwise the 128 becomes ``128 + z`` of the input, and the zero point of the output takes part in the sum: a
dense layer adds it to the shift, a depthwise one ``trunc(z / (s_w * (s_in / s_out)))`` to its bias.

Neither looks at the 6 of a ReLU6: an activation only lifts the lower clamp to zero. The 6 has to be
the upper end of the output grid, see ``capped_grid``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional, Tuple

import numpy as np

from slimtrain.core.grid import Grid, checked_scale, round_half_away, stored_zero_point

Pair = Tuple[int, int]

_STORAGE_OFFSET = 128
_SMALLEST_DEPTHWISE_SCALE = np.float32(1e-6)


class Activation(Enum):
    """The activation that MNN fuses into a convolution; RELU6 computes as RELU, see the module."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"


@dataclass(frozen=True, eq=False)
class IntegerConv:
    """A quantized 2-D convolution as MNN stores it (a linear layer is a 1x1 one, a 1-D one has height 1).

    Attributes:
        weight: integer levels within int8, [O, I / groups, kh, kw].
        weight_scales: float32 [O].
        bias: float32 [O] in real units, or None.
        input_scale: step of the input levels.
        output_scale: step of the output levels.
        output_grid: levels that the output is clamped to.
        strides: (height, width).
        padding: ((top, bottom), (left, right)); TensorFlow's SAME is ``same_padding`` of each axis.
        dilation: (height, width).
        groups: I for depthwise.
        activation: fused into the convolution.
        input_zero_point: the int8 that stores level 0 of the input, see ``stored_zero_point``; that of the output
            follows from its grid.

    Raises:
        TypeError: the weight does not hold integers.
        ValueError: a shape, level or scale does not fit, or MNN leaves such a convolution float, see
            ``has_small_groups``.
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
    input_zero_point: int = 0

    def __post_init__(self) -> None:
        _check_levels(self.weight, "weight")
        if self.weight.ndim != 4 or self.groups < 1 or len(self.weight) % self.groups:
            raise ValueError("weight must be [O, I / groups, kh, kw] with O a multiple of groups "
                             f"({self.groups}), got {self.weight.shape}")
        if has_small_groups(self.weight.shape[1] * self.groups, len(self.weight), self.groups):
            raise ValueError(f"MNN does not compute {self.groups} groups of {self.weight.shape[1]} to "
                             f"{len(self.weight) // self.groups} channels in int8")
        channels = (len(self.weight),)
        for name, values in (("weight_scales", self.weight_scales), ("bias", self.bias)):
            if values is not None and np.shape(values) != channels:
                raise ValueError(f"{name} must have shape {channels}, got {np.shape(values)}")
        for scale in (self.weight_scales, self.input_scale, self.output_scale):
            checked_scale(scale, np.float32)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved on its own (MNN counts one channel to one channel as such)."""
        return self.weight.shape[1] == 1 and len(self.weight) == self.groups


def has_small_groups(inputs: int, outputs: int, groups: int) -> bool:
    """Whether MNN's converter takes a grouped convolution apart into depthwise ones, which stay float.

    It does so when a group has less than 4 and less than ``groups`` outputs, and less than ``groups`` inputs.
    Larger groups become one dense convolution each; a depthwise convolution stays what it is.
    """
    if groups == inputs == outputs:
        return False
    return outputs // groups < min(4, groups) and inputs // groups < groups


def input_levels(x: np.ndarray, scale: float, grid: Grid) -> np.ndarray:
    """Levels that MNN gives a float tensor: int32 ``clip(round_half_away(x * (1 / scale) + z)) - z``, all in float32.

    Multiplying by the reciprocal differs from ``quantize``, which divides, for values next to a tie only. The zero
    point ``z`` takes part in rounding, so that ties go away from the stored zero, not from the real one.

    Raises:
        ValueError: a scale that is not finite and positive.
    """
    reciprocal = np.float32(1) / checked_scale(scale, np.float32)
    zero = stored_zero_point(grid)
    stored = Grid(grid.bits, grid.lower + zero, grid.upper + zero)
    return _to_levels(np.asarray(x, dtype=np.float32) * reciprocal + np.float32(zero), stored) - np.int32(zero)


def simulate_conv(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Output levels of ``conv``: int32 [N, O, H', W'] from integer levels [N, I, H, W].

    Raises:
        TypeError: ``q_x`` does not hold integers.
        ValueError: its shape does not fit the weight, a level does not fit int8, or a sum does not fit int32.
    """
    requantize = _requantize_depthwise if conv.depthwise else _requantize_dense
    zero, lower = stored_zero_point(conv.output_grid), conv.output_grid.lower
    if conv.activation is not Activation.NONE:
        lower = max(lower, 0)
    stored = Grid(conv.output_grid.bits, lower + zero, conv.output_grid.upper + zero)
    return np.asarray(_to_levels(requantize(accumulate(q_x, conv), conv, zero), stored) - np.int32(zero))


def simulate_linear(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Output levels of a linear layer, a 1x1 ``conv`` with weight [O, F, 1, 1]: int32 [..., O] from [..., F].

    Raises:
        TypeError: ``q_x`` does not hold integers.
        ValueError: as ``simulate_conv``, or the kernel is not 1x1.
    """
    if conv.weight.shape[2:] != (1, 1):
        raise ValueError(f"a linear layer needs a 1x1 kernel, got a weight of shape {conv.weight.shape}")
    levels = np.asarray(q_x)
    flat = simulate_conv(levels.reshape(-1, levels.shape[-1], 1, 1), conv)
    return flat.reshape(levels.shape[:-1] + (len(conv.weight),))


def accumulate(q_x: np.ndarray, conv: IntegerConv) -> np.ndarray:
    """Exact sums of products of input and weight levels, int64 [N, O, H', W'], before bias and scales.

    Raises:
        TypeError, ValueError: as ``simulate_conv``.
    """
    levels = np.asarray(q_x)
    _check_levels(levels, "q_x", conv.input_zero_point)
    outputs, inner, height, width = conv.weight.shape
    if levels.ndim != 4 or levels.shape[1] != inner * conv.groups:
        raise ValueError(f"q_x must be [N, {inner * conv.groups}, H, W], got {levels.shape}")
    # Sums of 8-bit products are exact in float64, where numpy has fast matrix products.
    padded = np.pad(levels.astype(np.float64), ((0, 0), (0, 0)) + tuple(conv.padding), mode="constant")
    grouped = padded.reshape((len(levels), conv.groups, inner) + padded.shape[2:])
    kernel = conv.weight.astype(np.float64).reshape(conv.groups, -1, inner, height, width)
    size = (_output_size(padded.shape[2], height, conv.strides[0], conv.dilation[0]),
            _output_size(padded.shape[3], width, conv.strides[1], conv.dilation[1]))
    total = np.zeros((len(levels), conv.groups, kernel.shape[1], size[0] * size[1]))
    for y in range(height):
        for x in range(width):
            rows = _taps(y * conv.dilation[0], size[0], conv.strides[0])
            columns = _taps(x * conv.dilation[1], size[1], conv.strides[1])
            seen = grouped[:, :, :, rows, columns].reshape(len(levels), conv.groups, inner, -1)
            total += np.matmul(kernel[:, :, :, y, x], seen)
    return total.astype(np.int64).reshape((len(levels), outputs) + size)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> Pair:
    """TensorFlow's SAME padding of one axis, (before, after): the odd one goes after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _requantize_dense(sums: np.ndarray, conv: IntegerConv, zero: int) -> np.ndarray:
    scales, bias, s_in, s_out = _float32(conv)
    kernel_sums, offset = conv.weight.sum(axis=(1, 2, 3)), _STORAGE_OFFSET + conv.input_zero_point
    stored = _int32(sums + offset * _column(kernel_sums)).astype(np.float32)
    shift = (bias - kernel_sums.astype(np.float32) * scales * np.float32(offset) * s_in) / s_out + np.float32(zero)
    return stored * _column(scales) * (s_in / s_out) + _column(shift)


def _requantize_depthwise(sums: np.ndarray, conv: IntegerConv, zero: int) -> np.ndarray:
    scales, bias, s_in, s_out = _float32(conv)
    scales = np.maximum(scales, _SMALLEST_DEPTHWISE_SCALE)
    offset = (_STORAGE_OFFSET + conv.input_zero_point) * conv.weight.sum(axis=(1, 2, 3))
    # MNN stores the two together, passing through float32, which loses digits of a very large bias.
    factor = scales * (s_in / s_out)
    stored = np.trunc(bias / (s_in * scales)) - offset.astype(np.float32) + np.trunc(np.float32(zero) / factor)
    whole = _int32(sums + _column(offset + stored.astype(np.int64)))
    return whole.astype(np.float32) * _column(factor)


def _float32(conv: IntegerConv) -> Tuple[np.ndarray, np.ndarray, np.float32, np.float32]:
    scales = np.asarray(conv.weight_scales, dtype=np.float32)
    bias = np.zeros_like(scales) if conv.bias is None else np.asarray(conv.bias, dtype=np.float32)
    return scales, bias, np.float32(conv.input_scale), np.float32(conv.output_scale)


def _to_levels(real: np.ndarray, grid: Grid) -> np.ndarray:
    return np.clip(round_half_away(real), grid.lower, grid.upper).astype(np.int32)


def simulate_mean(x: np.ndarray, axes: int) -> np.ndarray:
    """The mean over the last axes as MNN computes it: a float32 sum from the first value to the last, then a division.

    The order shows where the mean of a few levels lies halfway between two levels of the next layer.

    Args:
        x: any numbers.
        axes: how many; they stay, with length 1.

    Returns:
        float32.
    """
    kept: Tuple[int, ...] = x.shape[:x.ndim - axes]
    values = np.asarray(x, np.float32).reshape(kept + (-1,))
    sums = np.add.accumulate(values, axis=-1, dtype=np.float32)[..., -1]
    return np.asarray(sums / np.float32(values.shape[-1]), np.float32).reshape(kept + (1,) * axes)


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]


def _int32(values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max() if values.size else 0
    if largest > np.iinfo(np.int32).max:
        raise ValueError(f"a sum or bias of {largest:.3g} does not fit the 32-bit accumulator of MNN")
    return values.astype(np.int64)


def _check_levels(levels: np.ndarray, name: str, zero_point: int = 0) -> None:
    if not np.issubdtype(levels.dtype, np.integer):
        raise TypeError(f"{name} must hold integer levels, got {levels.dtype}")
    lowest, highest = -128 - zero_point, 127 - zero_point
    if levels.size and not (levels.min() >= lowest and levels.max() <= highest):
        fit = f"int8 with zero point {zero_point}" if zero_point else "int8"
        raise ValueError(f"levels of {name} must fit {fit}, got {levels.min()} to {levels.max()}")


def _taps(start: int, count: int, stride: int) -> slice:
    return slice(start, start + (count - 1) * stride + 1, stride)


def _output_size(padded: int, kernel: int, stride: int, dilation: int) -> int:
    size = (padded - (kernel - 1) * dilation - 1) // stride + 1
    if size < 1:
        raise ValueError(f"a kernel of {kernel} with dilation {dilation} does not fit {padded} padded inputs")
    return size
