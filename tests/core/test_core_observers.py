"""Streaming observers against all data at once, kept and looked at by plain loops."""
import math
import tracemalloc

import numpy as np
import pytest

from slimtrain.core import (
    ActivationMethod,
    Observation,
    WeightMethod,
    activation_grid,
    admm_scale,
    calibrated_scale,
    entropy_threshold,
    fake_quantize,
    max_abs_scale,
    method_of,
    mse_scale,
    observe,
    observe_together,
    sample_stride,
    weight_grid,
    weight_scales,
)
from slimtrain.core.observers import BINS, EMA_DECAY, LARGEST_SAMPLE


def seen_of(batches):
    seen = Observation()
    for batch in batches:
        seen = observe(seen, batch)
    return seen


def growing(rng, count=12, dtype=np.float32):
    """Batches whose range grows by a factor of a thousand, with zeros in them."""
    batches = [(rng.normal(size=(4, 50)) * 1000 ** (i / count) * 1e-2).astype(dtype) for i in range(count)]
    for batch in batches:
        batch[rng.uniform(size=batch.shape) < 0.2] = 0
    return batches


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [1, -1])
def test_histogram_is_that_of_all_values_whatever_their_order(dtype, order):
    batches = growing(np.random.RandomState(0), dtype=dtype)[::order]
    seen, everything = seen_of(batches), np.concatenate(batches).reshape(-1)
    edges = np.linspace(-seen.limit, seen.limit, 2 * BINS + 1)
    expected, _ = np.histogram(everything[everything != 0].astype(np.float64), edges)
    np.testing.assert_array_equal(seen.counts, expected)
    assert seen.zeros == (everything == 0).sum()
    assert (seen.lowest, seen.highest) == (everything.min(), everything.max())
    assert np.abs(everything).max() < seen.limit <= 2 * np.abs(everything).max()


def test_averages_of_the_range_follow_the_batches():
    batches = [np.array([-1.0, 2.0]), np.array([-3.0, 1.0]), np.array([0.5, 4.0])]
    low, high = -1.0, 2.0
    for batch in batches[1:]:
        low = EMA_DECAY * low + (1 - EMA_DECAY) * min(batch.min(), 0)
        high = EMA_DECAY * high + (1 - EMA_DECAY) * batch.max()
    seen = seen_of(batches)
    assert (seen.average_lowest, seen.average_highest) == pytest.approx((low, high))
    assert seen.batches == 3
    grid = activation_grid(8)
    assert calibrated_scale(seen, grid, ActivationMethod.EMA) == pytest.approx(max(-low, high) / 127)


def test_observing_leaves_the_state_before_as_it_was():
    first = observe(Observation(), np.ones(10))
    counts = first.counts.copy()
    observe(first, np.full(10, 1000.0))
    np.testing.assert_array_equal(first.counts, counts)
    assert Observation().counts.sum() == 0


@pytest.mark.parametrize("values", [np.zeros(5), np.array([1e-30, -1e-30]), np.array([3e38]), np.float16([1, 2])],
                         ids=["zeros", "tiny", "huge", "half"])
def test_extreme_values_are_counted(values):
    seen = observe(Observation(), values)
    assert seen.counts.sum() + seen.zeros == values.size
    for method in ActivationMethod:
        assert math.isfinite(calibrated_scale(seen, activation_grid(8), method))


@pytest.mark.parametrize("values", [np.array([]), np.array([1.0, np.nan]), np.array([np.inf])])
def test_values_that_cannot_be_observed_are_refused(values):
    with pytest.raises(ValueError, match="cannot observe"):
        observe(Observation(), values)


def test_tensors_that_share_a_scale_are_one():
    rng = np.random.RandomState(4)
    parts = [rng.normal(size=(3, 7)).astype(np.float32), rng.normal(size=11).astype(np.float32) * 5]
    together, one = observe_together(Observation(), parts), observe(Observation(), np.concatenate(
        [part.reshape(-1) for part in parts]))
    np.testing.assert_array_equal(together.counts, one.counts)
    assert together._replace(counts=0) == one._replace(counts=0)
    with pytest.raises(ValueError, match="empty"):
        observe_together(Observation(), [np.zeros(2), np.zeros((0, 3))])


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        calibrated_scale(Observation(), activation_grid(8), ActivationMethod.KL)


def test_ten_thousand_batches_take_no_more_memory_than_a_hundred():
    def peak(count):
        rng = np.random.RandomState(0)
        tracemalloc.start()
        seen = Observation()
        for index in range(count):
            # widens in both, once in the middle and never again
            seen = observe(seen, rng.standard_normal(64).astype(np.float32) * (100 if index == 50 else 1))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen.batches == count
        return highest

    few = peak(100)
    assert peak(10000) <= 1.05 * few


def test_a_large_tensor_is_sampled_evenly_and_its_range_is_exact():
    values = np.zeros((64, 4096), np.float32)
    values[3, 17] = 100.0
    seen = observe(Observation(), values)
    assert seen.highest == 100.0
    assert seen.zeros + seen.counts.sum() <= LARGEST_SAMPLE
    # a channel in eight of an image is met like any other
    stride = sample_stride(64 * 4096)
    assert len({(index // 64) % 8 for index in range(0, 64 * 4096, stride)}) == 8
    assert len({index % 8 for index in range(0, 64 * 4096, stride)}) == 8


def naive_entropy(counts, levels):
    """Migacz's algorithm, bin by bin."""
    used = max((i + 1 for i, count in enumerate(counts) if count), default=0)
    if used <= levels:
        return max(used, 1)
    best, chosen = None, None
    for size in [*range(levels, used, 4), used]:
        reference = [float(count) for count in counts[:size]]
        reference[-1] += sum(counts[size:])
        quantized = [0.0] * size
        for level in range(levels):
            bins = range(level * size // levels, (level + 1) * size // levels)
            present = [i for i in bins if reference[i] > 0]
            total = sum(counts[i] for i in bins)
            for i in present:
                quantized[i] = total / len(present)
        p_sum, q_sum = sum(reference), sum(quantized)
        divergence = 0.0
        for p, q in zip(reference, quantized):
            if p > 0:
                divergence += math.inf if q == 0 else p / p_sum * math.log((p / p_sum) / (q / q_sum))
        if best is None or divergence < best - 1e-12:
            best, chosen = divergence, size
    return chosen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [7, 15, 127])
def test_entropy_threshold_is_that_of_the_algorithm_bin_by_bin(seed, levels):
    rng = np.random.RandomState(seed)
    values = np.concatenate([np.abs(rng.normal(size=2000)), rng.uniform(0, 12, size=20)])
    counts = np.histogram(values, 512, (0, 13))[0]
    assert entropy_threshold(counts, levels) == naive_entropy(counts.tolist(), levels)


def test_entropy_threshold_clips_outliers_and_keeps_a_uniform_range():
    rng = np.random.RandomState(0)
    tail = np.histogram(np.append(np.abs(rng.normal(size=100000)), [40.0]), BINS, (0, 64))[0]
    assert entropy_threshold(tail, 127) * 64 / BINS < 10
    uniform = np.histogram(rng.uniform(0, 60, size=1000000), BINS, (0, 64))[0]
    assert entropy_threshold(uniform, 127) * 64 / BINS > 55


@pytest.mark.parametrize("counts", [np.zeros((2, 2)), np.array([-1, 2])])
def test_entropy_of_no_histogram_is_refused(counts):
    with pytest.raises(ValueError, match="non-negative counts"):
        entropy_threshold(counts, 7)


def error(values, scale, grid):
    return float(np.square(fake_quantize(values, scale, grid) - values).sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", [ActivationMethod.MSE, ActivationMethod.ADMM])
def test_scales_from_a_histogram_err_as_little_as_those_from_all_values(method, bits):
    rng = np.random.RandomState(1)
    batches = [rng.standard_t(4, size=800) for _ in range(10)]
    everything, grid = np.concatenate(batches), activation_grid(bits)
    direct = {ActivationMethod.MSE: mse_scale, ActivationMethod.ADMM: admm_scale}[method](everything, grid)
    found = calibrated_scale(seen_of(batches), grid, method)
    # a bin is a sixteenth of a step or less, so the errors differ in the second order
    assert error(everything, found, grid) <= 1.02 * error(everything, direct, grid)


def test_mse_beats_a_dense_search_or_equals_it():
    rng = np.random.RandomState(2)
    values, grid = rng.standard_t(3, size=5000), activation_grid(6)
    best = min(error(values, scale, grid) for scale in np.linspace(0.01, 1.0, 2000) * np.abs(values).max() / grid.upper)
    found = calibrated_scale(seen_of(np.split(values, 10)), grid, ActivationMethod.MSE)
    assert error(values, found, grid) <= 1.02 * best


def test_max_abs_and_unsigned_ranges():
    seen = seen_of([np.array([-8.0, 1.0]), np.array([0.5, 6.0])])
    assert calibrated_scale(seen, activation_grid(8), ActivationMethod.MAX_ABS) == pytest.approx(8 / 127)
    assert calibrated_scale(seen, activation_grid(4, signed=False), ActivationMethod.MAX_ABS) == pytest.approx(6 / 15)


def test_outliers_cost_less_than_with_the_largest_value():
    rng = np.random.RandomState(3)
    values = rng.normal(size=100000)
    values[::5000] *= 40
    seen, grid, inner = observe(Observation(), values), activation_grid(8), np.abs(values) < 4
    plain = calibrated_scale(seen, grid, ActivationMethod.MAX_ABS)
    for method in (ActivationMethod.KL,):
        assert error(values[inner], calibrated_scale(seen, grid, method), grid) < error(values[inner], plain, grid) / 10


def naive_admm(values, grid):
    """Levels for the scale, the scale for the levels, one value at a time."""
    scale = max(abs(value) for value in values) / grid.upper
    for _ in range(100):
        levels = [min(max(math.copysign(math.floor(abs(v / scale) + 0.5), v), grid.lower), grid.upper) for v in values]
        following = sum(v * q for v, q in zip(values, levels)) / sum(q * q for q in levels)
        if abs(following - scale) <= 1e-9 * scale:
            break
        scale = following
    return scale


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_admm_alternates_until_nothing_changes(bits):
    rng, grid = np.random.RandomState(4), weight_grid(bits)
    weight = rng.standard_t(5, size=(6, 40))
    expected = [naive_admm(row.tolist(), grid) for row in weight]
    np.testing.assert_allclose(admm_scale(weight, grid, axis=0), expected, rtol=1e-6)
    for row, scale, start in zip(weight, expected, max_abs_scale(weight, grid, axis=0)):
        assert error(row, scale, grid) <= error(row, float(start), grid)


def test_counts_stand_for_repeated_values():
    rng, grid = np.random.RandomState(5), activation_grid(4)
    values, counts = rng.normal(size=300), rng.randint(0, 5, size=300)
    for scale in (mse_scale, admm_scale):
        repeated = np.repeat(values, counts)
        counted, direct = scale(values, grid, counts=counts), scale(repeated, grid)
        # the largest value, where the search starts, may be one that never occurs
        assert error(repeated, counted, grid) <= 1.02 * error(repeated, direct, grid)
    for bad in (np.ones(299), -np.ones(300), np.zeros(300)):
        with pytest.raises(ValueError, match="counts must"):
            mse_scale(values, grid, counts=bad)


def test_weight_methods_are_one_scale_per_channel():
    weight, grid = np.random.RandomState(6).normal(size=(5, 3, 2, 2)), weight_grid(8)
    for method, function in ((WeightMethod.MAX_ABS, max_abs_scale), (WeightMethod.ADMM, admm_scale),
                             (WeightMethod.MSE, mse_scale)):
        np.testing.assert_array_equal(weight_scales(weight, grid, method), function(weight, grid, axis=0))


def test_methods_are_known_by_name_in_any_case():
    assert method_of(ActivationMethod, "KL") is ActivationMethod.KL
    assert method_of(WeightMethod, WeightMethod.ADMM) is WeightMethod.ADMM
    with pytest.raises(ValueError, match="'ema', 'kl', 'admm', 'mse', 'max_abs'"):
        method_of(ActivationMethod, "best")
