"""Tensors that both quantized layers and others read are what training simulated, for all of them, in MNN too."""
import pytest

import tf_nets
from deploying import deployed, images, train
from slimtrain.core import sqnr_db
from slimtrain.hooks import LSQQuantizer, OfflineQuantizer, strip_MNN_QAT_ops
from test_hooks_offline import batches, frozen
from tf_setup import session, tf


def pooled_input(x, training):
    y = tf.nn.relu(tf_nets.conv(x, "c1", 3, stride=2, seed=1)) + tf.nn.max_pool(x, 2, 2, "SAME")
    return tf_nets.conv(y, "c2", 4, seed=3)


def scaled_input(x, training):
    y = tf.nn.relu(tf_nets.conv(x, "c1", 3, seed=1)) + tf.exp(x)
    return tf_nets.conv(y, "c2", 4, seed=3)


def moved_input(x, training):
    """Read through operations that only move values."""
    y = tf.nn.relu(tf_nets.conv(x, "c1", 3, seed=1)) + tf.tanh(tf.reverse(tf.transpose(x, [0, 2, 1, 3]), [1]))
    return tf_nets.conv(y, "c2", 4, seed=3)


def gate(x, training):
    """A sigmoid that a layer and a product read."""
    y = tf.nn.relu(tf_nets.conv(x, "c1", 8, seed=1))
    opened = tf.sigmoid(tf_nets.conv(y, "c2", 8, 1, seed=3))
    y = tf_nets.conv(opened, "c3", 8, 1, seed=5) * opened + tf.nn.softplus(opened)
    return tf_nets.conv(y, "c4", 4, 1, seed=7)


def residual(x, training):
    """The input is added, which MNN does on integers."""
    y = x + tf_nets.conv(x, "c1", 3, seed=1)
    return tf_nets.conv(tf.nn.relu(y), "c2", 4, seed=3) * 2.0 + tf.reduce_mean(y, axis=3, keepdims=True)


def shared_sum(x, training):
    """A sum that one layer reads as it is, and another behind an activation."""
    y = tf_nets.conv(x, "c1", 8, seed=1) + tf_nets.conv(x, "c2", 8, seed=3)
    return tf_nets.conv(tf.nn.relu(y), "c3", 4, seed=5) + tf_nets.conv(y, "c4", 4, seed=7)


def shared_wide_sum(x, training):
    y = (tf_nets.conv(x, "c1", 8, seed=1) + tf_nets.conv(x, "c2", 8, seed=3)) * tf_nets.conv(x, "c0", 8, 1, seed=9)
    return tf_nets.conv(tf.nn.relu6(y), "c3", 4, seed=5) + tf_nets.conv(y, "c4", 4, seed=7)


NETS = [pooled_input, scaled_input, moved_input, gate, residual, shared_sum, shared_wide_sum]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("bits", [8, 4])
def test_offline(net, bits, tmp_path):
    graph_def, output = frozen(net)
    quantizer = OfflineQuantizer(graph_def, bits=bits, output_names=[output])
    quantizer.calibrate(batches())
    quantizer.export(tmp_path / "net")
    (integers,) = quantizer.simulate([output], {"x:0": images()})
    coverage, found = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, found) >= 100


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_trained(net, tmp_path):
    trained = train(net, "LSQ", tmp_path, bits=4)
    graph = trained.quantizer.graph
    with graph.as_default():
        saver = tf.train.Saver()
    with session(graph) as run:
        saver.restore(run, trained.checkpoint)
        (integers,) = trained.quantizer.simulate(run, [trained.output], {"x:0": images()})
    coverage, found = deployed(trained.stem, images())
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, found) >= 100


def test_stripped_in_place(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = tf.identity(pooled_input(x, True), name="y")
        quantizer = LSQQuantizer(graph, True, output_names=["y"])
        step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_mean(tf.square(y)))
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        run.run(step, {x: images(4)})
        quantizer.save_compress_params(str(tmp_path / "net.compress_params.bin"), run)
        (integers,) = quantizer.simulate(run, ["y"], {"x:0": images()})
        strip_MNN_QAT_ops(graph)
        graph_def = tf.graph_util.convert_variables_to_constants(run, graph.as_graph_def(), ["y"])
    (tmp_path / "net.pb").write_bytes(graph_def.SerializeToString())
    coverage, output = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0 and sqnr_db(integers, output) >= 100


def test_what_only_layers_read_costs_no_operation():
    graph_def, output = frozen(tf_nets.plain_net)
    quantizer = OfflineQuantizer(graph_def, output_names=[output])
    assert quantizer._read_in_float == frozenset()
    for net in (pooled_input, residual):  # of the latter, MNN computes the sum on integers
        graph_def, output = frozen(net)
        assert OfflineQuantizer(graph_def, output_names=[output])._read_in_float == {"x:0"}
