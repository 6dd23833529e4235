"""The graph operation against the numpy core on the same arrays: values, gradients of values, gradients of scales."""
import numpy as np
import pytest

from slimtrain.core import activation_grid, fake_quantize, lsq_gradient, max_abs_scale, weight_grid
from slimtrain.hooks.fake_quant import fake_quantize as graph_fake_quantize
from slimtrain.hooks.fake_quant import levels_of
from slimtrain.hooks.state import max_abs
from tf_setup import session, tf

CASES = [
    ("weights of a convolution", (3, 3, 4, 6), 3, weight_grid(8)),
    ("weights of a convolution, 2 bits", (3, 3, 4, 6), 3, weight_grid(2)),
    ("weights of a depthwise convolution", (3, 3, 5, 1), 2, weight_grid(4)),
    ("weights of a matrix product", (7, 9), 1, weight_grid(3)),
    ("transposed weights of a matrix product", (9, 7), 0, weight_grid(3)),
    ("signed activations", (2, 5, 5, 3), None, activation_grid(8)),
    ("signed activations, 4 bits", (2, 5, 5, 3), None, activation_grid(4)),
    ("unsigned activations, 2 bits", (2, 5, 5, 3), None, activation_grid(2, signed=False)),
    ("one value", (1,), None, activation_grid(5)),
]


def run(x, scale, grid, axis, dy, positive=False, learned=True):
    with tf.Graph().as_default() as graph:
        values, step = tf.constant(x), tf.constant(scale)
        y = graph_fake_quantize(values, step, levels_of(grid, positive), axis, learned)
        gradients = tf.gradients(y, [values, step], grad_ys=tf.constant(dy))
        with session(graph) as run_session:
            return run_session.run([y] + [g for g in gradients if g is not None])


@pytest.mark.parametrize("name, shape, axis, grid", CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_the_core(name, shape, axis, grid, seed):
    random = np.random.RandomState(seed)
    x, dy = (random.randn(*shape).astype(np.float32) for _ in range(2))
    scale = random.uniform(0.02, 0.5, () if axis is None else shape[axis]).astype(np.float32)
    y, dx, ds = run(x, scale, grid, axis, dy)
    np.testing.assert_array_equal(y, fake_quantize(x, scale, grid, axis))
    wanted_dx, wanted_ds = lsq_gradient(dy, x, scale, grid, axis)
    np.testing.assert_array_equal(dx, wanted_dx)
    np.testing.assert_allclose(ds, wanted_ds, rtol=1e-5, atol=1e-6)


def test_ties_go_away_from_zero_and_the_ends_count_as_inside():
    x = np.array([-9, -8.5, -8, -1.5, -0.5, 0, 0.5, 2.5, 7, 7.5, 9], np.float32)
    dy = np.arange(1, 12).astype(np.float32)
    y, dx, _ = run(x, np.float32(1), weight_grid(4), None, dy)
    np.testing.assert_array_equal(y, [-8, -8, -8, -2, -1, 0, 1, 3, 7, 7, 7])
    np.testing.assert_array_equal(dx != 0, [False, False, True, True, True, True, True, True, True, False, False])


@pytest.mark.parametrize("grid", [activation_grid(8), activation_grid(2, signed=False)])
def test_values_known_to_be_positive_take_the_short_way_to_the_same_result(grid):
    x = np.concatenate([np.arange(0, 300, 0.25), [0.49999997, 1e9]]).astype(np.float32)
    short, long = (run(x, np.float32(0.7), grid, None, np.ones_like(x), positive) for positive in (True, False))
    for one, other in zip(short, long):
        np.testing.assert_array_equal(one, other)


def test_a_tracked_scale_gets_no_gradient():
    x = np.linspace(-3, 3, 50).astype(np.float32)
    results = run(x, np.float32(0.1), weight_grid(4), None, np.ones_like(x), learned=False)
    assert len(results) == 2


@pytest.mark.parametrize("axis", [0, 2])
def test_the_range_in_the_graph_is_that_of_the_core(axis):
    x = np.random.RandomState(1).randn(4, 3, 5).astype(np.float32)
    x[(slice(None),) * axis + (1,)] = 0
    with tf.Graph().as_default() as graph:
        scale = max_abs(tf.constant(x), weight_grid(5), [i for i in range(3) if i != axis])
        with session(graph) as run_session:
            np.testing.assert_allclose(run_session.run(scale), max_abs_scale(x, weight_grid(5), axis), rtol=1e-7)
