"""Equalised chains compute what they did; rounding and bias correction against exhaustive search and averages."""
import itertools

import numpy as np
import pytest

from slimtrain.core import (
    ChainLayer,
    InputMoments,
    Op,
    OpKind,
    adaptive_levels,
    add_moments,
    bias_correction,
    equalizable_chains,
    equalize_chain,
    fake_quantize,
    max_abs_scale,
    output_error,
    quantize,
    receptive_fields,
    round_weight,
    weight_grid,
)


def run_chain(x, weights, biases, depthwise):
    for index, (weight, bias, alone) in enumerate(zip(weights, biases, depthwise)):
        rows = weight.reshape(weight.shape[:2])
        x = x * rows[:, 0] if alone else x.dot(rows.T)
        x = x if bias is None else x + bias
        x = np.maximum(x, 0) if index + 1 < len(weights) else x
    return x


def chain(rng):
    weights = [rng.normal(size=(6, 4, 1, 1)), rng.normal(size=(6, 1, 1, 1)), rng.normal(size=(3, 6, 1, 1))]
    weights[0] *= 10.0 ** rng.uniform(-2, 2, size=(6, 1, 1, 1))
    return weights, [rng.normal(size=6), None, rng.normal(size=3)], [False, True, False]


def test_an_equalised_chain_computes_the_same_with_equal_ranges():
    rng = np.random.RandomState(0)
    weights, biases, depthwise = chain(rng)
    x = rng.normal(size=(20, 4))
    result = equalize_chain(weights, biases, depthwise)
    np.testing.assert_allclose(run_chain(x, result.weights, result.biases, depthwise),
                               run_chain(x, weights, biases, depthwise), rtol=1e-9, atol=1e-9)
    first, middle, last = (np.abs(weight) for weight in result.weights)
    np.testing.assert_allclose(first.max(axis=(1, 2, 3)), middle.max(axis=(1, 2, 3)), rtol=1e-2)
    np.testing.assert_allclose(middle.max(axis=(1, 2, 3)), last.max(axis=(0, 2, 3)), rtol=1e-2)


def layer(name, source, output):
    return Op(output, OpKind.LAYER, (source,), name)


def test_chains_end_where_a_factor_cannot_pass():
    ops = [layer("a", "x", "a"), Op("an", OpKind.BATCH_NORM, ("a",)), Op("ar", OpKind.RELU, ("an",)),
           layer("b", "ar", "b"), layer("c", "b", "c"), Op("cr", OpKind.RELU6, ("c",)),       # a, b, c: then a ReLU6
           layer("d", "cr", "d"), layer("e", "d", "e"), Op("sum", OpKind.COMBINE, ("e", "d")),  # d is read twice
           layer("f", "sum", "f1"), layer("f", "f1", "f2"),                                  # f runs twice
           layer("g", "f2", "g"), Op("gp", OpKind.MAX_POOL, ("g",)), layer("h", "gp", "h"), layer("i", "h", "y"),
           layer("j", "y", "z")]                                                             # y leaves the network
    found = equalizable_chains(ops, ["y", "z"], lambda link: True)
    assert found == [(ChainLayer("a", "an"), ChainLayer("b", ""), ChainLayer("c", "")),
                     (ChainLayer("h", ""), ChainLayer("i", ""))]
    split = equalizable_chains(ops, ["y", "z"], lambda link: link.batch_norm != "an")
    assert split == [(ChainLayer("b", ""), ChainLayer("c", "")), (ChainLayer("h", ""), ChainLayer("i", ""))]


def test_dead_channels_stay_as_they_are():
    weights = [np.zeros((2, 3)), np.ones((1, 2))]
    result = equalize_chain(weights, [None, None], [False, False])
    np.testing.assert_array_equal(result.factors[0], 1)
    np.testing.assert_array_equal(result.weights[1], 1)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="reads 3 channels, the one before it makes 2"):
        equalize_chain([np.ones((2, 3)), np.ones((1, 3))], [None, None], [False, False])


@pytest.mark.parametrize("groups", [1, 2])
def test_receptive_fields_are_what_a_convolution_multiplies(groups):
    rng = np.random.RandomState(1)
    x, weight = rng.normal(size=(2, 4, 7, 6)), rng.normal(size=(6, 4 // groups, 3, 2))
    fields = receptive_fields(x, (3, 2), (2, 1), ((1, 0), (1, 2)), (1, 2), groups, 10**6)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (1, 2)), mode="constant")
    rows, columns = (padded.shape[2] - 3) // 2 + 1, padded.shape[3] - 2
    expected = np.zeros((2, 6, rows, columns))
    for n, o, i, j in itertools.product(range(2), range(6), range(rows), range(columns)):
        group = o // (6 // groups)
        part = padded[n, group * 4 // groups:(group + 1) * 4 // groups, 2 * i:2 * i + 3, [j, j + 2]]
        expected[n, o, i, j] = (np.moveaxis(part, 0, -1) * weight[o]).sum()
    found = np.einsum("gsk,gok->gos", fields, weight.reshape(groups, 6 // groups, -1)).reshape(6, 2, rows, columns)
    np.testing.assert_allclose(np.swapaxes(found, 0, 1), expected, atol=1e-12)
    assert receptive_fields(x, (3, 2), (2, 1), ((1, 0), (1, 2)), (1, 2), groups, 5).shape[1] <= 5


def moments_of(batches):
    seen = InputMoments()
    for batch in batches:
        seen = add_moments(seen, batch)
    return seen


def test_moments_are_those_of_all_samples():
    rng = np.random.RandomState(2)
    batches = [rng.normal(size=(2, count, 3)) + 1 for count in (1, 5, 30)]
    seen, everything = moments_of(batches), np.concatenate(batches, axis=1)
    assert seen.samples == 36
    for group in range(2):
        np.testing.assert_allclose(seen.mean[group], everything[group].mean(axis=0))
        np.testing.assert_allclose(seen.second[group], everything[group].T.dot(everything[group]) / 36)
    with pytest.raises(ValueError, match="receptive fields"):
        add_moments(seen, np.ones((2, 4, 5)))


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_rounding_is_close_to_the_best_of_all_roundings(seed):
    rng = np.random.RandomState(seed)
    size, grid = 8, weight_grid(3)
    x = rng.normal(size=(200, size)).dot(rng.normal(size=(size, size)))
    second = x.T.dot(x)[None] / len(x)
    weight = rng.normal(size=(4, size))
    scales = max_abs_scale(weight, grid, axis=0)
    levels = adaptive_levels(weight, scales, grid, second)
    nearest = quantize(weight, scales, grid, axis=0)
    column = scales[:, None].astype(float)
    assert np.abs(levels - weight / column).max() < 1 + 1e-6
    found = output_error(levels * column - weight, second)
    np.testing.assert_allclose(found, [np.square(x.dot(row)).mean() for row in levels * column - weight])
    plain = output_error(nearest * column - weight, second)
    best = []
    for row, scale in zip(weight, scales):
        ends = [sorted({int(np.clip(f(value), grid.lower, grid.upper)) for f in (np.floor, np.ceil)})
                for value in row / scale]
        best.append(min(output_error(np.array([choice]) * float(scale) - row, second)[0]
                        for choice in itertools.product(*ends)))
    assert (found <= plain + 1e-12).all()
    # half of what the best of all 256 roundings gains over the nearest one, in sum, and mostly all of it
    assert (plain - found).sum() >= 0.5 * (plain - np.array(best)).sum() > 0


def test_bias_correction_gives_outputs_their_mean_back():
    rng = np.random.RandomState(3)
    x, weight, grid = rng.uniform(size=(2, 500, 6)), rng.normal(size=(4, 6)), weight_grid(4)
    quantized = fake_quantize(weight, max_abs_scale(weight, grid, axis=0), grid, axis=0)
    shift = bias_correction(quantized - weight, add_moments(InputMoments(), x).mean)
    for output in range(4):
        inputs = x[output // 2]
        corrected = inputs.dot(quantized[output]) + shift[output]
        assert corrected.mean() == pytest.approx(inputs.dot(weight[output]).mean())


@pytest.mark.parametrize("seed", range(5))
def test_rounding_with_a_corrected_bias_has_the_least_variance(seed):
    """The spread of each output's error over all samples, against the best of all 256 roundings."""
    rng = np.random.RandomState(seed)
    size, grid = 8, weight_grid(3)
    x = rng.normal(size=(300, size)).dot(rng.normal(size=(size, size))) + 3 * rng.normal(size=size)
    moments, weight = add_moments(InputMoments(), x[None]), rng.normal(size=(4, size))
    scales = max_abs_scale(weight, grid, axis=0)
    column = scales[:, None].astype(float)
    found = round_weight(weight, scales, grid, moments, adaptive=True, correct_bias=True)
    rest = x.dot((found.levels * column - weight).T) + found.correction
    np.testing.assert_allclose(rest.mean(axis=0), 0, atol=1e-9)
    nearest = x.dot((quantize(weight, scales, grid, axis=0) * column - weight).T).std(axis=0)
    best = []
    for row, scale in zip(weight, scales.astype(float)):
        ends = [sorted({int(np.clip(f(value), grid.lower, grid.upper)) for f in (np.floor, np.ceil)})
                for value in row / scale]
        best.append(min(x.dot(np.array(choice) * scale - row).std() for choice in itertools.product(*ends)))
    gained, possible = (nearest**2 - rest.std(axis=0)**2).sum(), (nearest**2 - np.square(best)).sum()
    assert gained >= 0.5 * possible > 0


def test_without_moments_weights_are_rounded_to_the_nearest_level():
    weight, scales, grid = np.random.RandomState(0).normal(size=(3, 4)), np.full(3, 0.3, np.float32), weight_grid(4)
    found = round_weight(weight, scales, grid, InputMoments(), adaptive=True, correct_bias=True)
    np.testing.assert_array_equal(found.levels, quantize(weight, scales, grid, axis=0))
    assert found.correction is None


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit a weight"):
        adaptive_levels(np.ones((2, 3)), np.ones(2), weight_grid(8), np.ones((1, 4, 4)))
