"""Folding against convolution and normalization done one after the other, in loops."""

import numpy as np
import pytest

from slimtrain.core import fold_batch_norm, fold_factor


def naive_convolution(x, weight, bias, groups):
    """One output position per filter: x [I, kh, kw], weight [O, I / groups, kh, kw] -> [O]."""
    outputs, inner = weight.shape[:2]
    result = np.zeros(outputs)
    for o in range(outputs):
        first = (o // (outputs // groups)) * inner
        for i in range(inner):
            result[o] += np.sum(weight[o, i] * x[first + i])
        result[o] += 0 if bias is None else bias[o]
    return result


def normalization(outputs, seed=0):
    rng = np.random.RandomState(seed)
    return dict(gamma=rng.randn(outputs), beta=rng.randn(outputs), mean=rng.randn(outputs),
                var=rng.uniform(0.1, 3, outputs))


@pytest.mark.parametrize("groups, shape", [(1, (6, 4, 3, 3)), (2, (6, 2, 3, 1)), (4, (4, 1, 3, 3)),
                                           (4, (8, 1, 1, 1))])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_folded_convolution_equals_both(groups, shape, with_bias):
    rng = np.random.RandomState(1)
    weight, bias = rng.randn(*shape), rng.randn(shape[0]) if with_bias else None
    x = rng.randn(shape[1] * groups, shape[2], shape[3])
    norm = normalization(shape[0])
    before = naive_convolution(x, weight, bias, groups)
    expected = [gamma * (value - mean) / (var + 1e-3) ** 0.5 + beta for value, gamma, beta, mean, var
                in zip(before, norm["gamma"], norm["beta"], norm["mean"], norm["var"])]
    folded = fold_batch_norm(weight, bias, eps=1e-3, **norm)
    np.testing.assert_allclose(naive_convolution(x, folded[0], folded[1], groups), expected, rtol=1e-10)


def test_linear_layers_and_missing_gamma_and_beta():
    weight = np.array([[1.0, 2.0], [3.0, 4.0]])
    folded, bias = fold_batch_norm(weight, None, None, None, np.array([1.0, 2.0]), np.array([3.0, 8.0]), 1.0)
    np.testing.assert_allclose(folded, [[0.5, 1], [1, 4 / 3]])
    np.testing.assert_allclose(bias, [-0.5, -2 / 3])


def test_float32_is_rounded_once():
    rng = np.random.RandomState(2)
    weight = rng.randn(5, 3, 3, 3).astype(np.float32)
    norm = {name: values.astype(np.float32) for name, values in normalization(5).items()}
    folded, bias = fold_batch_norm(weight, None, eps=1e-5, **norm)
    assert folded.dtype == bias.dtype == np.float32
    exact = {name: values.astype(np.float64) for name, values in norm.items()}
    wanted, wanted_bias = fold_batch_norm(weight.astype(np.float64), None, eps=1e-5, **exact)
    np.testing.assert_array_equal(folded, wanted.astype(np.float32))
    np.testing.assert_array_equal(bias, wanted_bias.astype(np.float32))


def test_fold_factor_by_hand():
    np.testing.assert_allclose(fold_factor(np.array([2.0, -3.0]), np.array([3.0, 8.0]), 1.0), [1.0, -1.0])
    np.testing.assert_allclose(fold_factor(None, np.array([0.25]), 0.0), [2.0])


@pytest.mark.parametrize("change, message", [
    (dict(var=np.array([1.0, -1.0])), "positive"),
    (dict(var=np.ones(3), gamma=np.ones(3)), "one entry per output channel"),
    (dict(gamma=np.ones(3)), "gamma must have the shape"),
    (dict(beta=np.ones(3)), "beta must have shape"),
    (dict(mean=np.ones(1)), "mean must have shape"),
    (dict(bias=np.ones((2, 1))), "bias must have shape"),
])
def test_lengths_that_do_not_fit_are_refused(change, message):
    arguments = dict(weight=np.ones((2, 3)), bias=np.ones(2), gamma=np.ones(2), beta=np.ones(2),
                     mean=np.ones(2), var=np.ones(2), eps=1e-5)
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(**arguments)
