"""What was trained is what is deployed: fake quantization in float64, the integers of the core, and MNN itself."""
import numpy as np
import pytest

import tf_nets
from deploying import build, deployed, images, train
from float64_graph import run_in_float64
from slimtrain.core import ConversionError, sqnr_db
from slimtrain.hooks import LSQQuantizer
from tf_setup import IS_1, session, tf

NETS = {"wide": tf_nets.wide_net, "plain": tf_nets.plain_net, "pools": tf_nets.pool_net}
CASES = [("wide", quantizer, bits) for quantizer in ("LSQ", "EMA", "OAQ") for bits in (8, 4, 2)] + [
    ("plain", "LSQ", 8), ("plain", "EMA", 2), ("pools", "LSQ", 8), ("pools", "OAQ", 4), ("pools", "EMA", 2)]


def rebuilt(net, quantizer, checkpoint, x, **arguments):
    """A test graph of its own, restored: (fake quantization in float64, integers of the core, coverage)."""
    graph, _, y, made = build(net, quantizer, False, **arguments)
    with graph.as_default():
        saver = tf.train.Saver()
    with session(graph) as run:
        saver.restore(run, checkpoint)
        (fake,) = run_in_float64(run, [y.name], {"x:0": x}, {made.is_training.op.name: False})
        (integers,) = made.simulate(run, [y.name], {"x:0": x})
    return fake, integers


@pytest.mark.parametrize("net, quantizer, bits", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_three_ways_to_the_same_numbers(net, quantizer, bits, tmp_path):
    trained = train(NETS[net], quantizer, tmp_path, bits=bits)
    assert trained.quantizer.coverage().fraction == 1.0
    x = images()
    fake, integers = rebuilt(NETS[net], quantizer, trained.checkpoint, x, bits=bits)
    coverage, output = deployed(trained.stem, x)
    assert coverage.fraction == 1.0
    assert output.shape == integers.shape
    assert sqnr_db(integers, output) >= 100
    # next to a tie the float32 order of MNN may round to the other level, which no simulation in real numbers can know
    assert sqnr_db(integers, fake) > 40
    assert np.ptp(fake) > 0


def test_skipped_layers_stay_float_and_the_rest_is_exact(tmp_path):
    arguments = dict(skip_quant_layers=["c1/conv"], skip_quant_flag=["f2"])
    trained = train(tf_nets.pool_net, "LSQ", tmp_path, **arguments)
    rows = {row.name: row for row in trained.quantizer.coverage().layers}
    assert [row.state.value for row in rows.values()] == ["float", "int8", "int8", "int8", "float"]
    assert rows["f2/matmul"].reason == "it was skipped"
    _, integers = rebuilt(tf_nets.pool_net, "LSQ", trained.checkpoint, images(), **arguments)
    coverage, output = deployed(trained.stem, images())
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, output) >= 100


@pytest.mark.parametrize("weight_bits, activation_bits", [(2, 8), (8, 3)])
def test_weights_and_activations_may_have_their_own_bits(weight_bits, activation_bits, tmp_path):
    arguments = dict(weight_bits=weight_bits, activation_bits=activation_bits)
    trained = train(tf_nets.plain_net, "LSQ", tmp_path, **arguments)
    _, integers = rebuilt(tf_nets.plain_net, "LSQ", trained.checkpoint, images(), **arguments)
    assert sqnr_db(integers, deployed(trained.stem, images())[1]) >= 100


def test_zeros_stay_zero_on_request(tmp_path):
    def sparse(x, training):
        w = np.random.RandomState(0).randn(3, 3, 3, 8).astype(np.float32)
        w[np.abs(w) < 0.7] = 0
        sparse.zeros = w == 0
        y = tf.nn.conv2d(x, tf.get_variable("w", initializer=w), strides=1, padding="SAME", name="conv")
        return tf_nets.dense(tf.reduce_mean(tf.nn.relu(y), [1, 2]), "fc", 4, seed=3)

    trained = train(sparse, "LSQ", tmp_path, retain_sparsity=True)
    exported = tf.GraphDef()
    with open(trained.stem + ".pb", "rb") as file:
        exported.ParseFromString(file.read())
    kernel = next(tf.make_ndarray(node.attr["value"].tensor) for node in exported.node
                  if node.op == "Const" and node.attr["value"].tensor.tensor_shape.dim and
                  [dim.size for dim in node.attr["value"].tensor.tensor_shape.dim] == [3, 3, 3, 8])
    assert (kernel[sparse.zeros] == 0).all()
    assert (kernel != 0).mean() > 0.3
    assert tf.train.load_checkpoint(trained.checkpoint).get_tensor("w")[sparse.zeros].sum() == 0


def test_a_network_with_dropout_and_an_input_pipeline_is_exported_without_them(tmp_path):
    with tf.Graph().as_default() as graph:
        data = tf.data.Dataset.from_tensors(images()).repeat()
        x = tf.data.make_one_shot_iterator(data).get_next()
        y = tf.nn.dropout(tf.nn.relu(tf_nets.conv(x, "c", 8, seed=1)), rate=0.4)
        y = tf_nets.dense(tf.nn.dropout(tf.reduce_mean(y, [1, 2]), rate=0.2), "fc", 5, seed=3)
        quantizer = LSQQuantizer(graph, True, output_names=[y.name])
        step = tf.train.GradientDescentOptimizer(0.01).minimize(tf.reduce_mean(tf.square(y)))
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            for _ in range(3):
                run.run(step)
            quantizer.export(str(tmp_path / "net"), run)
            (integers,) = quantizer.simulate(run, [y.name], {"input:0": images()})
    from slimtrain.proto import convert, run_model
    stem = str(tmp_path / "net")
    assert convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin").coverage.fraction == 1.0
    (output,) = run_model(stem + ".mnn", {"input": images()}).values()
    assert sqnr_db(integers, output) >= 100


def test_a_batch_norm_without_moving_averages_cannot_be_exported(tmp_path):
    def net(x, training):
        y = tf_nets.conv(x, "c", 4)
        return tf.nn.fused_batch_norm(y, tf.ones([4]), tf.zeros([4]), is_training=True, name="lost")[0]

    with pytest.raises(ConversionError, match="'lost' uses the statistics of the batch"):
        train(net, "LSQ", tmp_path)
    assert not list(tmp_path.glob("net*"))


def test_the_training_graph_is_untouched_by_an_export(tmp_path):
    graph, x, y, quantizer = build(tf_nets.plain_net, "LSQ", True)
    with graph.as_default():
        tf.train.GradientDescentOptimizer(0.01).minimize(tf.reduce_mean(y))
        init = tf.global_variables_initializer()
    graph.finalize()
    before = (len(graph.get_operations()), graph.version, graph.as_graph_def().SerializeToString(deterministic=True))
    with session(graph) as run:
        run.run(init)
        run.run(y, {x: images()})
        weights = run.run(graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)[0])
        quantizer.export(str(tmp_path / "net"), run)
        np.testing.assert_array_equal(run.run(graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)[0]), weights)
    assert before == (len(graph.get_operations()), graph.version,
                      graph.as_graph_def().SerializeToString(deterministic=True))
    assert graph.finalized


def test_the_output_that_a_user_fetches_is_the_quantized_one():
    graph, x, y, quantizer = build(tf_nets.plain_net, "LSQ", True, bits=8)
    with session(graph) as run:
        with graph.as_default():
            run.run(tf.global_variables_initializer())
        values = run.run(y, {x: images()})
        (scale,) = [run.run(quantizer._scales[call.output].stored) for call in quantizer._placement.calls
                    if call.fused == y.name]
    steps = values / scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert len(np.unique(np.rint(steps))) > 10


@pytest.mark.skipif(not IS_1, reason="tf.layers does not exist with Keras 3")
@pytest.mark.parametrize("state", ["bool", "placeholder"])
def test_tf_layers_with_batch_norm_deploy_from_the_training_graph(state, tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        training = True if state == "bool" else tf.placeholder(tf.bool, [], name="training")
        y = tf.layers.conv2d(x, 8, 3, strides=2, padding="same", use_bias=False)
        y = tf.nn.relu6(tf.layers.batch_normalization(y, training=training, momentum=0.5))
        y = tf.layers.separable_conv2d(y, 12, 3, padding="same", activation=tf.nn.relu)
        y = tf.layers.dropout(y, 0.3, training=training)
        y = tf.layers.dense(tf.layers.flatten(y), 10, activation=tf.nn.relu)
        y = tf.layers.dense(y, 4, name="logits")
        quantizer = LSQQuantizer(graph, True, output_names=["logits/BiasAdd"])
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            step = tf.train.GradientDescentOptimizer(0.01).minimize(tf.reduce_mean(tf.square(y - 1)))
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            for number in range(4):
                feeds = {x: np.random.RandomState(number).randn(4, 12, 12, 3)}
                run.run(step, feeds if state == "bool" else {**feeds, training: True})
            quantizer.export(str(tmp_path / "net"), run)
            (integers,) = quantizer.simulate(run, ["logits/BiasAdd"], {x: images()})
    coverage, output = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0 and len(coverage.layers) == 5
    assert sqnr_db(integers, output) >= 100


def unfused_norm(x, training):
    """Batch norm as Keras 3 and dense layers have it: moments, and moving averages that are assigned to."""
    y = tf_nets.conv(x, "c", 6, stride=2, bias=False, seed=1)
    mean, variance = (tf.get_variable(name, initializer=start * np.ones(6, np.float32), trainable=False)
                      for name, start in (("moving_mean", 0), ("moving_variance", 1)))
    if training:
        batch = tf.nn.moments(y, [0, 1, 2])
        for average, now in zip((mean, variance), batch):
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_sub(average, (average.read_value() - now) * 0.5))
        mean, variance = batch
    y = tf.nn.batch_normalization(y, mean, variance, tf_nets.variable("beta", [6], 2, 1), tf.ones([6]), 1e-3)
    return tf_nets.dense(tf.reduce_mean(tf.nn.relu(y), [1, 2]), "fc", 4, seed=3)


def test_an_unfused_batch_norm_is_exported_with_its_moving_averages(tmp_path):
    trained = train(unfused_norm, "LSQ", tmp_path)
    x = 3 * images() + 1  # the statistics of this batch are others
    fake, integers = rebuilt(unfused_norm, "LSQ", trained.checkpoint, x)
    coverage, output = deployed(trained.stem, x)
    assert coverage.fraction == 1.0
    assert sqnr_db(integers, output) >= 100
    assert sqnr_db(integers, fake) > 40


def test_an_unfused_batch_norm_without_moving_averages_cannot_be_exported(tmp_path):
    def net(x, training):
        y = tf_nets.conv(x, "c", 4)
        mean, variance = tf.nn.moments(y, [0, 1, 2], name="lost")
        return tf.nn.relu(tf.nn.batch_normalization(y, mean, variance, None, None, 1e-3))

    with pytest.raises(ConversionError, match="'lost/SquaredDifference' uses the statistics of the batch"):
        train(net, "LSQ", tmp_path)


def partitioned_and_shared(x, training):
    """A kernel in two parts, one that two layers share, and a one-dimensional convolution."""
    parts = tf.get_variable("parts", [3, 3, 3, 8], initializer=tf.random_normal_initializer(0.0, 0.3, seed=1),
                            partitioner=tf.fixed_size_partitioner(2, axis=3))
    y = tf.nn.relu6(tf.nn.conv2d(x, parts, strides=2, padding="SAME", name="whole"))
    kernel = tf_nets.variable("shared", [3, 3, 8, 8], 2)
    for name in ("first", "second"):
        y = tf.nn.relu(tf.nn.conv2d(y, kernel, strides=1, padding="SAME", name=name))
    y = tf.nn.conv1d(tf.reshape(y, [-1, 36, 8]), tf_nets.variable("flat", [3, 8, 4], 3), 2, "SAME")
    return tf.identity(y)


@pytest.mark.parametrize("quantizer, bits", [("LSQ", 8), ("EMA", 4), ("OAQ", 8)])
def test_partitioned_and_shared_weights_deploy_exactly(quantizer, bits, tmp_path):
    graph, x, y, made = build(partitioned_and_shared, quantizer, True, bits=bits)
    with graph.as_default():
        step = tf.train.GradientDescentOptimizer(1e-3).minimize(tf.reduce_mean(tf.square(y - 1.0)))
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        for number in range(3):
            run.run(step, {x: np.random.RandomState(number).randn(4, 12, 12, 3)})
            made.update(run)
        made.export(str(tmp_path / "net"), run)
        (integers,) = made.simulate(run, [y.name], {x: images()})
    coverage, output = deployed(str(tmp_path / "net"), images())
    assert coverage.fraction == 1.0 and len(coverage.layers) == 4
    assert sqnr_db(integers, output) >= 100
