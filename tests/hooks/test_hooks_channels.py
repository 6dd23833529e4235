"""Channels of a TensorFlow graph: which belong together, and that a network without them computes the same."""
import json

import numpy as np
import pytest

import tf_nets
from pruning import (
    dense_net,
    flat_net,
    images,
    inference,
    prune,
    read_graph,
    run_graph,
    shuffle_net,
    weights_in,
)
from slimtrain.core import ChannelPlan, sqnr_db
from slimtrain.hooks import TaylorFOChannelPruner, TaylorFOChannelPrunerHook
from slimtrain.proto import convert, run_model
from tf_setup import tf


@pytest.mark.parametrize("net", [flat_net, tf_nets.mobile_net, shuffle_net, dense_net])
def test_the_network_without_its_channels_computes_the_same(net, tmp_path):
    values, output, hook, stem = prune(net, TaylorFOChannelPrunerHook, tmp_path, sparsity=0.5, align_channels=2)
    x = images(99)
    masked, smaller = inference(net, values, x), read_graph(stem + ".pb")
    shrunk = run_graph(smaller, output, x)
    assert np.abs(shrunk - masked).max() <= 1e-5 * np.abs(masked).max()
    names = list(hook.pruner.weights)
    before = sum(values[name].size for name in names)
    zeros = sum(int((values[name] == 0).sum()) for name in names)
    assert weights_in(smaller) == before - zeros
    assert 1 - weights_in(smaller) / before == pytest.approx(0.5, abs=0.05)
    (deployed,) = run_model(_converted(stem), {"x": x}).values()
    assert sqnr_db(masked, deployed) >= 70  # as near as MNN's Winograd convolutions come to dense_net unpruned


def _converted(stem):
    convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    return stem + ".mnn"


def test_weights_that_are_gone_take_no_bytes(tmp_path):
    sizes, weights = [], []
    for sparsity in (0.0, 0.5):
        folder = tmp_path / str(sparsity)
        _, _, _, stem = prune(flat_net, TaylorFOChannelPrunerHook, folder, sparsity=sparsity)
        sizes.append(convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin").bytes)
        weights.append(weights_in(read_graph(stem + ".pb")))
    saved = 4 * (weights[0] - weights[1])
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05) and saved > 0.4 * 4 * weights[0]


def test_the_plan_names_the_channels_that_are_not_zero(tmp_path):
    values, _, hook, stem = prune(flat_net, TaylorFOChannelPrunerHook, tmp_path, sparsity=0.6, align_channels=1)
    with open(stem + ".channels.json") as file:
        text = file.read()
    plan = ChannelPlan.from_json(text)
    assert json.loads(text)["layers"]
    for name, layer in plan.layers.items():
        kernel = values[name]
        alive = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(axis=0) > 0
        assert layer.rows == np.flatnonzero(alive).tolist() and layer.out_channels == kernel.shape[-1]
    assert plan.layers["c1/kernel"].rows == plan.layers["c3/kernel"].rows  # they are added
    assert plan.vectors["b1/gamma"] == plan.layers["c1/kernel"].rows
    assert plan.vectors["scale"] == plan.layers["c4/kernel"].rows
    for name in ("b1/beta", "b1/gamma", "scale", "c4/bias"):
        assert np.flatnonzero(values[name]).tolist() == plan.vectors[name]
    assert (values["b1/moving_variance"] > 0).all()


def groups_of(build, **arguments):
    """Sets of layers whose channels live or die together, and why others stay."""
    with tf.Graph().as_default():
        build(tf.placeholder(tf.float32, [None, 12, 12, 4], name="x"))
        classes = TaylorFOChannelPruner(None, **arguments).classes
    return {tuple(sorted(group.layers)) for group in classes.groups}, classes.fixed


def test_channels_that_meet_belong_together():
    def build(x):
        a = tf_nets.conv(x, "a", 8, seed=1)
        b = tf_nets.depthwise(tf_nets.conv(x, "b", 8, seed=2), "d", seed=3)
        gate = tf.nn.sigmoid(tf_nets.conv(tf.reduce_mean(a, [1, 2], keepdims=True), "gate", 8, 1, seed=4))
        y = tf_nets.conv((a + b) * gate, "c", 8, seed=5)
        return tf.nn.softmax(tf_nets.conv(y, "last", 4, seed=6))

    groups, fixed = groups_of(build)
    assert groups == {("a/kernel", "b/kernel", "d/kernel", "gate/kernel"), ("c/kernel",)}
    assert list(fixed) == ["last/kernel"] and "Softmax" in fixed["last/kernel"]


@pytest.mark.parametrize("use, reason", [
    (lambda y: y[..., :5], "cut at fixed positions"),
    (lambda y: tf.slice(y, [0, 0, 0, 0], [-1, 12, 12, 8]), "Slice"),
    (lambda y: tf.nn.lrn(y), "LRN"),
    (lambda y: tf.reduce_mean(y, 3, keepdims=True) + tf.zeros([12, 12, 8]), "Mean"),
    (lambda y: y + tf.placeholder(tf.float32, [None, 12, 12, 8]), "combined with channels that stay"),
    (lambda y: tf.depth_to_space(y, 2), "split over several dimensions"),
    (lambda y: tf.split(y, [3, 5], 3)[1], "SplitV"),
    (lambda y: tf.pad(y, [[0, 0], [0, 0], [0, 0], [1, 2]]), "Pad"),
    (lambda y: tf.nn.l2_normalize(y, 3), "Sum"),
])
def test_what_cannot_be_followed_stays_with_a_reason(use, reason):
    def build(x):
        y = use(tf_nets.conv(tf_nets.conv(x, "free", 8, seed=1), "odd", 8, seed=2))
        return tf_nets.conv(y, "last", 4, seed=3)

    groups, fixed = groups_of(build)
    assert groups == {("free/kernel",)}
    assert reason in fixed["odd/kernel"]


def test_moves_that_keep_channels_whole_are_followed():
    def build(x):
        y = tf_nets.conv(x, "a", 8, seed=1)[:, 1:, :-1, 0:8]
        y = tf.stack([y, y], axis=1)[:, 0]
        y = tf.space_to_depth(tf.pad(y, [[0, 0], [1, 0], [0, 1], [0, 0]]), 2)
        y = tf.reshape(y, [-1, 6, 3, 64])
        y = tf.tile(tf.squeeze(tf.expand_dims(y, 1), [1]), [1, 2, 1, 1])
        return tf_nets.conv(y, "last", 4, seed=3)

    groups, fixed = groups_of(build)
    assert groups == {("a/kernel",)}
    assert list(fixed) == ["last/kernel"]


def test_a_weight_that_is_used_twice_keeps_one_set_of_channels():
    def build(x):
        w = tf_nets.variable("w", [3, 3, 8, 8], 1)
        y = tf_nets.conv(x, "a", 8, seed=2)
        y = tf.nn.relu(tf.nn.conv2d(y, w, strides=1, padding="SAME", name="first"))
        y = tf.nn.relu(tf.nn.conv2d(y, w, strides=1, padding="SAME", name="second"))
        return tf_nets.conv(y, "last", 4, seed=3)

    groups, _ = groups_of(build)
    assert groups == {("a/kernel", "w")}


def test_a_skipped_layer_keeps_all_it_produces(tmp_path):
    values, _, hook, _ = prune(flat_net, TaylorFOChannelPrunerHook, tmp_path, sparsity=0.3, skip_layers=["c3/conv"])
    assert np.abs(values["c3/kernel"]).reshape(-1, 16).max(axis=0).all()
    assert np.abs(values["c1/kernel"]).reshape(-1, 16).max(axis=0).all()
    assert hook.pruner.classes.fixed["c3/kernel"] == "named in skip_layers"


def test_a_network_without_removable_channels_is_refused():
    with tf.Graph().as_default():
        tf_nets.conv(tf.placeholder(tf.float32, [None, 8, 8, 3]), "only", 4)
        with pytest.raises(ValueError, match=r"no channel .*only/kernel: its channels leave the network"):
            TaylorFOChannelPruner(None)
