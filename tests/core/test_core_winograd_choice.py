"""Trying a layer in Winograd forms, and choosing one."""
import numpy as np
import pytest

from slimtrain.core import (
    Grid,
    IntegerConv,
    WinogradForm,
    WinogradScales,
    max_abs_scale,
    simulate_conv,
    sqnr_db,
    weight_grid,
)
from slimtrain.core.winograd import largest_ratio, simulate_winograd, stable_ratio, transforms
from slimtrain.core.winograd_choice import WinogradChoice, check_sqnr, choose_form, forms_of_kernel, try_form

F2, F4 = WinogradForm(2, 3), WinogradForm(4, 3)
PADDING = ((1, 1), (1, 0))


def _operands(seed=0):
    rng = np.random.RandomState(seed)
    x, weight = rng.randint(-127, 128, (2, 5, 9, 8)), rng.randint(-127, 128, (6, 5, 3, 3))
    return x, weight, 0.03, rng.uniform(0.001, 0.002, 6)


@pytest.mark.parametrize("form", [F2, F4], ids=str)
def test_trial_tells_what_the_integer_simulator_loses(form):
    x, weight, input_scale, weight_scales = _operands()
    trial = try_form(x * input_scale, weight * weight_scales[:, None, None, None], form, input_scale, weight_scales,
                     PADDING)
    assert trial.scales.shape == (form.positions, 7)
    bounds = largest_ratio(transforms(form).input), largest_ratio(transforms(form).weight)
    scales = WinogradScales(form, stable_ratio(np.minimum(trial.scales[:, 0] / input_scale, bounds[0])),
                            stable_ratio(np.minimum(trial.scales[:, 1:] / weight_scales, bounds[1])))
    # outputs so fine that their own rounding is nothing beside what the transforms lose
    conv = IntegerConv(weight, weight_scales, None, input_scale, 1e-4, Grid(8, -10**7, 10**7), padding=PADDING)
    found = sqnr_db(simulate_conv(x, conv), simulate_winograd(x, conv, scales))
    assert found == pytest.approx(trial.sqnr_db, abs=0.1)


def test_searched_scales_beat_those_of_the_largest_value():
    x, weight, input_scale, weight_scales = _operands(1)
    values = np.random.RandomState(2).standard_t(3, x.shape) * input_scale * 20
    levels = np.clip(np.round(values / input_scale), -127, 127) * input_scale
    found = try_form(levels, weight * weight_scales[:, None, None, None], F2, input_scale, weight_scales, PADDING)
    flat = np.abs(levels).max() * 4 / 127
    assert (found.scales[:, 0] < flat).all()
    assert found.scales[0, 0] > float(max_abs_scale(levels, weight_grid(8))) / 20
    assert found.sqnr_db > 25


def test_larger_tiles_lose_more():
    x, weight, input_scale, weight_scales = _operands(3)
    arguments = input_scale, weight_scales, PADDING
    real = weight * weight_scales[:, None, None, None]
    results = [try_form(x * input_scale, real, form, *arguments).sqnr_db for form in (F2, F4)]
    assert results[0] > results[1] + 6


def test_the_first_form_that_is_near_enough_is_taken():
    results = {F4: 18.0, F2: 34.0}
    assert choose_form("c", results, 10).form == F4
    assert choose_form("c", results, 18.0).form == F4
    assert choose_form("c", results, 25) == WinogradChoice("c", F2, results, "")
    plain = choose_form("c", results, 40)
    assert plain.form is None
    assert "sensitivity" in plain.reason and "40 dB" in plain.reason
    impossible = choose_form("c", results, 10, "it is odd")
    assert (impossible.form, impossible.reason) == (None, "it is odd")


@pytest.mark.parametrize("kernel, forms", [
    ((3, 3), [(4, 3), (2, 3)]), ((5, 5), [(2, 5)]), ((2, 2), [(5, 2), (3, 2)]), ((4, 4), [(3, 4)]),
    ((1, 1), []), ((3, 5), []), ((6, 6), []), ((7, 7), []), ((3,), [])])
def test_forms_of_kernels(kernel, forms):
    assert [tuple(form) for form in forms_of_kernel(kernel)] == forms
    for form in forms_of_kernel(kernel):
        transforms(form)


@pytest.mark.parametrize("value", [None, "25", True, float("nan")])
def test_only_decibels_are_a_threshold(value):
    with pytest.raises(ValueError, match="decibels"):
        check_sqnr(value)


def test_numbers_are_thresholds():
    for value in (25, -3.5, float("inf"), float("-inf")):
        check_sqnr(value)
