"""LSQ gradients against a loop over elements and finite differences of the straight-through surrogate."""

import numpy as np
import pytest

from slimtrain.core import activation_grid, lsq_gradient, weight_grid

GRIDS = [weight_grid(2), weight_grid(4), weight_grid(8), activation_grid(2, signed=False)]


def by_loops(dy, x, scale, grid, axis):
    """The paper's equations, one element at a time in Python floats."""
    dx, sums, count = np.zeros_like(x), np.zeros(len(scale)), x.size // len(scale)
    for index in np.ndindex(*x.shape):
        channel = 0 if axis is None else index[axis]
        v = x[index] / scale[channel]
        if v < grid.lower:
            sums[channel] += dy[index] * grid.lower
        elif v > grid.upper:
            sums[channel] += dy[index] * grid.upper
        else:
            dx[index] = dy[index]
            nearest = np.floor(abs(v) + 0.5) * (1 if v > 0 else -1)
            sums[channel] += dy[index] * (nearest - v)
    return dx, sums / (count * grid.upper) ** 0.5


def surrogate(x, scale, grid, residue):
    """A smooth stand-in: rounding replaced by the constant that it adds at the point of interest."""
    return scale * (np.clip(x / scale, grid.lower, grid.upper) + residue)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_gradients_by_loops(grid, axis):
    rng = np.random.RandomState(0)
    x, dy = rng.randn(3, 4, 5), rng.randn(3, 4, 5)
    scale = np.array([0.31]) if axis is None else rng.uniform(0.1, 0.6, x.shape[axis])
    dx, dscale = lsq_gradient(dy, x, scale, grid, axis=axis)
    wanted_dx, wanted_dscale = by_loops(dy, x, scale, grid, axis)
    np.testing.assert_array_equal(dx, wanted_dx)
    np.testing.assert_allclose(dscale, wanted_dscale if axis is not None else wanted_dscale[0], rtol=1e-12)
    assert dx.dtype == dscale.dtype == np.float64
    assert dscale.shape == (() if axis is None else scale.shape)


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_by_finite_differences(grid):
    rng = np.random.RandomState(1)
    scale, step = 0.37, 1e-6
    x = rng.uniform(1.5 * grid.lower - 1, 1.5 * grid.upper + 1, 200) * scale
    dy = rng.randn(200)
    clipped = np.clip(x / scale, grid.lower, grid.upper)
    residue = np.sign(clipped) * np.floor(np.abs(clipped) + 0.5) - clipped
    dx, dscale = lsq_gradient(dy, x, scale, grid)
    rise_x = surrogate(x + step, scale, grid, residue) - surrogate(x - step, scale, grid, residue)
    rise_scale = surrogate(x, scale + step, grid, residue) - surrogate(x, scale - step, grid, residue)
    np.testing.assert_allclose(dx, dy * rise_x / (2 * step), atol=1e-8)
    by_scale = np.sum(dy * rise_scale / (2 * step)) / np.sqrt(200 * grid.upper)
    assert dscale == pytest.approx(by_scale, rel=1e-6)


def test_the_ends_are_inside():
    grid = activation_grid(2, signed=False)
    dx, dscale = lsq_gradient(np.ones(4), np.array([0.0, 1.5, -0.01, 1.51]), 0.5, grid)
    np.testing.assert_array_equal(dx, [1, 1, 0, 0])
    assert dscale == pytest.approx((0 + 0 + 0 + 3) / np.sqrt(4 * 3))


def test_float32_stays_float32():
    x = np.random.RandomState(2).randn(50).astype(np.float32)
    dx, dscale = lsq_gradient(np.ones(50), x, 0.2, weight_grid(4))
    assert dx.dtype == dscale.dtype == np.float32


@pytest.mark.parametrize("dy, x, scale, message", [
    (np.ones(3), np.ones(4), 1.0, "shape of x"),
    (np.ones(0), np.ones(0), 1.0, "at least one value"),
    (np.ones(2), np.array([np.nan, 1.0]), 1.0, "NaN: 1 of 2"),
    (np.ones(2), np.ones(2), 0.0, "finite and positive"),
])
def test_bad_arguments_are_refused(dy, x, scale, message):
    with pytest.raises(ValueError, match=message):
        lsq_gradient(dy, x, scale, weight_grid(4))
