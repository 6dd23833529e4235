"""The choice of bits against trying all of them."""
import itertools
import time

import numpy as np
import pytest

from slimtrain.core import LayerState
from slimtrain.core.bit_choice import FLOAT_BITS, BitResult, BitSensitivity, choose_bits, stored_size


def problem(seed, layers=5, widths=(8, 6, 4, 3, 2), whole=False):
    rng = np.random.RandomState(seed)
    results = []
    for index in range(layers):
        weights, cost = rng.randint(50, 5000), rng.lognormal(-3, 2)
        for bits in widths:
            loss = cost * 4.0 ** -bits * rng.uniform(0.5, 2) - 1e-6
            results.append(BitResult("l%d" % index, bits, stored_size(weights, 8, bits), 0.0,
                                     round(loss * 100) if whole else loss))
    return BitSensitivity(LayerState.WEIGHT_ONLY, 0.5, tuple(results))


def everything(sensitivity):
    options = [[result for result in sensitivity.results if result.layer == layer] for layer in sensitivity.layers]
    for chosen in itertools.product(*options):
        yield sum(result.bytes for result in chosen), sum(max(result.loss, 0) for result in chosen)


@pytest.mark.parametrize("whole", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all(seed, whole):
    sensitivity = problem(seed, whole=whole)
    plans = list(everything(sensitivity))
    smallest, largest = min(plans)[0], max(plans)[0]
    for budget in np.linspace(smallest, largest, 7):
        plan = sensitivity.choose(largest_bytes=budget)
        assert plan.bytes <= budget
        assert plan.loss == pytest.approx(min(loss for size, loss in plans if size <= budget), rel=1e-12, abs=1e-15)
    for budget in np.quantile([loss for _, loss in plans], [0.0, 0.1, 0.5, 1.0]):
        plan = sensitivity.choose(largest_loss=budget * (1 + 1e-9))
        assert plan.loss <= budget * (1 + 1e-9)
        assert plan.bytes == min(size for size, loss in plans if loss <= budget * (1 + 1e-9))
    assert sum(result.bytes for result in sensitivity.results if plan.bits[result.layer] == result.bits) == plan.bytes


def test_plan_says_what_a_quantizer_wants():
    results = [BitResult("a", 32, 400, 99.0, 0.0), BitResult("a", 4, 54, 5.0, 1.0),
               BitResult("b", 32, 400, 99.0, 0.0), BitResult("b", 4, 54, 30.0, 0.001)]
    plan = BitSensitivity(LayerState.WEIGHT_ONLY, 0.1, tuple(results)).choose(largest_loss=0.01)
    assert plan.bits == {"a": FLOAT_BITS, "b": 4}
    assert plan.layer_bits == {"b": 4}
    assert plan.skip_quant_layers == ["a"]
    assert (plan.bytes, plan.loss) == (454, 0.001)


def test_noise_below_zero_is_no_gain():
    results = [BitResult("a", 8, 100, 0.0, -0.5), BitResult("b", 8, 100, 0.0, 0.2), BitResult("b", 2, 10, 0.0, 0.4)]
    plan = BitSensitivity(LayerState.WEIGHT_ONLY, 0.1, tuple(results)).choose(largest_loss=0.3)
    assert plan.bits == {"a": 8, "b": 8}
    assert plan.loss == pytest.approx(0.2)


def test_a_hundred_layers_take_a_moment():
    sensitivity, start = problem(1, layers=100), time.perf_counter()
    total = sum(result.bytes for result in sensitivity.results if result.bits == 4)
    plan = sensitivity.choose(largest_bytes=total)
    uniform = sum(max(result.loss, 0) for result in sensitivity.results if result.bits == 4)
    assert plan.bytes <= total
    assert plan.loss < uniform / 2
    assert time.perf_counter() - start < 60


def test_bad_budgets_are_refused():
    sensitivity = problem(0)
    for arguments in ({}, {"largest_bytes": 1e9, "largest_loss": 1.0}):
        with pytest.raises(ValueError, match="one budget"):
            sensitivity.choose(**arguments)
    with pytest.raises(ValueError, match="no choice of bits meets the budget of 10 bytes"):
        sensitivity.choose(largest_bytes=10)
    with pytest.raises(ValueError, match="meets the budget of a loss of -1"):
        sensitivity.choose(largest_loss=-1.0)
    with pytest.raises(ValueError, match="'a' has no width"):
        choose_bits({"a": []}, largest_bytes=1)


def test_sizes():
    assert stored_size(1000, 10, 32) == 4000
    assert stored_size(1000, 10, 4) == 540
    assert stored_size(3, 1, 2) == 5
