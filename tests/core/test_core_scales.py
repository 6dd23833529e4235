"""Scale initialisation against loops and against a brute-force scan of all scales."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimtrain.core import (
    SMALLEST_SCALE,
    activation_grid,
    fake_quantize,
    lsq_scale,
    max_abs_scale,
    mse_scale,
    weight_grid,
)

ALL = [max_abs_scale, lsq_scale, mse_scale]


def squared_error(x, scale, grid):
    return float(np.sum((fake_quantize(np.asarray(x, dtype=np.float64), float(scale), grid) - x) ** 2))


def least_squared_error(x, grid):
    """The smallest error of 1000 scales from almost nothing to beyond the largest value."""
    top = np.abs(x).max() / grid.upper
    return min(squared_error(x, scale, grid) for scale in np.linspace(0.0015, 1.5, 1000) * top)


def samples(kind, size=5000, seed=0):
    # Enough values that the best of a thousand scales is not the luckiest one at 8 bits.
    rng = np.random.RandomState(seed)
    return {"normal": lambda: rng.randn(size), "laplace": lambda: rng.laplace(size=size),
            "uniform": lambda: rng.uniform(-1, 1, size), "relu": lambda: np.maximum(rng.randn(size), 0),
            "outlier": lambda: np.append(rng.randn(size), 12.0), "negative": lambda: -np.abs(rng.randn(size)),
            "two values": lambda: rng.choice([-0.3, 0.3], size)}[kind]()


def test_max_abs_by_hand():
    x = np.array([[1.0, -3.5, 2.0], [0.0, 0.25, 0.5]])
    np.testing.assert_array_equal(max_abs_scale(x, weight_grid(4)), np.float32(0.5))
    for axis, largest in ((0, [3.5, 0.5]), (-1, [1, 3.5, 2])):
        np.testing.assert_allclose(max_abs_scale(x, weight_grid(4), axis), np.array(largest) / 7, rtol=1e-7)
    np.testing.assert_allclose(max_abs_scale(x, activation_grid(2, signed=False)), 2 / 3, rtol=1e-7)


def test_lsq_start_by_loops():
    x = np.random.RandomState(0).randn(3, 4, 2)
    for bits in range(2, 9):
        grid = weight_grid(bits)
        for channel in range(4):
            values = [abs(x[i, channel, j]) for i in range(3) for j in range(2)]
            expected = 2 * (sum(values) / len(values)) / grid.upper ** 0.5
            assert lsq_scale(x, grid, axis=1)[channel] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "outlier", "negative", "two values"])
def test_mse_search_finds_the_least_error(kind, bits):
    x, grid = samples(kind), weight_grid(bits)
    best = least_squared_error(x, grid)
    assert squared_error(x, mse_scale(x, grid), grid) <= 1.02 * best + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_search_on_unsigned_grids(bits):
    x, grid = samples("relu"), activation_grid(bits, signed=False)
    assert squared_error(x, mse_scale(x, grid), grid) <= 1.02 * least_squared_error(x, grid)


def test_channels_are_searched_on_their_own():
    columns = [samples("normal"), 30 * samples("laplace"), samples("uniform") / 1e3, np.zeros(5000)]
    x = np.stack(columns, axis=1)
    together = mse_scale(x, weight_grid(3), axis=1)
    alone = [mse_scale(x[:, channel], weight_grid(3)) for channel in range(4)]
    np.testing.assert_array_equal(together, alone)
    wide = np.random.RandomState(3).randn(300, 500)
    np.testing.assert_array_equal(mse_scale(wide, weight_grid(4), axis=0)[[0, 150, 299]],
                                  mse_scale(wide[[0, 150, 299]], weight_grid(4), axis=0))


@pytest.mark.parametrize("channels", [64, 96, 100])
def test_a_large_tensor_is_searched_on_a_sample_of_all_channels(channels):
    spread = np.geomspace(0.01, 10, channels)
    x = np.random.RandomState(4).randn(4000, channels) * spread
    grid = weight_grid(3)
    found = mse_scale(x, grid)
    assert found == mse_scale(x, grid)
    candidates = np.geomspace(0.02, 1.2, 60) * np.abs(x).max() / grid.upper
    assert squared_error(x, found, grid) <= 1.02 * min(squared_error(x, scale, grid) for scale in candidates)


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e5, 1e5, width=32)),
       st.sampled_from([weight_grid(2), weight_grid(8), activation_grid(3, signed=False)]))
def test_scales_are_float32_positive_and_finite(x, grid):
    for scale_of in ALL:
        whole, rows = scale_of(x, grid), scale_of(x, grid, axis=0)
        assert whole.shape == () and rows.shape == (3,)
        assert whole.dtype == rows.dtype == np.float32
        assert (np.append(rows, whole) >= np.float32(SMALLEST_SCALE)).all() and np.isfinite(rows).all()


@pytest.mark.parametrize("scale_of", ALL)
def test_zeros_get_the_smallest_scale(scale_of):
    assert scale_of(np.zeros((2, 3)), weight_grid(4)) == np.float32(SMALLEST_SCALE)
    unsigned = activation_grid(4, signed=False)
    assert max_abs_scale(np.array([-1.0, -2.0]), unsigned) == np.float32(SMALLEST_SCALE)


@pytest.mark.parametrize("scale_of", ALL)
def test_bad_values_are_refused(scale_of):
    with pytest.raises(ValueError, match="at least one value"):
        scale_of(np.zeros((0, 3)), weight_grid(4))
    with pytest.raises(ValueError, match="2 of 4 are not"):
        scale_of(np.array([np.nan, 1, np.inf, 2]), weight_grid(4))
    with pytest.raises(ValueError, match="axis 2 does not exist"):
        scale_of(np.zeros((2, 3)), weight_grid(4), axis=2)
