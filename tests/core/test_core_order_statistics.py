"""Selection of the lowest values against a full sort that looks at one value after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtrain.core.order_statistics import Run, lowest, weighted_threshold

SIZES = (1, 4, 3)


def some_values(kind, generator, count):
    values = np.abs(generator.randn(count)).astype(np.float32)
    if kind == "half zeros":
        values[generator.rand(count) < 0.5] = 0
    elif kind == "few values":
        values = np.floor(values * 3)
    elif kind == "tail":
        values = values ** 20
    elif kind == "sorted":
        values.sort()
    elif kind == "pruned before":
        values[generator.rand(count) < 0.6] = -1
    elif kind == "misleading sample":
        values[::61] += 100
    return values


def by_sorting(runs, weight):
    """Take values in the order of their size, then their place, until the next would lead away from the weight."""
    everything = sorted((value, run, place) for run, (values, _) in enumerate(runs) for place, value in
                        enumerate(values.tolist()))
    flags = [np.zeros(len(values), bool) for values, _ in runs]
    missing = weight
    for _, run, place in everything:
        if 2 * missing < runs[run].size:
            break
        flags[run][place] = True
        missing -= runs[run].size
    return flags


@pytest.mark.parametrize("kind", ["normal", "half zeros", "few values", "tail", "sorted", "pruned before",
                                  "misleading sample"])
@pytest.mark.parametrize("count", [300, 20000])
@given(seed=st.integers(0, 10 ** 6), share=st.floats(0, 1), runs=st.integers(1, 3))
@settings(max_examples=5)
def test_the_lowest_are_those_of_a_full_sort(kind, count, seed, share, runs):
    generator = np.random.RandomState(seed)
    runs = [Run(some_values(kind, generator, generator.randint(count)), size) for size in SIZES[:runs]]
    weight = int(round(share * sum(run.size * len(run.values) for run in runs)))
    for found, wanted in zip(lowest(runs, weight), by_sorting(runs, weight)):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["normal", "half zeros", "few values", "pruned before", "misleading sample"])
@pytest.mark.parametrize("rank", [1, 7, 5000, 60000, 99999, 100000])
def test_the_threshold_is_the_value_at_its_rank(kind, rank):
    values = some_values(kind, np.random.RandomState(rank), 100000)
    assert weighted_threshold([Run(values[:30000], 1), Run(values[30000:], 1)], rank) == np.sort(values)[rank - 1]


def test_infinity_can_be_the_threshold():
    values = np.full(20000, np.inf, np.float32)
    values[:5000] = 1
    assert weighted_threshold([Run(values, 1)], 5001) == np.inf
    assert [int(flags.sum()) for flags in lowest([Run(values, 1)], 15000)] == [15000]
