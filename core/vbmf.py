"""How many singular values of a matrix are signal: empirical variational Bayes, in closed form.

The model is Y = B A^T + noise with automatic relevance determination.  Its global solution depends on the
singular values alone, and only the noise variance has to be searched for, in one dimension.

Source: Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational Bayesian
matrix factorization", JMLR 14 (2013); Nakajima, Tomioka, Sugiyama, Babacan, "Condition for perfect dimensionality
recovery by variational Bayesian PCA", JMLR 16 (2015), theorems 2 and 3 and the free energy after them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Tuple

import numpy as np

# Below this share of the largest one a singular value of a float32 matrix is rounding.
_NUMERICAL_ZERO = 1e-7
_GRID = 192
_GOLDEN = (math.sqrt(5) - 1) / 2


class Evbmf(NamedTuple):
    """The rank, the variance of the noise, and the singular value from which on there is signal."""

    rank: int
    noise_variance: float
    threshold: float


def evbmf(singular_values: np.ndarray, rows: int, columns: int) -> Evbmf:
    """The empirical variational Bayes solution for a matrix of which only the singular values matter.

    Args:
        singular_values: min(rows, columns) of them, in any order; missing ones count as zeros.
        rows, columns: the matrix's shape; a matrix and its transpose have one solution.

    Returns:
        the number of singular values above the threshold sigma * sqrt(M (1 + t) (1 + alpha / t)), where L <= M are
        the sides, alpha = L / M, t solves log(t + 1) / t + log(t / alpha + 1) / (t / alpha) = 1, and sigma**2 is the
        global minimum of the free energy. A matrix without noise has its numerical rank.

    Raises:
        ValueError: a side is not positive, there are too many values, or one is negative or not finite.
    """
    values = _checked(singular_values, rows, columns)
    short, long = min(rows, columns), max(rows, columns)
    alpha = short / long
    tau = _least_tau(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    squares = values**2 / long
    lower, upper = _noise_bounds(squares, short, alpha, edge)
    if lower <= squares[0] * _NUMERICAL_ZERO**2:
        return Evbmf(int((values > values[0] * _NUMERICAL_ZERO).sum()), 0.0, 0.0)
    variance = _least_free_energy(squares, alpha, edge, lower, upper)
    return Evbmf(int((squares > edge * variance).sum()), variance, math.sqrt(long * edge * variance))


def _checked(singular_values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    values = np.asarray(singular_values, dtype=np.float64)
    short = min(rows, columns)
    if short < 1 or values.ndim != 1 or values.size > short:
        raise ValueError(f"a {rows} x {columns} matrix has {max(short, 0)} singular values, got shape {values.shape}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"singular values must be finite and not negative, got {values!r}")
    return np.concatenate([np.sort(values)[::-1], np.zeros(short - values.size)])


def _least_tau(alpha: float) -> float:
    """The zero of log(t + 1) / t + log(t / alpha + 1) / (t / alpha) - 1, by bisection; it grows from 0 at alpha = 0.

    The papers' 2.5129 * sqrt(alpha) is exact at alpha = 1 only; the exact one makes the free energy continuous.
    """
    low, high = 0.0, 2.52
    for _ in range(60):
        middle = (low + high) / 2
        excess = math.log1p(middle) / middle + math.log1p(middle / alpha) * alpha / middle - 1
        low, high = (middle, high) if excess > 0 else (low, middle)
    return (low + high) / 2


def _noise_bounds(squares: np.ndarray, short: int, alpha: float, edge: float) -> Tuple[float, float]:
    """The bounds of the noise variance: at most all is noise; at most ``signals`` components are signal."""
    signals = math.ceil(short / (1 + alpha)) - 1
    lower = max(squares[signals] / edge, float(squares[signals:].mean()))
    return lower, float(squares.mean())


def _least_free_energy(squares: np.ndarray, alpha: float, edge: float, lower: float, upper: float) -> float:
    """The noise variance of the least free energy: it has several valleys, so all of them are looked into.

    Between two of the points where a component turns from signal to noise the free energy is smooth, so those
    points and an even grid show every valley; each is then narrowed by golden section.
    """
    turns = squares[squares > 0] / edge
    points = np.concatenate([np.geomspace(lower, upper, _GRID), turns[(turns > lower) & (turns < upper)]])
    points = np.unique(points)
    energies = _free_energy(points, squares, alpha, edge)
    padded = np.concatenate([[np.inf], energies, [np.inf]])
    valleys = np.flatnonzero((padded[1:-1] <= padded[:-2]) & (padded[1:-1] <= padded[2:]))
    left, right = points[np.maximum(valleys - 1, 0)], points[np.minimum(valleys + 1, points.size - 1)]
    for _ in range(50):
        first, second = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        falls = _free_energy(first, squares, alpha, edge) > _free_energy(second, squares, alpha, edge)
        left, right = np.where(falls, first, left), np.where(falls, right, second)
    found = np.concatenate([(left + right) / 2, points[valleys]])
    return float(found[np.argmin(_free_energy(found, squares, alpha, edge))])


def _free_energy(variances: np.ndarray, squares: np.ndarray, alpha: float, edge: float) -> np.ndarray:
    """Twice the free energy per long side, up to a constant, for each noise variance.

    With x = square / variance a component of noise adds x - log x, one of signal also
    log(t + 1) + alpha log(t / alpha + 1) - t, where t + alpha / t = x - 1 - alpha; the constant log(squares) is left
    out, so that zeros are allowed.
    """
    x = squares / variances[:, None]
    excess = np.maximum(x, edge) - (1 + alpha)
    tau = (excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0))) / 2
    gain = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    total = squares.sum() / variances + squares.size * np.log(variances) + np.where(x > edge, gain, 0).sum(axis=1)
    return np.asarray(total)
