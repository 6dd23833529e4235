"""Factors against full singular value decompositions of the unfoldings, and against iterating to the optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convolution import convolve
from slimtrain.core import (
    Factorization,
    analyse_weight,
    axis_owners,
    chain_error,
    chain_shapes,
    compose_chain,
    full_ranks,
    natural_factorization,
    truncate_weight,
)

SVD, TUCKER2, SEPARABLE = Factorization.SVD, Factorization.TUCKER2, Factorization.SEPARABLE
SHAPES = [((7, 12), SVD), ((12, 7), SVD), ((9, 5, 1, 1), SVD), ((6, 8, 1), SVD), ((8, 6, 3, 3), TUCKER2),
          ((16, 3, 7, 7), TUCKER2), ((4, 9, 5), TUCKER2), ((6, 4, 3, 5), SEPARABLE), ((3, 8, 5, 1), SEPARABLE)]


def random(shape, seed=0):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def smooth(shape, seed=0):
    """A kernel with decaying spectra, as training leaves them."""
    rng = np.random.RandomState(seed)
    decay = [np.linalg.qr(rng.randn(n, n))[0] * 0.75 ** np.arange(n) for n in shape[:2]]
    return np.einsum("ab,cd,bd...->ac...", decay[0], decay[1], rng.randn(*shape)).astype(np.float32)


def error(weight, factorization, ranks, refinements=2):
    return chain_error(weight, truncate_weight(analyse_weight(weight, factorization), ranks, refinements))


@pytest.mark.parametrize("shape, factorization", SHAPES)
def test_full_ranks_reconstruct(shape, factorization):
    assert error(random(shape), factorization, full_ranks(shape, factorization)) < 1e-6


@pytest.mark.parametrize("shape, factorization", [case for case in SHAPES if case[1] is not TUCKER2])
def test_two_factors_are_the_best_there_are(shape, factorization):
    weight = random(shape)
    matrix = weight.reshape(shape[:2]) if factorization is SVD else np.stack(
        [weight[o, :, :, j].ravel() for o in range(shape[0]) for j in range(shape[3])])
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for rank in range(1, len(values)):
        best = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert error(weight, factorization, [rank]) == pytest.approx(best, rel=1e-5)


def best_tucker_error(weight, ranks, turns=60):
    """Higher-order orthogonal iteration by full decompositions of the unfoldings."""
    weight = weight.astype(np.float64)
    inputs = np.linalg.svd(np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1))[0][:, :ranks[1]]
    for _ in range(turns):
        part = np.einsum("oi...,ir->or...", weight, inputs)
        outputs = np.linalg.svd(part.reshape(len(part), -1))[0][:, :ranks[0]]
        part = np.moveaxis(np.einsum("oi...,or->ri...", weight, outputs), 1, 0)
        inputs = np.linalg.svd(part.reshape(len(part), -1))[0][:, :ranks[1]]
    core = np.einsum("oi...,or,is->rs...", weight, outputs, inputs)
    return np.sqrt(1 - (core**2).sum() / (weight**2).sum())


@pytest.mark.parametrize("make", [random, smooth])
@pytest.mark.parametrize("ranks", [(4, 4), (8, 3), (3, 10), (16, 12), (20, 16)])
def test_gram_tucker_is_within_a_percent_of_the_iterated_one(make, ranks):
    weight = make((24, 20, 3, 3))
    best = best_tucker_error(weight, ranks)
    assert error(weight, TUCKER2, ranks) <= 1.01 * best
    assert error(weight, TUCKER2, ranks, refinements=0) <= 1.045 * best
    assert error(weight, TUCKER2, ranks, refinements=40) == pytest.approx(best, rel=1e-3)


@settings(max_examples=30)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_error_never_grows_with_the_rank(outputs, inputs, k, seed):
    weight = random((outputs, inputs, k, k), seed)
    analysis = analyse_weight(weight, TUCKER2)
    # The subspaces of the unfoldings are nested, hence no tolerance but rounding; turned ones are not quite.
    for refinements, tolerance in ((0, 1e-6), (2, 5e-3)):
        errors = np.array([[chain_error(weight, truncate_weight(analysis, (o, i), refinements))
                            for i in range(1, inputs + 1)] for o in range(1, outputs + 1)])
        assert (np.diff(errors, axis=0) <= tolerance).all() and (np.diff(errors, axis=1) <= tolerance).all()


@pytest.mark.parametrize("shape, factorization", SHAPES)
def test_shapes_are_known_before_the_factors(shape, factorization):
    analysis = analyse_weight(random(shape), factorization)
    full = full_ranks(shape, factorization)
    for ranks in {full, tuple(max(1, rank // 2) for rank in full), (1,) * len(full), full[:-1] + (1,)}:
        chain = truncate_weight(analysis, ranks)
        assert tuple(factor.shape for factor in chain) == chain_shapes(shape, factorization, ranks)
        assert all(factor.dtype == np.float32 for factor in chain)


def test_a_mode_at_full_rank_has_no_factor():
    assert chain_shapes((16, 3, 7, 7), TUCKER2, (4, 3)) == ((4, 3, 7, 7), (16, 4, 1, 1))
    assert chain_shapes((16, 8, 3, 3), TUCKER2, (16, 4)) == ((4, 8, 1, 1), (16, 4, 3, 3))


@pytest.mark.parametrize("factorization, ranks", [(TUCKER2, (6, 3)), (TUCKER2, (3, 4)), (SEPARABLE, (7,))])
def test_convolutions_with_the_factors_make_the_same_error(factorization, ranks):
    rng = np.random.RandomState(3)
    weight, x = random((6, 4, 3, 5)), rng.randn(2, 4, 11, 12)
    chain = truncate_weight(analyse_weight(weight, factorization), ranks)
    owners = axis_owners([factor.shape for factor in chain])
    y = x
    for index, factor in enumerate(chain):
        stride, padding, dilation = (
            tuple(value if owner == index else default for value, owner in zip(values, owners))
            for values, default in (((2, 1), 1), ((1, 2), 0), ((1, 2), 1)))
        y = convolve(y, factor, None, stride, padding, dilation)
    np.testing.assert_allclose(y, convolve(x, compose_chain(chain), None, (2, 1), (1, 2), (1, 2)), atol=1e-10)


def test_components_are_shared_evenly():
    for shape, factorization in (((9, 7), SVD), ((7, 9), SVD)):
        first, last = truncate_weight(analyse_weight(random(shape), factorization), [5])
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(last, axis=0), rtol=1e-5)


def test_weights_without_strength_give_finite_factors():
    weight = np.zeros((6, 5, 3, 3))
    assert all(np.isfinite(f).all() for f in truncate_weight(analyse_weight(weight, TUCKER2), (3, 3)))
    weight[0, 0, 1, 1] = 2
    assert error(weight, TUCKER2, (3, 3)) < 1e-6
    assert error(np.outer(np.arange(6), np.arange(5)), SVD, [3]) < 1e-6


def test_natural_factorizations():
    assert natural_factorization((4, 3)) is SVD
    assert natural_factorization((4, 3, 1, 1)) is SVD
    assert natural_factorization((4, 3, 1, 3)) is TUCKER2


@pytest.mark.parametrize("shape, factorization", [((4, 3, 3, 3), SVD), ((4, 3, 3), SEPARABLE), ((4, 3), SEPARABLE)])
def test_impossible_factorizations_are_refused(shape, factorization):
    with pytest.raises(ValueError, match="has no"):
        analyse_weight(np.zeros(shape), factorization)


@pytest.mark.parametrize("ranks", [(3,), (0, 3), (3, 6), (7, 1)])
def test_impossible_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="ranks of"):
        truncate_weight(analyse_weight(np.ones((6, 5, 3, 3)), TUCKER2), ranks)


def test_broken_weights_are_refused():
    with pytest.raises(ValueError, match="1 values that are not finite"):
        analyse_weight(np.array([[1.0, np.nan]]), SVD)
