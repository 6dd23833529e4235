"""Operations between quantized layers that MNN computes in its own way on integers, or in float after all."""
import pytest

import tf_nets
from deploying import build, deployed, images, train
from slimtrain.core import sqnr_db
from slimtrain.proto import convert, run_model
from tf_setup import session, tf


def residual(add, act=tf.identity):
    """A sum of two convolutions that a convolution reads, and the next sum."""
    def net(x, training):
        y = act(tf_nets.conv(x, "c1", 8, stride=2, seed=1))
        for name in ("c2", "c3"):
            y = act(add(y, tf_nets.conv(y, name, 8, seed=3)))
        return tf_nets.conv(y, "c4", 4, 1, seed=7)
    return net


def between(middle, channels=8, stride=4):
    """``middle`` between two convolutions; 3x3x8 values are no multiple of 16."""
    def net(x, training):
        y = middle(tf_nets.conv(x, "c1", channels, stride=stride, seed=1))
        return tf_nets.conv(y, "c2", 4, 1, seed=3)
    return net


def matrix(middle):
    def net(x, training):
        y = tf_nets.dense(tf.reshape(x, [-1, 432]), "f1", 6, seed=1)
        return tf_nets.dense(middle(y), "f2", 4, seed=3)
    return net


def explicit(y):
    """A convolution with padding of its own, left and right unequal."""
    w = tf_nets.variable("e/kernel", [3, 3, y.shape.as_list()[-1], 8], 9)
    return tf.nn.conv2d(y, w, strides=[1, 1, 1, 1], padding=[[0, 0], [1, 0], [2, 1], [0, 0]], name="e/conv")


NETS = {
    # an activation between them: MNN 3.6.0 crashes where a float convolution stands alone between quantized ones
    "explicit padding": between(lambda y: tf.nn.relu(explicit(y))),
    "sum": residual(tf.add), "difference": residual(tf.subtract), "product": residual(tf.multiply),
    "sum, relu": residual(tf.add, tf.nn.relu), "sum, relu6": residual(tf.add, tf.nn.relu6),
    "shared relu": between(lambda y: tf.nn.relu(y) + y),
    "relu of a sum": between(lambda y: tf.nn.relu(y + tf_nets.conv(y, "c3", 8, seed=5))),
    "relu of 16 channels": between(lambda y: tf.nn.relu(y + tf_nets.conv(y, "c3", 16, seed=5)), 16),
    "matrix, shared relu": matrix(lambda y: tf.nn.relu(y) + y),
    "matrix, leaky relu": matrix(lambda y: tf.nn.leaky_relu(y) + y),
    "bilinear": between(lambda y: tf.image.resize_bilinear(y, [7, 8])),
    "absolute": between(lambda y: tf.abs(tf.nn.relu(y)), stride=2),
    "negative": between(lambda y: tf.concat([y, -y], 3), stride=2),
    "matrix, parametric relu": matrix(lambda y: tf.nn.relu(y) - 0.1 * tf.nn.relu(-y)),
}


@pytest.mark.parametrize("name", sorted(NETS))
def test_deploys_as_simulated(name, tmp_path):
    trained = train(NETS[name], "LSQ", tmp_path)
    graph, _, y, quantizer = build(NETS[name], "LSQ", False)
    with graph.as_default():
        saver = tf.train.Saver()
    with session(graph) as run:
        saver.restore(run, trained.checkpoint)
        (integers,) = quantizer.simulate(run, [y.name], {"x:0": images(1)})
    coverage, output = deployed(trained.stem, images(1))
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, output) >= 100


@pytest.mark.parametrize("end, lost", [(tf.identity, True), (lambda y: tf.reshape(y, tf.shape(y)), False)])
def test_an_output_that_mnn_does_not_deliver_is_named(end, lost, tmp_path, caplog):
    def net(x, training):
        net.inner = end(tf.nn.relu(tf_nets.conv(x, "c1", 8, stride=2)))
        return tf_nets.conv(net.inner.op.inputs[0], "c2", 4)

    graph, x, y, quantizer = build(net, "LSQ", True)
    names = [y.op.name, net.inner.op.name]
    with graph.as_default():
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        run.run(y, {x: images()})
        quantizer.export(str(tmp_path / "net"), run, names)
    stem = str(tmp_path / "net")
    convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    assert (names[1] not in run_model(stem + ".mnn", {"x": images()})) == lost
    assert ("will not deliver the output {!r}".format(names[1]) in caplog.text) == lost
