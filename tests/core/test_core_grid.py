"""The grid against loops over Python numbers, and the properties that every grid must have."""

import decimal
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimtrain.core import (
    Grid,
    activation_grid,
    capped_grid,
    dequantize,
    fake_quantize,
    quantize,
    round_half_away,
    weight_grid,
)

GRIDS = ([weight_grid(bits) for bits in range(2, 9)]
         + [activation_grid(bits, signed=False) for bits in range(2, 9)])

grids = st.sampled_from(GRIDS)
scales = st.floats(2.0**-13, 1024, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5),
                    elements=st.floats(-1e4, 1e4, width=32))


def naive_level(x, scale, grid, zero_point=0):
    """One level by way of exact decimals."""
    quotient = decimal.Decimal(float(x)) / decimal.Decimal(float(scale))
    nearest = int(quotient.quantize(decimal.Decimal(1), rounding=decimal.ROUND_HALF_UP))
    return min(max(nearest + zero_point, grid.lower), grid.upper)


@pytest.mark.parametrize("bits, lower, upper", [
    (2, -2, 1), (3, -4, 3), (4, -8, 7), (5, -16, 15), (6, -32, 31), (7, -64, 63), (8, -127, 127)])
def test_signed_grids(bits, lower, upper):
    assert weight_grid(bits) == activation_grid(bits) == Grid(bits, lower, upper)
    assert weight_grid(bits).signed


@pytest.mark.parametrize("bits, upper", [(2, 3), (3, 7), (4, 15), (5, 31), (6, 63), (7, 127)])
def test_unsigned_grids_start_at_zero(bits, upper):
    assert activation_grid(bits, signed=False) == Grid(bits, 0, upper)
    assert not activation_grid(bits, signed=False).signed


def test_eight_bit_activations_are_int8_even_if_unsigned():
    assert activation_grid(8, signed=False) == Grid(8, -127, 127)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 2.5, None, "8"])
@pytest.mark.parametrize("make", [weight_grid, activation_grid])
def test_other_bits_are_refused(make, bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        make(bits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_go_away_from_zero(dtype):
    x = np.array([-3.5, -2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 3.5], dtype=dtype)
    rounded = round_half_away(x)
    np.testing.assert_array_equal(rounded, [-4, -3, -2, -1, 0, 0, 1, 2, 3, 4])
    assert rounded.dtype == dtype


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(abs(x) - 0.5) > 1e-15))
def test_rounding_agrees_with_decimals(x):
    assert float(round_half_away(np.float64(x))) == naive_level(x, 1.0, Grid(8, -10**7, 10**7))


def test_the_float32_below_a_half_rounds_up_as_in_the_runtime():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert quantize(below, 1.0, weight_grid(8)) == 1
    assert quantize(np.float64(below), 1.0, weight_grid(8)) == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_against_exact_decimals(grid):
    x = np.random.RandomState(0).randn(200) * grid.upper / 2
    expected = [naive_level(value, 0.37, grid) for value in x]
    np.testing.assert_array_equal(quantize(x, 0.37, grid), expected)
    assert quantize(x, 0.37, grid).dtype == np.int32


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_one_scale_per_channel(axis):
    rng = np.random.RandomState(1)
    x = rng.randn(3, 4, 5)
    scale, zero_point = rng.uniform(0.1, 0.5, x.shape[axis]), rng.randint(-3, 4, x.shape[axis])
    grid = weight_grid(4)
    levels = quantize(x, scale, grid, axis=axis, zero_point=zero_point)
    real = dequantize(levels, scale, axis=axis, zero_point=zero_point, dtype=np.float64)
    for index in np.ndindex(*x.shape):
        channel = index[axis]
        expected = naive_level(x[index], scale[channel], grid, int(zero_point[channel]))
        assert levels[index] == expected
        assert real[index] == (expected - zero_point[channel]) * scale[channel]
    np.testing.assert_array_equal(fake_quantize(x, scale, grid, axis=axis, zero_point=zero_point), real)


def test_float32_is_computed_in_float32():
    rng = np.random.RandomState(2)
    scale = np.float32(0.0371)
    x = ((rng.randint(-100, 100, 5000) + np.float32(0.5)) * scale).astype(np.float32)
    expected = [math.copysign(math.floor(abs(value / scale) + np.float32(0.5)), value) for value in x]
    np.testing.assert_array_equal(quantize(x, scale, weight_grid(8)), expected)
    assert (quantize(x.astype(np.float64), float(scale), weight_grid(8)) != expected).any()
    for given_scale in (float(scale), np.float64(scale), np.array([scale], dtype=np.float64)):
        np.testing.assert_array_equal(quantize(x, given_scale, weight_grid(8)), expected)
        assert fake_quantize(x, given_scale, weight_grid(8)).dtype == np.float32


@given(arrays, scales, grids)
def test_levels_are_on_the_grid_and_within_half_a_step(x, scale, grid):
    levels = quantize(x, scale, grid)
    assert levels.shape == x.shape
    assert levels.min() >= grid.lower and levels.max() <= grid.upper
    real = x.astype(np.float64)
    inside = (real >= grid.lower * scale) & (real <= grid.upper * scale)
    error = np.abs(levels * scale - real)[inside]
    assert (error <= scale * (0.5 + 1e-4)).all()


@given(arrays, scales, grids)
def test_fake_quantization_is_idempotent_and_keeps_order(x, scale, grid):
    once = fake_quantize(x, scale, grid)
    np.testing.assert_array_equal(fake_quantize(once, scale, grid), once)
    flat = np.sort(x.ravel())
    assert (np.diff(quantize(flat, scale, grid)) >= 0).all()


@given(arrays, scales)
def test_eight_bits_are_symmetric(x, scale):
    np.testing.assert_array_equal(quantize(-x, scale, weight_grid(8)), -quantize(x, scale, weight_grid(8)))


@given(arrays, scales, grids, st.integers(-5, 5))
def test_fake_quantization_is_both_halves(x, scale, grid, zero_point):
    halves = dequantize(quantize(x, scale, grid, zero_point=zero_point), scale, zero_point=zero_point)
    np.testing.assert_array_equal(fake_quantize(x, scale, grid, zero_point=zero_point), halves)
    assert halves.dtype == np.float32


@given(arrays, st.floats(2.0**-7, 3, width=32), grids)
def test_a_capped_grid_equals_clipping_before_rounding(x, scale, grid):
    clipped = np.minimum(x, np.float32(6))
    capped = capped_grid(grid, scale)
    np.testing.assert_array_equal(quantize(clipped, scale, grid), quantize(x, scale, capped))


def test_capped_grid_by_hand():
    assert capped_grid(weight_grid(8), 0.1) == Grid(8, -127, 60)
    assert capped_grid(weight_grid(8), 0.01) == weight_grid(8)
    assert capped_grid(activation_grid(4, signed=False), 0.5, cap=1.0) == Grid(4, 0, 2)


def test_infinities_saturate():
    x = np.array([-np.inf, np.inf, -3e38, 3e38], dtype=np.float32)
    np.testing.assert_array_equal(quantize(x, 1e-6, weight_grid(4)), [-8, 7, -8, 7])


def test_integers_and_empty_arrays_are_numbers_too():
    np.testing.assert_array_equal(quantize(np.array([-3, 0, 5]), 2.0, weight_grid(8)), [-2, 0, 3])
    assert quantize(np.array([2**24 + 1]), 1.0, Grid(32, -2**31, 2**31 - 1)) == 2**24 + 1
    assert quantize(np.zeros((0, 3)), np.ones(3), weight_grid(8), axis=1).shape == (0, 3)


def test_nan_is_refused_and_counted():
    with pytest.raises(ValueError, match="NaN: 2 of 3"):
        quantize(np.array([np.nan, 1.0, np.nan]), 1.0, weight_grid(8))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 1e-60])
def test_a_bad_scale_is_named_by_its_channel(bad):
    x, scale = np.ones((2, 3), dtype=np.float32), np.array([1.0, 1.0, bad])
    for call in (quantize, fake_quantize):
        with pytest.raises(ValueError, match="index 2 of 3"):
            call(x, scale, weight_grid(8), axis=1)
    with pytest.raises(ValueError, match="index 2 of 3"):
        dequantize(np.ones((2, 3), dtype=np.int32), scale, axis=1)


@pytest.mark.parametrize("scale, axis, message", [
    (np.ones(2), 1, r"scale must have shape \(3,\)"),
    (np.ones((3, 1)), 1, r"scale must have shape \(3,\)"),
    (np.ones(3), None, "without an axis"),
    (np.ones(3), 2, "axis 2 does not exist"),
    (np.ones(2), -3, "axis -3 does not exist"),
])
def test_scales_that_do_not_fit_are_refused(scale, axis, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.ones((2, 3)), scale, weight_grid(8), axis=axis)


def test_zero_points_are_integers():
    with pytest.raises(ValueError, match="zero_point must hold integers"):
        quantize(np.ones(3), 1.0, weight_grid(8), zero_point=0.5)
