"""Winograd's transforms against direct convolution, and the ratios that keep integers away from ties."""
import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from convolution import convolve
from slimtrain.core import (
    Activation,
    Grid,
    IntegerConv,
    WinogradForm,
    WinogradScales,
    simulate_conv,
    sqnr_db,
)
from slimtrain.core.winograd import (
    largest_gain,
    largest_ratio,
    simulate_winograd,
    stable_ratio,
    tiles,
    transform_weight,
    transforms,
    winograd_convolution,
)

FORMS = [WinogradForm(2, 3), WinogradForm(4, 3), WinogradForm(2, 5), WinogradForm(3, 4), WinogradForm(3, 2)]
PADDINGS = [((0, 0), (0, 0)), ((1, 0), (2, 1)), ((2, 2), (2, 2))]
INT8 = Grid(8, -127, 127)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_the_convolution(form, padding):
    rng = np.random.RandomState(0)
    x, weight = rng.randn(2, 3, 7, 9), rng.randn(5, 3, form.kernel, form.kernel)
    expected = convolve(np.pad(x, ((0, 0), (0, 0)) + padding, mode="constant"), weight)
    np.testing.assert_allclose(winograd_convolution(x, weight, form, padding), expected, rtol=0, atol=1e-12)


def test_known_transforms():
    # Lavin and Gray, arXiv 1509.09308, section 4.1, up to the sign of the first and last rows
    matrices = transforms(WinogradForm(2, 3))
    np.testing.assert_array_equal(np.abs(matrices.weight), [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_array_equal(np.abs(matrices.output), [[1, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(
        np.abs(matrices.input), [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])


def test_gain_bounds_what_the_transform_makes_of_the_largest_numbers():
    form, rng = WinogradForm(4, 3), np.random.RandomState(1)
    weight = rng.choice([-1.0, 1.0], (4000, 1, 3, 3))
    seen = np.abs(transform_weight(weight, form)).max(axis=(1, 2))
    np.testing.assert_allclose(seen, largest_gain(transforms(form).weight), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_transformed_integer_is_near_a_tie(form):
    rng = np.random.RandomState(2)
    weight_denominator = 4 if form.tile == 4 else 576
    for denominator, matrix, margin in ((1, transforms(form).input, 1 / 510),
                                        (weight_denominator, transforms(form).weight, 1 / 4590)):
        for ratio in stable_ratio(rng.uniform(0.001, largest_ratio(matrix), 40)):
            exact = Fraction(float(ratio))
            for numerator in rng.randint(-3000, 3000, 50):
                quotient = Fraction(int(numerator), denominator) / exact
                distance = abs((quotient - Fraction(1, 2)) % 1)
                assert min(distance, 1 - distance) >= margin - 1e-12


def test_ratios_are_near_what_was_asked_for_and_stay_when_asked_again():
    asked = np.geomspace(1e-5, 200, 1000)
    given = stable_ratio(asked)
    assert np.abs(given / asked - 1).max() < 1 / 127
    np.testing.assert_array_equal(stable_ratio(given), given)
    np.testing.assert_array_equal(given.astype(np.float32), given)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_are_transformed_exactly_in_float64(form):
    rng = np.random.RandomState(3)
    weight = rng.randint(-127, 128, (3, 2, form.kernel, form.kernel))
    denominator = 1 if form.tile == 4 else 9
    scaled = transform_weight(weight, form) * 64 * denominator
    np.testing.assert_allclose(scaled, np.round(scaled), rtol=0, atol=1e-8)


def _conv(form, rng, **options):
    weight = rng.randint(-127, 128, (4, 3, form.kernel, form.kernel))
    return IntegerConv(weight, rng.uniform(0.001, 0.002, 4), rng.randn(4), 0.05, 0.2, INT8, padding=((1, 1), (0, 2)),
                       **options)


@pytest.mark.parametrize("form", [WinogradForm(2, 3), WinogradForm(3, 2)], ids=str)
def test_without_loss_it_is_the_plain_convolution(form):
    # 14 * 9 quarters and 31 * 4 still fit 8 bits
    rng = np.random.RandomState(4)
    conv = _conv(form, rng, activation=Activation.RELU)
    conv = dataclasses.replace(conv, weight=conv.weight % 29 - 14, bias=conv.bias / 50, output_scale=0.002)
    levels = rng.randint(-31, 32, (2, 3, 8, 8))
    scales = WinogradScales(form, np.ones(form.positions), np.full((form.positions, 4), 0.25))
    expected = simulate_conv(levels, conv)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(simulate_winograd(levels, conv, scales), expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_coarser_scales_lose_more(form):
    rng = np.random.RandomState(4)
    conv, levels = _conv(form, rng), rng.randint(-127, 128, (2, 3, 8, 8))
    gains = [largest_gain(matrix) for matrix in (transforms(form).input, transforms(form).weight)]
    results = []
    for factor in (1, 4, 16):
        scales = WinogradScales(form, gains[0] * factor, np.repeat(gains[1][:, None] * factor, 4, axis=1))
        results.append(sqnr_db(simulate_conv(levels, conv), simulate_winograd(levels, conv, scales)))
    assert results[0] > results[1] + 3 > results[2] + 6


def test_naive_tiles():
    form, rng = WinogradForm(2, 3), np.random.RandomState(5)
    x = rng.randn(2, 3, 5, 6)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 4)))
    found = tiles(x, form, ((1, 0), (0, 1)))
    assert found.shape == (16, 3, 2, 2, 3)
    for row in range(2):
        for column in range(3):
            expected = padded[:, :, 2 * row:2 * row + 4, 2 * column:2 * column + 4].transpose(2, 3, 1, 0)
            np.testing.assert_array_equal(found[:, :, :, row, column], expected.reshape(16, 3, 2))


@pytest.mark.parametrize("form", [(1, 3), (3, 1), (3, 3), (6, 3), (2, 7)])
def test_forms_without_a_kernel_are_refused(form):
    with pytest.raises(ValueError, match="tile of 4 or 6"):
        transforms(WinogradForm(*form))


def test_what_a_form_cannot_compute_is_refused():
    form, rng = WinogradForm(2, 3), np.random.RandomState(6)
    levels = rng.randint(-127, 128, (1, 3, 8, 8))
    scales = WinogradScales(form, np.ones(16), np.ones((16, 4)))
    for options in ({"strides": (2, 2)}, {"dilation": (2, 2)}):
        with pytest.raises(ValueError, match="stride and dilation 1"):
            simulate_winograd(levels, _conv(form, rng, **options), scales)
    with pytest.raises(ValueError, match=r"needs a weight of \[O, I, 3, 3\]"):
        winograd_convolution(np.ones((1, 1, 8, 8)), np.ones((1, 1, 5, 5)), form)
    with pytest.raises(ValueError, match="does not fit"):
        winograd_convolution(np.ones((1, 1, 2, 8)), np.ones((1, 1, 3, 3)), form)
