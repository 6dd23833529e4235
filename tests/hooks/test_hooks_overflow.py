"""Which sums overflow 16 bits, against exact int64 sums; and how clamps narrow because of it."""
import numpy as np
import pytest

import tf_nets
from deploying import build
from slimtrain.core import IntegerConv, accumulate, activation_grid, same_padding
from slimtrain.core.overflow import Clamp, narrowed_clamp
from slimtrain.hooks import OAQQuantizer
from slimtrain.hooks.overflow import MOST, overflowing, peak
from tf_setup import session, tf

LAYERS = [(3, 512, 8, 4), (3, 256, 16, 5), (3, 64, 16, 8), (1, 512, 32, 6), (5, 32, 8, 7), (1, 16, 8, 8), (3, 3, 16, 9),
          (3, 128, 8, 6), (1, 1024, 8, 3), (3, 512, 4, 3)]


def exact_sums(q_x, q_w):
    """int64 sums of a SAME convolution, channels last."""
    size, kernel = q_x.shape[1], q_w.shape[0]
    padding = (same_padding(size, kernel, 1),) * 2
    conv = IntegerConv(q_w.transpose(3, 2, 0, 1), np.ones(q_w.shape[3], np.float32), None, 1.0, 1.0, activation_grid(8),
                       padding=padding)
    return accumulate(q_x.transpose(0, 3, 1, 2), conv).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kernel, inputs, outputs, size", LAYERS)
def test_overflowing_sums_are_exactly_those_of_int64(kernel, inputs, outputs, size):
    random = np.random.RandomState(kernel * inputs)
    q_x = random.randint(-127, 128, (2, size, size, inputs))
    q_w = random.randint(-127, 128, (kernel, kernel, inputs, outputs))
    q_w[..., 0] = np.abs(q_w[..., 0]) // 16  # channels that hardly, partly and mostly overflow
    s_x, s_w = np.float32(0.0137), random.uniform(1e-4, 1e-2, outputs).astype(np.float32)
    exact = exact_sums(q_x, q_w)
    with tf.Graph().as_default() as graph:
        y = tf.nn.conv2d(tf.constant(q_x.astype(np.float32) * s_x), tf.constant(q_w.astype(np.float32) * s_w),
                         strides=1, padding="SAME")
        step = tf.constant(s_x * s_w)
        with session(graph) as run:
            found, highest = run.run([overflowing(y, step), peak(y, step)])
    wanted = (exact > 32767) | (exact < -32768)
    np.testing.assert_array_equal(found, wanted)
    assert (highest > MOST) == wanted.any()
    assert inputs < 16 or wanted.any()


def test_the_border_itself():
    """Sums of exactly 32767, 32768, -32768 and -32769."""
    sums = np.array([[32767, 32768, -32768, -32769]], np.float64)
    with tf.Graph().as_default() as graph:
        y, step = tf.constant((sums * np.float32(0.003)).astype(np.float32)), tf.constant([0.003] * 4)
        with session(graph) as run:
            np.testing.assert_array_equal(run.run(overflowing(y, step)), [[False, True, False, True]])


@pytest.mark.parametrize("clamp, highest, smallest, wanted", [
    (Clamp(127, True), 32767.0, 0, Clamp(127, True)),
    (Clamp(127, True), 32768.0, 0, Clamp(126, True)),
    (Clamp(127, True), 131068.0, 0, Clamp(63, True)),
    (Clamp(127, True), 131068.0, 64, Clamp(127, False)),
    (Clamp(2, True), 1e9, 0, Clamp(127, False)),
    (Clamp(127, False), 1e9, 0, Clamp(127, False)),
])
def test_how_far_a_clamp_narrows(clamp, highest, smallest, wanted):
    assert narrowed_clamp(clamp, highest, smallest, 127) == wanted


def overflowing_net(x, training):
    y = tf.nn.relu(tf_nets.conv(x, "c1", 64, seed=1))
    return tf_nets.conv(y, "c2", 4, 5, seed=3)


@pytest.mark.parametrize("smallest", [0, 120])
def test_clamps_narrow_until_nothing_overflows_or_fall_back(smallest):
    graph, x, y, quantizer = build(overflowing_net, "OAQ", True, min_clamp_value=smallest)
    with graph.as_default():
        init = tf.global_variables_initializer()
    images = np.abs(np.random.RandomState(0).randn(4, 12, 12, 3)) + 1
    with session(graph) as run:
        run.run(init)
        before = run.run(y, {x: images})
        for _ in range(10):
            run.run(y, {x: images})
            quantizer.update(run)
        after, peaks = run.run([y, quantizer._peaks], {x: images})
        grids = quantizer.current_grids(run)
    clamp = grids.weights["c2/conv"].upper
    if smallest:
        assert clamp == 127 and grids.methods["c2/conv"].name == "QAT"
    else:
        assert 1 <= clamp < 127 and grids.methods["c2/conv"].name == "OVERFLOW_AWARE"
        assert max(peaks) < MOST
    # a narrower clamp has wider steps: the range, and so the result, stays
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()


def test_clamps_are_part_of_the_checkpoint(tmp_path):
    graph, x, y, quantizer = build(overflowing_net, "OAQ", True)
    with graph.as_default():
        init, saver = tf.global_variables_initializer(), tf.train.Saver()
    images = np.abs(np.random.RandomState(0).randn(4, 12, 12, 3)) + 1
    with session(graph) as run:
        run.run(init)
        for _ in range(3):
            run.run(y, {x: images})
            quantizer.update(run)
        wanted = quantizer.current_grids(run)
        path = saver.save(run, str(tmp_path / "narrow"))
    with session(graph) as run:
        saver.restore(run, path)
        assert quantizer.current_grids(run) == wanted
    assert wanted.weights["c2/conv"].upper < 127


def test_the_narrowest_start_is_a_clamp_of_one():
    graph, _, _, quantizer = build(overflowing_net, "OAQ", True, bits=2)
    assert isinstance(quantizer, OAQQuantizer)
    assert quantizer.weight_grid.upper == 1 and quantizer.weight_grid.lower == -1
