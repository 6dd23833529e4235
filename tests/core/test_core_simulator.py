"""The integer simulator against loops of Python integers and one float32 operation at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest

from slimtrain.core import (
    Activation,
    Grid,
    IntegerConv,
    accumulate,
    activation_grid,
    capped_grid,
    has_small_groups,
    input_levels,
    quantize,
    same_padding,
    simulate_conv,
    simulate_linear,
    simulate_mean,
    stored_zero_point,
    weight_grid,
)

f32 = np.float32


def naive_sums(q_x, conv):
    """Convolution in seven loops over Python integers."""
    batch, _, height, width = q_x.shape
    outputs, inner, kernel_h, kernel_w = conv.weight.shape
    (top, bottom), (left, right) = conv.padding
    out_h = (height + top + bottom - (kernel_h - 1) * conv.dilation[0] - 1) // conv.strides[0] + 1
    out_w = (width + left + right - (kernel_w - 1) * conv.dilation[1] - 1) // conv.strides[1] + 1
    sums = np.zeros((batch, outputs, out_h, out_w), dtype=np.int64)
    for n, o, y, x in np.ndindex(*sums.shape):
        total = 0
        for i, ky, kx in np.ndindex(inner, kernel_h, kernel_w):
            row = y * conv.strides[0] + ky * conv.dilation[0] - top
            column = x * conv.strides[1] + kx * conv.dilation[1] - left
            if 0 <= row < height and 0 <= column < width:
                channel = o // (outputs // conv.groups) * inner + i
                total += int(q_x[n, channel, row, column]) * int(conv.weight[o, i, ky, kx])
        sums[n, o, y, x] = total
    return sums


def naive_dense_level(total, channel, conv):
    """One level of a dense convolution, each float32 operation on its own."""
    scale, kernel_sum = f32(conv.weight_scales[channel]), int(conv.weight[channel].sum())
    bias = f32(0 if conv.bias is None else conv.bias[channel])
    step = f32(f32(conv.input_scale) / f32(conv.output_scale))
    offset, zero = 128 + conv.input_zero_point, stored_zero_point(conv.output_grid)
    real = f32(f32(f32(total + offset * kernel_sum) * scale) * step)
    weighted = f32(f32(f32(kernel_sum) * scale) * f32(offset))
    shift = f32(f32(bias - f32(weighted * f32(conv.input_scale))) / f32(conv.output_scale))
    return naive_level(f32(real + f32(shift + f32(zero))), conv)


def naive_depthwise_level(total, channel, conv):
    """One level of a depthwise convolution, the bias truncated to an integer first."""
    scale = f32(conv.weight_scales[channel])
    whole = int(f32(conv.bias[channel]) / f32(f32(conv.input_scale) * scale))
    step = f32(scale * f32(f32(conv.input_scale) / f32(conv.output_scale)))
    whole += int(f32(f32(stored_zero_point(conv.output_grid)) / step))
    return naive_level(f32(f32(total + whole) * step), conv)


def naive_level(stored, conv):
    """The level of what is stored, less the zero point; ties go away from the stored zero."""
    nearest = int(math.copysign(math.floor(f32(abs(stored) + f32(0.5))), stored)) - stored_zero_point(conv.output_grid)
    lower = conv.output_grid.lower if conv.activation is Activation.NONE else 0
    return min(max(nearest, lower), conv.output_grid.upper)


def naive_levels(q_x, conv):
    alone = conv.groups == len(conv.weight) == q_x.shape[1]
    one_level = naive_depthwise_level if alone else naive_dense_level
    sums = naive_sums(q_x, conv)
    return np.array([one_level(int(sums[index]), index[1], conv)
                     for index in np.ndindex(*sums.shape)]).reshape(sums.shape)


def random_case(seed, outputs=4, inner=3, kernel=(3, 2), groups=1, size=(7, 6), bits=8, **options):
    """Levels and a convolution whose steps are related by powers of two, so that ties are frequent."""
    rng = np.random.RandomState(seed)
    grid = weight_grid(bits)
    weight = rng.randint(grid.lower, grid.upper + 1, (outputs, inner) + kernel)
    q_x = rng.randint(grid.lower, grid.upper + 1, (2, inner * groups) + size)
    input_scale, output_scale = f32(rng.uniform(0.05, 0.2)), f32(rng.uniform(0.05, 0.2))
    weight_scales = (f32(0.5) ** rng.randint(1, 9, outputs) * output_scale / input_scale).astype(f32)
    bias = (rng.randint(-90, 90, outputs) * input_scale * weight_scales * f32(0.5)).astype(f32)
    conv = IntegerConv(weight, weight_scales, bias, input_scale, output_scale, grid, groups=groups, **options)
    return q_x, conv


OPTIONS = [
    dict(),
    dict(strides=(2, 1)),
    dict(padding=((1, 2), (0, 3))),
    dict(padding=((2, 1), (1, 1)), dilation=(2, 1), strides=(1, 2)),
    dict(activation=Activation.RELU),
    dict(activation=Activation.RELU6, padding=((1, 1), (1, 1))),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [dict(), dict(outputs=6, inner=2, groups=2),
                                   dict(outputs=5, inner=1, groups=5), dict(outputs=1, inner=1)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_levels_against_loops(options, shape, bits):
    q_x, conv = random_case(seed=bits, bits=bits, **dict(shape, **options))
    np.testing.assert_array_equal(accumulate(q_x, conv), naive_sums(q_x, conv))
    levels = simulate_conv(q_x, conv)
    np.testing.assert_array_equal(levels, naive_levels(q_x, conv))
    assert levels.dtype == np.int32


@pytest.mark.parametrize("lowest", [(0, -100), (-30, 0), (-200, -20)])
@pytest.mark.parametrize("shape", [dict(), dict(outputs=6, inner=2, groups=2), dict(outputs=5, inner=1, groups=5)])
def test_levels_with_zero_points_against_loops(shape, lowest):
    inputs, outputs = (Grid(8, level, level + 255) for level in lowest)
    for activation in (Activation.NONE, Activation.RELU):
        _, conv = random_case(3, padding=((1, 2), (0, 3)), activation=activation, **shape)
        conv = replace(conv, output_grid=outputs, input_zero_point=stored_zero_point(inputs))
        channels = conv.weight.shape[1] * conv.groups
        q_x = np.random.RandomState(4).randint(inputs.lower, inputs.upper + 1, (2, channels, 7, 6))
        levels = simulate_conv(q_x, conv)
        np.testing.assert_array_equal(levels, naive_levels(q_x, conv))
        assert levels.dtype == np.int32 and len(np.unique(levels)) > 3


@pytest.mark.parametrize("shape", [dict(outputs=8), dict(outputs=8, inner=1, groups=8)])
def test_many_ties_against_loops(shape):
    for seed in range(40):
        q_x, conv = random_case(seed, kernel=(1, 1), size=(2, 5), bits=4, **shape)
        np.testing.assert_array_equal(simulate_conv(q_x, conv), naive_levels(q_x, conv))


def pointwise(weight, bias, **options):
    """A 1x1 convolution with unit scales."""
    kernel = np.asarray(weight)[:, :, None, None]
    arguments = dict(dict(output_scale=1.0, output_grid=weight_grid(8)), **options)
    shift = None if bias is None else np.array(bias)
    return IntegerConv(kernel, np.ones(len(kernel)), shift, 1.0, **arguments)


def row(*levels):
    return np.array(levels)[None, None, None, :]


def test_ties_go_away_from_zero():
    dense = IntegerConv(np.ones((2, 1, 1, 1), int), np.ones(2), None, 1.0, 2.0, weight_grid(8))
    depthwise = IntegerConv(np.ones((1, 1, 1, 1), int), np.ones(1), None, 1.0, 2.0, weight_grid(8))
    for conv in (dense, depthwise):
        assert simulate_conv(row(1, -1, 3, -3, 5, 0), conv)[0, 0, 0].tolist() == [1, -1, 2, -2, 3, 0]


def test_only_depthwise_truncates_the_bias():
    x = np.zeros((1, 2, 1, 1), dtype=int)
    assert simulate_conv(x, pointwise([[1, 0], [0, 1]], [0.75, -0.75])).ravel().tolist() == [1, -1]
    assert simulate_conv(x, pointwise([[1], [1]], [0.75, -0.75], groups=2)).ravel().tolist() == [0, 0]
    assert simulate_conv(x, pointwise([[1], [1]], [1.75, -1.75], groups=2)).ravel().tolist() == [1, -1]


def test_relu6_is_a_relu_until_the_grid_says_six():
    grid = weight_grid(8)
    for cap, highest in ((grid, 100), (capped_grid(grid, 0.1), 60)):
        conv = pointwise([[1], [1]], None, output_scale=0.1, output_grid=cap, activation=Activation.RELU6)
        assert simulate_conv(row(-5, 3, 6, 10), conv)[0, 0, 0].tolist() == [0, 30, 60, highest]


def test_the_output_grid_clamps():
    conv = pointwise([[1], [1]], None, output_grid=Grid(2, 0, 3))
    assert simulate_conv(row(-7, 2, 9), conv)[0, 0, 0].tolist() == [0, 2, 3]


def test_tiny_depthwise_scales_count_as_a_millionth():
    weight, scales = np.full((2, 1, 1, 1), 100), np.array([1e-7, 1e-6])
    tiny = IntegerConv(weight, scales, None, 1.0, 1e-4, weight_grid(8), groups=2)
    x = np.full((1, 2, 1, 1), 50)
    assert simulate_conv(x, tiny).ravel().tolist() == [50, 50]


@pytest.mark.parametrize("inputs, outputs, groups, small", [
    (8, 8, 1, False), (8, 8, 8, False), (8, 16, 8, True), (8, 24, 8, True), (8, 32, 8, False),
    (2, 4, 2, False), (8, 4, 4, True), (16, 4, 4, False), (12, 8, 4, True), (4, 2, 2, False),
    (6, 6, 3, True), (6, 9, 3, False)])
def test_which_groups_are_small(inputs, outputs, groups, small):
    assert has_small_groups(inputs, outputs, groups) is small


def test_sums_beyond_float32_are_exact():
    weight = np.full((1, 4000, 1, 1), 127)
    weight[0, 0] = 126
    conv = IntegerConv(weight, np.ones(1), None, 1.0, 1.0, weight_grid(8))
    assert accumulate(np.full((1, 4000, 1, 1), 127), conv).ravel().tolist() == [4000 * 127 * 127 - 127]


def test_linear_layers_of_any_rank():
    rng = np.random.RandomState(0)
    weight = rng.randint(-127, 128, (5, 7))
    conv = IntegerConv(weight[:, :, None, None], np.full(5, 0.01), rng.randn(5), 0.1, 0.5, weight_grid(8))
    x = rng.randint(-127, 128, (2, 3, 7))
    levels = simulate_linear(x, conv)
    assert levels.shape == (2, 3, 5)
    real = x @ weight.T * 0.001 + conv.bias
    np.testing.assert_array_equal(levels, quantize(real, 0.5, weight_grid(8)))
    with pytest.raises(ValueError, match="1x1 kernel"):
        simulate_linear(x, random_case(0)[1])


@pytest.mark.parametrize("size, kernel, stride, dilation, expected", [
    (5, 3, 1, 1, (1, 1)), (5, 3, 2, 1, (1, 1)), (6, 3, 2, 1, (0, 1)), (6, 2, 1, 1, (0, 1)),
    (7, 3, 1, 2, (2, 2)), (5, 1, 2, 1, (0, 0)), (224, 7, 2, 1, (2, 3))])
def test_same_padding_of_tensorflow(size, kernel, stride, dilation, expected):
    assert same_padding(size, kernel, stride, dilation) == expected
    padded = size + sum(expected)
    assert (padded - (kernel - 1) * dilation - 1) // stride + 1 == math.ceil(size / stride)


def test_input_levels_multiply_by_the_reciprocal():
    scale = f32(0.0371)
    x = ((np.arange(-130, 130) + f32(0.5)) * scale).astype(f32)
    expected = [naive_level(f32(value * f32(f32(1) / scale)), pointwise([[1]], None)) for value in x]
    np.testing.assert_array_equal(input_levels(x, float(scale), weight_grid(8)), expected)
    assert (quantize(x, scale, weight_grid(8)) != expected).any()
    with pytest.raises(ValueError, match="finite and positive"):
        input_levels(x, 0.0, weight_grid(8))


GOOD = dict(weight=np.ones((4, 2, 3, 3), int), weight_scales=np.ones(4), bias=np.ones(4), input_scale=1.0,
            output_scale=1.0, output_grid=activation_grid(8))


@pytest.mark.parametrize("change, error, message", [
    (dict(weight=np.ones((4, 2, 3, 3))), TypeError, "weight must hold integer levels"),
    (dict(weight=np.full((4, 2, 3, 3), 128)), ValueError, "must fit int8, got 128 to 128"),
    (dict(weight=np.ones((4, 2), int)), ValueError, r"must be \[O, I / groups, kh, kw\]"),
    (dict(groups=3), ValueError, r"multiple of groups \(3\)"),
    (dict(weight=np.ones((4, 3, 3, 3), int), groups=4), ValueError, "4 groups of 3 to 1 channels in int8"),
    (dict(weight_scales=np.ones(1)), ValueError, r"weight_scales must have shape \(4,\)"),
    (dict(bias=np.ones((4, 1))), ValueError, r"bias must have shape \(4,\)"),
    (dict(weight_scales=np.array([1, 1, 0, 1.0])), ValueError, "index 2 of 4"),
    (dict(output_scale=np.nan), ValueError, "finite and positive"),
])
def test_what_is_not_a_convolution_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        IntegerConv(**dict(GOOD, **change))


@pytest.mark.parametrize("q_x, error, message", [
    (np.ones((1, 2, 5, 5)), TypeError, "q_x must hold integer levels"),
    (np.ones((1, 3, 5, 5), int), ValueError, r"must be \[N, 2, H, W\]"),
    (np.ones((2, 5, 5), int), ValueError, r"must be \[N, 2, H, W\]"),
    (np.full((1, 2, 5, 5), -129), ValueError, "must fit int8"),
    (np.ones((1, 2, 2, 5), int), ValueError, "kernel of 3 with dilation 1 does not fit 2"),
])
def test_inputs_that_do_not_fit_are_refused(q_x, error, message):
    with pytest.raises(error, match=message):
        simulate_conv(q_x, IntegerConv(**GOOD))


def test_levels_beyond_the_zero_point_are_refused():
    conv = IntegerConv(**dict(GOOD, input_zero_point=-128))
    simulate_conv(np.full((1, 2, 5, 5), 255), conv)
    with pytest.raises(ValueError, match="must fit int8 with zero point -128, got 256 to 256"):
        simulate_conv(np.full((1, 2, 5, 5), 256), conv)


def test_what_overflows_32_bits_is_refused():
    conv = pointwise([[1], [1]], [3e9, 0.0], groups=2)
    with pytest.raises(ValueError, match="does not fit the 32-bit accumulator"):
        simulate_conv(np.ones((1, 2, 1, 1), int), conv)


@pytest.mark.parametrize("shape, axes", [((2, 3, 5, 7), 2), ((2, 3, 16), 1), ((4, 1, 1), 2)])
def test_a_mean_is_summed_from_the_first_value_to_the_last(shape, axes):
    x = (np.random.RandomState(0).randint(-127, 128, shape) * np.float32(0.0472)).astype(np.float32)
    found = simulate_mean(x, axes)
    assert found.dtype == np.float32
    assert found.shape == shape[:len(shape) - axes] + (1,) * axes
    for index in np.ndindex(*shape[:len(shape) - axes]):
        total = np.float32(0)
        for value in x[index].ravel():
            total = np.float32(total + value)
        assert found[index].ravel()[0] == np.float32(total / np.float32(x[index].size))
