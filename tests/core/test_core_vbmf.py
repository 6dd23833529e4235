"""The analytic solution against the variational free energy itself, minimized by coordinate descent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtrain.core import evbmf


def component_free_energy(values, variances, rows, columns, turns=600):
    """Twice the free energy of every component beyond that of "no signal", by exact coordinate updates.

    The posterior of a column of each factor is a Gaussian with mean a (b) and variance va (vb) per entry; the prior
    variances are set to their best values in every turn (empirical Bayes).
    """
    y, s = np.broadcast_arrays(values[None, :], variances[:, None])
    a = b = np.sqrt(y)
    va = vb = np.full(y.shape, 1e-3)
    for _ in range(turns):
        ca, cb = (a**2 + columns * va) / columns, (b**2 + rows * vb) / rows
        va = 1 / ((b**2 + rows * vb) / s + 1 / ca)
        a = y * b * va / s
        ca, cb = (a**2 + columns * va) / columns, (b**2 + rows * vb) / rows
        vb = 1 / ((a**2 + columns * va) / s + 1 / cb)
        b = y * a * vb / s
    ca, cb = (a**2 + columns * va) / columns, (b**2 + rows * vb) / rows
    return (columns * np.log(ca / va) + rows * np.log(cb / vb)
            + (-2 * a * b * y + (a**2 + columns * va) * (b**2 + rows * vb)) / s)


def oracle(matrix, steps=60):
    """The rank at the noise variance of the least total free energy, on a grid of variances and a finer one."""
    rows, columns = matrix.shape
    values = np.linalg.svd(matrix, compute_uv=False)
    top = (values**2).sum() / (rows * columns)
    low, high = top / 300, top
    for _ in range(3):
        grid = np.geomspace(low, high, steps)
        signal = component_free_energy(values, grid, rows, columns)
        total = rows * columns * np.log(grid) + (values**2).sum() / grid + np.minimum(signal, 0).sum(axis=1)
        best = int(np.argmin(total))
        low, high = grid[max(best - 2, 0)], grid[min(best + 2, steps - 1)]
    return int((signal[best] < 0).sum())


def noisy(seed):
    """A matrix whose weakest signals are on the edge of being noise."""
    rng = np.random.RandomState(seed)
    rows, columns = sorted(rng.randint(4, 40, 2))
    rank = rng.randint(0, rows // 2 + 1)
    strengths = rng.uniform(0, 5, rank) / np.sqrt(rows)
    signal = rng.randn(rows, rank).dot(np.diag(strengths)).dot(rng.randn(rank, columns))
    return rng.uniform(0.2, 2) * (signal + rng.randn(rows, columns))


def solve(matrix):
    return evbmf(np.linalg.svd(matrix, compute_uv=False), *matrix.shape)


@pytest.mark.parametrize("seed", range(50))
def test_ranks_are_those_of_the_free_energy(seed):
    matrix = noisy(seed)
    assert solve(matrix).rank == oracle(matrix)


def test_the_ranks_of_the_random_matrices_differ():
    assert len({solve(noisy(seed)).rank for seed in range(50)}) > 5


def test_noise_variance_is_found():
    rng = np.random.RandomState(0)
    matrix = 5 * rng.randn(60, 4).dot(rng.randn(4, 200)) + 0.3 * rng.randn(60, 200)
    found = solve(matrix)
    assert found.rank == 4
    assert found.noise_variance == pytest.approx(0.09, rel=0.05)
    assert (np.linalg.svd(matrix, compute_uv=False) > found.threshold).sum() == 4


@pytest.mark.parametrize("rows, columns", [(3, 60), (10, 12), (20, 20), (7, 1000)])
def test_the_threshold_is_where_signal_has_the_lower_free_energy(rows, columns):
    found = solve(np.random.RandomState(0).randn(rows, columns))
    expected = found.threshold / np.sqrt(found.noise_variance)
    values = np.array([0.995, 1.005]) * expected
    below, above = component_free_energy(values, np.array([1.0]), rows, columns, turns=8000)[0]
    assert above < 0 <= below + 1e-9


def test_pure_noise_has_rank_zero():
    assert all(solve(np.random.RandomState(seed).randn(30, 100)).rank == 0 for seed in range(20))


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_without_noise_the_rank_is_the_numerical_one(rank):
    rng = np.random.RandomState(1)
    exact = rng.randn(40, rank).dot(rng.randn(rank, 50)).astype(np.float32)
    assert evbmf(np.linalg.svd(exact.astype(np.float64), compute_uv=False), 40, 50).rank == rank


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-4, 1e4))
def test_transposing_shuffling_and_scaling_change_nothing(seed, factor):
    matrix = noisy(seed)
    values = np.linalg.svd(matrix, compute_uv=False)
    rows, columns = matrix.shape
    found = evbmf(values, rows, columns)
    other = evbmf(factor * np.random.RandomState(0).permutation(values), columns, rows)
    assert other.rank == found.rank
    assert other.threshold == pytest.approx(factor * found.threshold, rel=1e-4)


def test_one_row():
    assert evbmf(np.array([3.0]), 1, 10).rank in (0, 1)


@pytest.mark.parametrize("values, rows, columns", [
    ([1.0, 2.0], 1, 5), ([-1.0], 2, 2), ([np.nan], 2, 2), ([], 0, 3), ([[1.0]], 2, 2)])
def test_bad_values_are_refused(values, rows, columns):
    with pytest.raises(ValueError, match="singular values"):
        evbmf(np.array(values), rows, columns)
