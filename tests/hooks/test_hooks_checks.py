"""Graphs and arguments that are refused, each with the sentence that mends it."""
import gc

import numpy as np
import pytest

import slimtrain.hooks as hooks
import tf_nets
from slimtrain.hooks import LSQQuantizer, LSQQuantizerHook, OAQQuantizer, get_qat_state_placeholder
from tf_setup import IS_1, MODE, session, tf


@pytest.fixture
def graph():
    gc.collect()
    with tf.Graph().as_default() as built:
        tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 3], name="x"), "c", 4)
        yield built


def test_a_finalized_graph(graph):
    graph.finalize()
    with pytest.raises(RuntimeError, match="before the .monitored. session"):
        LSQQuantizer(graph)


def test_a_graph_with_gradients(graph):
    tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(graph.get_tensor_by_name("c/biased:0")))
    with pytest.raises(RuntimeError, match="before the optimizer"):
        LSQQuantizer(graph)


def test_a_graph_with_gradients_alone(graph):
    tf.gradients(graph.get_tensor_by_name("c/biased:0"), tf.trainable_variables())
    with pytest.raises(RuntimeError, match="gradients"):
        LSQQuantizer(graph)


def test_a_graph_with_a_session(graph):
    with session(graph):
        with pytest.raises(RuntimeError, match="close that session"):
            LSQQuantizer(graph)
    LSQQuantizer(graph)


class OwnSession(tf.Session):
    """As users write them."""


@pytest.mark.parametrize("kind", [OwnSession, tf.InteractiveSession])
def test_a_graph_with_a_session_of_another_kind(kind, graph):
    opened = kind(graph=graph)
    with pytest.raises(RuntimeError, match="close that session"):
        LSQQuantizer(graph)
    opened.close()
    LSQQuantizer(graph)


def test_a_session_of_another_graph_is_none_of_its_business(graph):
    with session(tf.Graph()):
        LSQQuantizer(graph)


def test_a_second_quantizer(graph):
    LSQQuantizer(graph)
    with pytest.raises(RuntimeError, match="one quantizer per graph"):
        LSQQuantizer(graph)


@pytest.mark.skipif(IS_1 or MODE == "reference", reason="control flow is not of version 2")
def test_layers_hidden_in_a_branch():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 3])
        w = tf_nets.variable("w", [3, 3, 3, 4], 0)
        tf.cond(tf.reduce_sum(x) > 0, lambda: tf.nn.conv2d(x, w, strides=1, padding="SAME"),
                lambda: tf.zeros([2, 8, 8, 4]))
        with pytest.raises(ValueError, match="disable_control_flow_v2"):
            LSQQuantizer(graph)


@pytest.mark.skipif(not IS_1 and MODE == "resource", reason="control flow is not of version 1")
def test_layers_in_a_version_1_branch_stay_float():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [2, 8, 8, 3])
        w = tf_nets.variable("w", [3, 3, 3, 4], 0)
        y = tf.cond(tf.reduce_sum(x) > 0, lambda: tf.nn.conv2d(x, w, strides=1, padding="SAME"),
                    lambda: tf.zeros([2, 8, 8, 4]))
        tf_nets.conv(y, "c", 4)
        rows = LSQQuantizer(graph, True).coverage().layers
    assert [(row.state.value, "cond or while_loop" in row.reason) for row in rows] == [("float", True), ("int8", False)]


def test_nothing_to_quantize():
    with tf.Graph().as_default() as graph:
        tf.nn.relu(tf.placeholder(tf.float32, [1]))
        with pytest.raises(ValueError, match="nothing to quantize"):
            LSQQuantizer(graph)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(bits=1), ValueError, "from 2 to 8"),
    (dict(bits=9), ValueError, "from 2 to 8"),
    (dict(activation_bits=16), ValueError, "from 2 to 8"),
    (dict(is_training=1), TypeError, "None, True or False"),
    (dict(skip_quant_layers=["c/conf"]), ValueError, "c/conv"),
    (dict(skip_quant_layers="c/conv"), TypeError, "one string"),
    (dict(skip_quant_flag="c"), TypeError, "sequence"),
    (dict(output_names="c/biased"), TypeError, "sequence"),
    (dict(output_names=["nothing"]), ValueError, "no tensor named"),
    (dict(skip_quant_flag=["c/"]), ValueError, "skipped"),
])
def test_bad_arguments(graph, arguments, error, message):
    with pytest.raises(error, match=message):
        LSQQuantizer(graph, **arguments)


@pytest.mark.parametrize("clamp", [-1, 128, 3.5])
def test_a_bad_clamp(graph, clamp):
    with pytest.raises(ValueError, match="min_clamp_value"):
        OAQQuantizer(graph, min_clamp_value=clamp)


def test_a_graph_must_be_a_graph():
    with pytest.raises(TypeError, match="tf.Graph"):
        LSQQuantizer(tf.GraphDef())


def test_a_hook_with_a_folder_needs_to_know_what_leaves_the_network(graph, tmp_path):
    with pytest.raises(ValueError, match="output_names"):
        LSQQuantizerHook(export_dir=str(tmp_path))


def test_a_hook_in_the_wrong_graph(graph):
    hook = LSQQuantizerHook(graph)
    with tf.Graph().as_default():
        with pytest.raises(RuntimeError, match="construct the hook in the graph"):
            hook.begin()


def test_a_checkpoint_that_is_none(graph, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        LSQQuantizerHook(init_checkpoint=str(tmp_path / "nothing"))


def test_a_checkpoint_of_another_model(graph, tmp_path):
    with tf.Graph().as_default() as other:
        variable = tf.get_variable("something", [2])
        saver = tf.train.Saver([variable])
        with session(other) as run:
            run.run(variable.initializer)
            path = saver.save(run, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no variable in common"):
        LSQQuantizerHook(init_checkpoint=path)


def test_saving_before_the_first_step(graph, tmp_path):
    quantizer = LSQQuantizer(graph, True, output_names=["c/biased"])
    init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        with pytest.raises(RuntimeError, match="at least one training step"):
            quantizer.save_compress_params(str(tmp_path / "p.bin"), run)
        with pytest.raises(RuntimeError, match="at least one training step"):
            quantizer.export(str(tmp_path / "net"), run)
    assert not list(tmp_path.iterdir())


def test_a_session_of_another_graph(graph):
    quantizer = LSQQuantizer(graph)
    with session(tf.Graph()) as run:
        with pytest.raises(RuntimeError, match="not of the graph"):
            quantizer.update(run)


def test_the_state_of_a_graph_that_is_not_quantized(graph):
    with pytest.raises(ValueError, match="no quantizer"):
        get_qat_state_placeholder()


@pytest.mark.parametrize("quantizer, message", [
    ("LSQ", "MNN_QAT/c/conv/weight_scale cannot start from the first values that it sees: .* 1 of 108"),
    ("EMA", "layer 'c/conv' cannot be deployed: 1 of the 108 values of its kernel are not finite"),
])
def test_weights_that_are_not_finite(quantizer, message, graph, tmp_path):
    made = getattr(hooks, quantizer + "Quantizer")(graph, True, output_names=["c/biased"])

    def train(run):
        run.run("c/biased:0", {"x:0": np.ones([2, 8, 8, 3])})

    def train_and_export(run):
        train(run)
        made.export(str(tmp_path / "net"), run)

    kernel = graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)[0]
    spoiled = np.ones(kernel.shape.as_list(), np.float32)
    spoiled[2, 1, 0, 3] = np.nan
    spoil = tf.assign(kernel, spoiled)
    init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        if quantizer == "EMA":  # whose ranges start from finite values only
            train(run)
        run.run(spoil)
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
            train_and_export(run)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_is_not_finite_or_empty_leaves_a_tracked_range_alone():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        y = tf_nets.conv(x, "c", 4)
        made = hooks.EMAQuantizer(graph, True, output_names=[y.name])
        init = tf.global_variables_initializer()
        variable = next(v for v in hooks.MNN_QAT_variables() if v.op.name == "MNN_QAT/c/conv/input_scale")
        good = np.random.RandomState(0).randn(2, 8, 8, 3)
        with session(graph) as run:
            run.run(init)
            for bad in (np.full([2, 8, 8, 3], np.nan), np.full([2, 8, 8, 3], np.inf), np.zeros([0, 8, 8, 3])):
                run.run(y, {x: bad})
                assert not made.ready(run)
            run.run(y, {x: good})
            before = run.run(variable)
            np.testing.assert_allclose(before, np.abs(good).max() / 127, rtol=1e-6)
            for bad in (np.full([2, 8, 8, 3], np.nan), np.full([2, 8, 8, 3], np.inf), np.zeros([0, 8, 8, 3])):
                run.run(y, {x: bad})
                assert run.run(variable) == before and made.ready(run)


def test_a_flag_that_skips_nothing_is_told(graph, caplog):
    LSQQuantizer(graph, skip_quant_flag=["decoder"])
    assert "'decoder' skips nothing" in caplog.text


@pytest.mark.parametrize("named", [True, False])
def test_an_end_that_cannot_be_quantized_says_what_to_do(named):
    with tf.Graph().as_default() as graph:
        y = tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 3]), "c", 4, bias=False)
        with pytest.raises(ValueError, match="put a tf.identity"):
            LSQQuantizer(graph, output_names=[y.name] if named else None)
    with tf.Graph().as_default() as graph:
        y = tf.identity(tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 3]), "c", 4, bias=False))
        LSQQuantizer(graph, output_names=[y.name] if named else None)


def test_a_loss_built_later_reads_the_quantized_result_even_if_something_was_built_on_it_before():
    with tf.Graph().as_default() as graph:
        y = tf_nets.conv(tf.placeholder(tf.float32, [2, 8, 8, 3], name="x"), "c", 4)
        tf.argmax(y, -1)
        quantizer = LSQQuantizer(graph, True)
        loss = tf.reduce_mean(y)
        init = tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            run.run(loss, {"x:0": np.ones([2, 8, 8, 3])})
            assert quantizer.ready(run)
