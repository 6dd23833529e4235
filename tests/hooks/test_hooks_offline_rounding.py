"""Equalisation, bias correction and rounding by data of a frozen graph, against TensorFlow's patches and MNN."""
import numpy as np
import pytest

import tf_nets
from deploying import deployed, images
from slimtrain.core import adaptive_levels, output_error, quantize, sqnr_db
from slimtrain.hooks import OfflineQuantizer
from test_hooks_offline import batches, float_result, frozen
from tf_setup import session, tf

ALL = {"equalize": True, "correct_bias": True, "adaptive_rounding": True}

#: (kernel's shape, attributes of the convolution)
LAYERS = {
    "strided": ((3, 2, 3, 6), dict(strides=[1, 2, 1, 1], padding="VALID")),
    "same": ((3, 3, 3, 6), dict(strides=[1, 2, 2, 1], padding="SAME")),
    "dilated": ((3, 3, 3, 6), dict(strides=[1, 1, 1, 1], padding="SAME", dilations=[1, 2, 2, 1])),
    "short": ((1, 1, 3, 6), dict(strides=[1, 5, 5, 1], padding="SAME")),
    "depthwise": ((3, 3, 3, 1), dict(strides=[1, 1, 1, 1], padding="SAME")),
    "linear": ((432, 5), dict(transpose_b=False)),
    "transposed": ((5, 432), dict(transpose_b=True)),
}


def layer_net(name, bias=None):
    shape, attributes = LAYERS[name]

    def net(x, training):
        w = tf_nets.variable("kernel", shape, 4)
        if len(shape) == 2:
            y = tf.matmul(tf.reshape(x, [-1, 432]), w, name="layer", **attributes)
        else:
            make = tf.raw_ops.DepthwiseConv2dNative if name == "depthwise" else tf.raw_ops.Conv2D
            y = make(input=x, filter=tf.identity(w), name="layer", **attributes)
        return y if bias is None else tf.nn.bias_add(y, tf_nets.variable("bias", [y.shape.as_list()[-1]], 5))

    return net


def related(count=3, images=4):
    """Batches whose channels depend on each other, with a mean."""
    rng = np.random.RandomState(3)
    mixing = rng.randn(2, 3)
    return [(rng.randn(images, 12, 12, 2).dot(mixing) + 0.1 * rng.randn(images, 12, 12, 3) + 0.5).astype(np.float32)
            for _ in range(count)]


def patches(name, x):
    """Receptive fields of the channels of a layer, float64 [groups, samples, K], by TensorFlow's own patches."""
    shape, attributes = LAYERS[name]
    if len(shape) == 2:
        return x.reshape(1, -1, 432).astype(np.float64)
    with tf.Graph().as_default() as graph:
        found = tf.image.extract_patches(tf.constant(x), [1, *shape[:2], 1], attributes["strides"],
                                         attributes.get("dilations", [1] * 4), attributes["padding"])
        with session(graph) as run:
            fields = run.run(found).reshape(-1, shape[0] * shape[1], 3).astype(np.float64)
    fields = fields.transpose(0, 2, 1)    # [samples, channels, places]
    return fields.transpose(1, 0, 2) if name == "depthwise" else fields.reshape(1, len(fields), -1)


def in_rows(name, kernel):
    if name in ("linear", "transposed"):
        return kernel.T if name == "linear" else kernel
    return kernel.transpose((2, 3, 0, 1) if name == "depthwise" else (3, 2, 0, 1))


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_levels_and_bias_are_those_of_the_patches(name, tmp_path):
    data = related(3 if len(LAYERS[name][0]) > 2 else 60, images=1)  # of few enough patches to be all looked at
    graph_def, output = frozen(layer_net(name, bias=True))
    quantizer = OfflineQuantizer(graph_def, bits=4, weight_method="max_abs", correct_bias=True, adaptive_rounding=True,
                                 output_names=[output])
    quantizer.calibrate(data)
    weight = in_rows(name, np.asarray(values_of(graph_def, "kernel")))
    bias = np.asarray(values_of(graph_def, "bias"))
    with tf.Session(graph=quantizer.graph) as run:
        (layer,) = quantizer._rewriting(run).deployed
    scales = layer.params.weight_scales
    columns = scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    on_grid = layer.kernel[0, 0] if weight.ndim == 2 else layer.kernel
    levels = np.rint(in_rows("linear" if weight.ndim == 2 else name, on_grid) / columns)

    fields = np.concatenate([patches(name, batch) for batch in data], axis=1)
    mean = fields.mean(1)
    covariance = np.matmul(fields.transpose(0, 2, 1), fields) / fields.shape[1] - mean[:, :, None] * mean[:, None]
    expected = adaptive_levels(weight, scales, layer.params.weight_grid, covariance)
    found, wanted, plain = (output_error(each * columns - weight, covariance).sum() for each in (
        levels, expected, quantize(weight, scales, layer.params.weight_grid, axis=0)))
    # where two steps of the descent gain the same but for float rounding, a channel may take another way
    assert found == pytest.approx(wanted, rel=0.05) and found < plain
    error = (levels * columns - weight).reshape(len(mean), -1, mean.shape[1])
    shift = -np.matmul(error, mean[:, :, None]).reshape(-1)
    unit = layer.params.input_scale * scales if name == "depthwise" else 1e-5  # whole steps there
    assert (np.abs(layer.bias - bias - shift) <= 0.51 * unit + 1e-5).all()
    assert np.abs(shift).max() > 1e-3


def values_of(graph_def, name):
    return next(tf.make_ndarray(node.attr["value"].tensor) for node in graph_def.node if node.name == name)


@pytest.mark.parametrize("name", ["same", "short", "depthwise", "transposed"])
def test_a_layer_without_a_bias_gets_one(name, tmp_path):
    graph_def, output = frozen(layer_net(name))
    quantizer = OfflineQuantizer(graph_def, bits=4, correct_bias=True, output_names=[output])
    quantizer.calibrate(related())
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate([output], {"x:0": images()})
    coverage, found = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0 and sqnr_db(integers, found) >= 100


def test_with_a_batch_norm_the_correction_is_that_of_what_leaves_it():
    def net(x, training):
        return tf_nets.batch_norm(tf_nets.conv(x, "c", 6, bias=False, seed=1), "norm", training, 2)

    graph_def, output = frozen(net)
    x = related(1)[0] + 0.5
    expected = float_result(graph_def, output, x).mean(axis=(0, 1, 2))
    off = {}
    for correct in (True, False):
        quantizer = OfflineQuantizer(graph_def, weight_bits=3, activation_bits=8, weight_method="max_abs",
                                     correct_bias=correct, output_names=[output])
        quantizer.calibrate([x])
        (found,) = quantizer.simulate([output], {"x:0": x})
        off[correct] = np.abs(found.mean(axis=(0, 1, 2)) - expected).max()
    assert off[True] < 0.15 * off[False], off


@pytest.mark.parametrize("net", [tf_nets.plain_net, tf_nets.wide_net, tf_nets.pool_net],
                         ids=["plain", "wide", "pools"])
def test_networks_deploy_as_simulated_with_all_options(net, tmp_path):
    graph_def, output = frozen(net)
    quantizer = OfflineQuantizer(graph_def, weight_bits=4, activation_bits=8, output_names=[output], **ALL)
    quantizer.calibrate(batches())
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate([output], {"x:0": images()})
    coverage, found = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, found) >= 100


def test_options_gain_accuracy_at_four_bits(tmp_path):
    def net(x, training):
        return tf_nets.conv(tf.nn.relu(tf_nets.conv(x, "c1", 16, seed=1)), "c2", 6, padding="VALID", seed=3)

    graph_def, output = frozen(net)
    data, x = related(12)[:8], np.concatenate(related(12)[8:])
    expected, found = float_result(graph_def, output, x), {}
    for option in ("", "correct_bias", "adaptive_rounding", "both"):
        options = {"correct_bias": True, "adaptive_rounding": True} if option == "both" else {option: True}
        quantizer = OfflineQuantizer(graph_def, weight_bits=4, activation_bits=8, weight_method="max_abs",
                                     output_names=[output], **(options if option else {}))
        quantizer.calibrate(data)
        quantizer.export(tmp_path / "net")
        (integers,) = quantizer.simulate([output], {"x:0": x})
        assert sqnr_db(integers, deployed(str(tmp_path / "net"), x)[1]) >= 100
        found[option] = sqnr_db(expected, integers)
    assert found["adaptive_rounding"] > found[""] and found["both"] > max(found[""] + 0.5, found["correct_bias"]), found


# -- equalisation


def sizes(seed, shape):
    return (10 ** np.random.RandomState(seed).uniform(-1.5, 1.5, shape)).astype(np.float32)


def unbalanced(x, training):
    """Channels of very different sizes in two chains; what ends them is a sum, a ReLU6, a mean."""
    channels = sizes(1, 8)
    w = tf.get_variable("a", initializer=np.random.RandomState(2).randn(3, 3, 3, 8).astype(np.float32) * channels)
    y = tf.nn.conv2d(x, w, [1, 1, 1, 1], "SAME", name="a/conv")
    y = tf.nn.relu(tf_nets.batch_norm(y, "norm", training, 2))    # of either sign
    y = tf.nn.relu(tf_nets.depthwise(y, "b", seed=3, bias=True))
    w = np.random.RandomState(4).randn(1, 1, 8, 8) / channels[:, None]
    y = tf.nn.conv2d(y, tf.get_variable("c", initializer=w.astype(np.float32)), [1, 1, 1, 1], "SAME", name="c/conv")
    y = y + tf.nn.relu6(tf_nets.conv(y, "d", 8, 1, seed=5))
    y = tf.reduce_mean(tf.nn.relu(tf_nets.conv(y, "e", 8, 1, seed=7)), [1, 2])
    w = tf.get_variable("f", initializer=np.random.RandomState(9).randn(8, 8).astype(np.float32) * sizes(3, 8))
    y = tf.nn.relu(tf.matmul(y, w, name="f/matmul") + tf.get_variable("f/bias", initializer=sizes(4, 8)))
    return tf_nets.dense(y, "g", 4, seed=11)


def test_equalisation_keeps_the_function_and_equalises_the_ranges(tmp_path):
    graph_def, output = frozen(unbalanced)
    before = graph_def.SerializeToString(deterministic=True)
    data, x = related(), images()
    expected = float_result(graph_def, output, x)
    gained = {}
    for equalize in (False, True):
        quantizer = OfflineQuantizer(graph_def, equalize=equalize, output_names=[output])
        quantizer.calibrate(data)
        quantizer.export(tmp_path / "net")
        (integers,) = quantizer.simulate([output], {"x:0": x})
        coverage, found = deployed(str(tmp_path / "net"), x)
        assert coverage.fraction == 1.0 and sqnr_db(integers, found) >= 100
        gained[equalize] = sqnr_db(expected, integers)
    assert gained[True] > gained[False] + 3, gained
    assert graph_def.SerializeToString(deterministic=True) == before
    assert sqnr_db(expected, float_result(quantizer.clean, output, x)) > 100
    with session(quantizer.graph) as run:
        kernels = {name: run.run(layer.kernel) for name, layer in quantizer.layers.items()}
        (norm,) = quantizer._network.norms.values()
        gamma, variance = run.run([norm.gamma, norm.variance])
    first = kernels["a/conv"] * gamma / np.sqrt(variance + norm.epsilon)
    for made, read in ((first, kernels["b/depthwise"][..., 0]),
                       (kernels["b/depthwise"][..., 0], kernels["c/conv"].transpose(0, 1, 3, 2)),
                       (kernels["f/matmul"], kernels["g/matmul"].T)):
        ranges = [np.abs(each).reshape(-1, 8).max(axis=0) for each in (made, read)]
        np.testing.assert_allclose(ranges[0], ranges[1], rtol=2e-2)
    untouched = [name for name in ("d/kernel", "e/kernel") if (
        values_of(graph_def, name) == kernels[name.replace("kernel", "conv")]).all()]
    assert untouched == ["d/kernel", "e/kernel"]


def test_equalisation_leaves_skipped_layers_and_those_that_share_a_weight_what_they_were():
    def net(x, training):
        w = tf_nets.variable("shared", [1, 1, 3, 3], 1)
        y = tf.nn.relu(tf.nn.conv2d(x, w, [1, 1, 1, 1], "SAME", name="first"))
        y = tf.nn.conv2d(y, w, [1, 1, 1, 1], "SAME", name="second")
        y = tf.nn.relu(tf_nets.conv(tf.nn.relu6(y), "third", 4, 1, seed=2))
        return tf_nets.conv(y, "last", 4, 1, seed=4)

    graph_def, output = frozen(net)
    quantizer = OfflineQuantizer(graph_def, ["last/conv"], equalize=True, output_names=[output])
    x = images()
    assert sqnr_db(float_result(graph_def, output, x), float_result(quantizer.clean, output, x)) > 100
    names = {node.name for node in quantizer.clean.node if node.name.startswith("slimtrain_equalized")}
    assert names == {"slimtrain_equalized/first/kernel", "slimtrain_equalized/second/kernel"}
