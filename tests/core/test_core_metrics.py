"""Decibels and output steps against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtrain.core import max_steps, sqnr_db

small = st.lists(st.integers(-50, 50), min_size=1, max_size=20)


@given(small, st.data())
def test_sqnr_by_exact_fractions(reference, data):
    actual = data.draw(st.lists(st.integers(-50, 50), min_size=len(reference), max_size=len(reference)))
    signal = sum(value**2 for value in reference)
    noise = sum((a - b) ** 2 for a, b in zip(reference, actual))
    measured = sqnr_db(np.array(reference), np.array(actual))
    if noise == 0:
        assert measured == math.inf
    elif signal == 0:
        assert measured == -math.inf
    else:
        assert measured == pytest.approx(10 * math.log10(Fraction(signal, noise)), abs=1e-9)


def test_sqnr_by_hand():
    assert sqnr_db(np.array([10.0]), np.array([9.0])) == pytest.approx(20.0)
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(np.zeros(2), np.array([0.0, 1e-3])) == -math.inf
    assert sqnr_db(np.zeros(2), np.zeros(2)) == math.inf


def test_sums_are_float64():
    reference = np.full(100000, 3000.1, dtype=np.float32)
    actual = reference + np.float32(0.25)
    exact = 20 * math.log10(float(reference[0]) / (float(actual[0]) - float(reference[0])))
    assert sqnr_db(reference, actual) == pytest.approx(exact, abs=1e-9)


def test_steps_by_hand():
    assert max_steps(np.array([1.0, 2.0, -3.0]), np.array([1.25, 2.0, -2.5]), 0.25) == 2.0
    assert max_steps(np.ones(3), np.ones(3), 0.1) == 0.0
    with pytest.raises(ValueError, match="finite and positive"):
        max_steps(np.ones(3), np.ones(3), 0.0)


@pytest.mark.parametrize("reference, actual, message", [
    (np.ones(3), np.ones((1, 3)), r"got \(3,\) and \(1, 3\)"),
    (np.ones(0), np.ones(0), "both arrays are empty"),
    (np.array([1.0, np.nan]), np.ones(2), "reference has 1 values of 2"),
    (np.ones(2), np.array([np.inf, np.nan]), "actual has 2 values of 2"),
])
def test_what_cannot_be_compared_is_refused(reference, actual, message):
    with pytest.raises(ValueError, match=message):
        sqnr_db(reference, actual)
    with pytest.raises(ValueError, match=message):
        max_steps(reference, actual, 1.0)
