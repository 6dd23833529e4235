"""Finding weights, biases, batch norms and dropouts, however the graph was written."""
import numpy as np
import pytest

import slimtrain.hooks as hooks
import tf_nets
from slimtrain.core import OpKind
from slimtrain.hooks import LSQQuantizer
from slimtrain.hooks.graph import variables_behind
from slimtrain.hooks.helpers import get_op_name_of_type
from slimtrain.hooks.operations import read_network, translate
from tf_setup import IS_1, MODE, session, tf

slim_exists = IS_1


def image(channels=3, size=8):
    return tf.placeholder(tf.float32, [2, size, size, channels], name="x")


def network(build, outputs=None):
    graph = tf.Graph()
    with graph.as_default():
        result = build(image())
        found = read_network(graph, None if outputs is None else [result.name])
    return graph, found


def layer_variables(graph):
    return {name: variables_behind(graph.get_operation_by_name(name).inputs[1]) for name in get_op_name_of_type(graph)}


def test_a_variable_behind_a_read():
    graph, found = network(lambda x: tf_nets.conv(x, "c", 4))
    assert layer_variables(graph) == {"c/conv": ["c/kernel"]}
    assert found.layers["c/conv"].bias is not None and found.layers["c/conv"].linear.op.name == "c/biased"


def test_a_partitioned_variable_is_all_its_parts():
    def build(x):
        kernel = tf.get_variable("w", [3, 3, 3, 8], partitioner=tf.fixed_size_partitioner(2, axis=3))
        return tf.nn.conv2d(x, kernel, strides=1, padding="SAME", name="conv")

    graph, found = network(build)
    assert layer_variables(graph) == {"conv": ["w/part_0", "w/part_1"]}
    assert found.layers["conv"].reason == ""


def test_a_shared_variable_serves_two_layers():
    def build(x):
        kernel = tf_nets.variable("w", [3, 3, 3, 3], 0)
        return tf.nn.conv2d(tf.nn.conv2d(x, kernel, strides=1, padding="SAME", name="a"), kernel, strides=1,
                            padding="SAME", name="b")

    graph, found = network(build)
    assert layer_variables(graph) == {"a": ["w"], "b": ["w"]}


def test_a_one_dimensional_convolution():
    def build(x):
        return tf.nn.conv1d(tf.reshape(x, [2, 64, 3]), tf_nets.variable("w", [3, 3, 4], 0), 1, "SAME", name="conv")

    graph, found = network(build)
    assert list(layer_variables(graph).values()) == [["w"]]


def test_a_product_of_two_activations_is_no_layer():
    graph, found = network(lambda x: tf.matmul(tf.reshape(x, [2, 192]), tf.reshape(x, [192, 2])))
    assert not found.layers


def test_a_bias_added_by_add_counts_and_a_residual_does_not():
    def build(x):
        y = tf_nets.conv(x, "c", 3, bias=False) + tf_nets.variable("b", [3], 1)
        return tf.add(tf_nets.conv(y, "d", 3, bias=False), y, name="sum")

    graph, found = network(build)
    assert found.layers["c/conv"].bias is not None
    assert found.layers["d/conv"].bias is None


@pytest.mark.parametrize("training", [False, True])
def test_the_moving_averages_of_a_batch_norm(training):
    _, found = network(lambda x: tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c", 4, bias=False), "bn", training)))
    norm = found.norms["bn/norm:0"]
    assert norm.training is training
    assert variables_behind(norm.mean) == ["bn/moving_mean"]
    assert variables_behind(norm.variance) == ["bn/moving_variance"]
    assert norm.input.op.name == "c/conv"


@pytest.mark.skipif(not IS_1, reason="tf.layers does not exist with Keras 3")
@pytest.mark.parametrize("training", ["bool", "placeholder"])
def test_tf_layers(training):
    def build(x):
        state = True if training == "bool" else tf.placeholder(tf.bool, [], name="training")
        y = tf.layers.conv2d(x, 4, 3, use_bias=False, name="c")
        y = tf.nn.relu(tf.layers.batch_normalization(y, training=state, name="bn"))
        return tf.layers.dense(tf.layers.flatten(y), 5, name="fc")

    graph, found = network(build)
    assert layer_variables(graph) == {"c/Conv2D": ["c/kernel"], "fc/MatMul": ["fc/kernel"]}
    (norm,) = found.norms.values()
    assert norm.input.op.name == "c/Conv2D" and variables_behind(norm.mean) == ["bn/moving_mean"]
    kinds = [op.kind for op in translate(graph, found, found.layers.values()) if op.kind is not OpKind.OTHER]
    assert kinds == [OpKind.LAYER, OpKind.BATCH_NORM, OpKind.RELU, OpKind.VIEW, OpKind.LAYER]


@pytest.mark.parametrize("training", [False, True])
def test_keras_layers(training):
    if not IS_1:
        keras = pytest.importorskip("keras")
    else:
        keras = tf.keras

    def build(x):
        y = keras.layers.Conv2D(4, 3, name="c")(x)
        return keras.layers.Dense(5, name="fc")(keras.layers.Flatten()(tf.nn.relu(y)))

    graph, found = network(build)
    assert [names[0] for names in layer_variables(graph).values()] == ["c/kernel", "fc/kernel"]
    assert all(layer.bias is not None and not layer.reason for layer in found.layers.values())


@pytest.mark.skipif(not slim_exists, reason="slim does not import with TensorFlow 2")
def test_slim():
    slim = pytest.importorskip("tensorflow.contrib.slim")

    def build(x):
        with slim.arg_scope([slim.conv2d], normalizer_fn=slim.batch_norm):
            y = slim.conv2d(x, 4, 3, scope="c")
        return slim.fully_connected(slim.flatten(y), 5, activation_fn=None, scope="fc")

    graph, found = network(build)
    assert layer_variables(graph) == {"c/Conv2D": ["c/weights"], "fc/MatMul": ["fc/weights"]}
    (norm,) = found.norms.values()
    assert variables_behind(norm.mean) == ["c/BatchNorm/moving_mean"]


@pytest.mark.parametrize("rate", ["number", "placeholder"])
def test_dropouts_are_seen_one_behind_the_other(rate):
    def build(x):
        share = 0.5 if rate == "number" else tf.placeholder(tf.float32, [], name="rate")
        return tf.nn.dropout(tf.nn.relu(tf.nn.dropout(x, rate=share)), rate=share)

    graph, found = network(build)
    assert [source.op.type for source in found.dropouts.values()] == ["Placeholder", "Relu"]


def test_layers_that_must_stay_float_say_why():
    def build(x):
        multiplied = tf.nn.depthwise_conv2d(x, tf_nets.variable("w", [3, 3, 3, 2], 0), [1, 1, 1, 1], "SAME", name="two")
        constant = tf.nn.conv2d(x, tf.zeros([3, 3, 3, 6]), strides=1, padding="SAME", name="constant")
        tf.matmul(tf.reshape(x, [2, 192]), tf_nets.variable("v", [2, 4], 0), transpose_a=True, name="turned")
        return multiplied + constant

    graph, found = network(build)
    reasons = {name: layer.reason for name, layer in found.layers.items()}
    assert "depth multiplier is 2" in reasons["two"]
    assert "no variable" in reasons["constant"]
    assert "transposes" in reasons["turned"]


def test_summaries_do_not_break_up_a_fused_layer():
    def build(x):
        y = tf_nets.conv(x, "c", 4)
        tf.summary.histogram("watched", y)
        return tf.nn.relu(y)

    with tf.Graph().as_default() as graph:
        result = build(image())
        quantizer = LSQQuantizer(graph, True)
    assert [call.fused for call in quantizer._placement.calls] == [result.name]


def test_the_mode_is_what_the_environment_says():
    with tf.Graph().as_default():
        variable = tf.get_variable("v", [1])
    assert (variable.op.type == "VarHandleOp") is (MODE == "resource")


def test_one_dimensional_and_partitioned_weights_are_quantized_like_any_other():
    def build(x):
        kernel = tf.get_variable("w", [3, 3, 3, 8], partitioner=tf.fixed_size_partitioner(2, axis=3))
        y = tf.nn.relu(tf.nn.conv2d(x, kernel, strides=1, padding="SAME", name="conv"))
        return tf.nn.conv1d(tf.reshape(y, [2, 64, 8]), tf_nets.variable("v", [3, 8, 4], 0), 1, "SAME", name="flat")

    with tf.Graph().as_default() as graph:
        x = image()
        y = build(x)
        quantizer = LSQQuantizer(graph, True, bits=4)
        gradients = tf.gradients(quantizer.graph.get_tensor_by_name(y.name), tf.trainable_variables())
        with session(graph) as run_session:
            run_session.run(tf.global_variables_initializer())
            kernel = run_session.run(graph.get_operation_by_name("conv").inputs[1], {x: np.ones([2, 8, 8, 3])})
    assert sum(g is not None for g in gradients) >= 3
    assert all(len(np.unique(kernel[..., channel])) <= 16 for channel in range(8))


@pytest.mark.parametrize("quantizer", ["LSQ", "EMA", "OAQ"])
def test_every_variable_of_the_state_lives_where_the_model_does(quantizer):
    cluster = tf.train.ClusterSpec({"ps": ["localhost:1", "localhost:2"], "worker": ["localhost:3"]})
    setter = tf.train.replica_device_setter(cluster=cluster, worker_device="/job:worker/task:0")
    with tf.Graph().as_default() as graph, tf.device(setter):
        tf_nets.conv(tf.nn.relu(tf_nets.conv(image(), "c", 4)), "d", 4)
        getattr(hooks, quantizer + "Quantizer")(graph, retain_sparsity=True)
        devices = {variable.op.name: variable.device for variable in tf.global_variables()}
    state = {name: device for name, device in devices.items() if name.startswith("MNN_QAT/")}
    assert len(state) > 8
    assert all(device.startswith("/job:ps") for device in state.values()), state
    for name, device in state.items():
        for layer in ("c", "d"):
            if name.startswith("MNN_QAT/{}/".format(layer)):
                assert device == devices[layer + "/kernel"]
