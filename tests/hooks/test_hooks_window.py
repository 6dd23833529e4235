"""Quantization that begins in the middle of a training, scales that stay from its end on, and how far scales move."""
import numpy as np
import pytest

import slimtrain.hooks as hooks
import tf_nets
from mnn_weights import decode
from slimtrain.core import LayerState, mse_scale, sqnr_db, weight_grid
from slimtrain.proto import convert, run_model
from tf_setup import one_thread, tf

SLOW = pytest.mark.slow
KINDS = ["LSQ", "EMA", "OAQ", pytest.param("WAQ", marks=SLOW), "Weight"]
LAST = 8


def network(training=True):
    """(input, output) with batch norm and a depthwise layer, in the default graph."""
    x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 6, bias=False, seed=1), "b1", training, 2), name="r1")
    y = tf.nn.relu6(tf_nets.conv(y, "c2", 8, seed=3), name="r2")
    return x, tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")


def batch(step):
    return np.random.RandomState(step).randn(4, 8, 8, 3).astype(np.float32)


class Watch(tf.train.SessionRunHook):
    """Keeps all trainable variables and moving averages after every training step."""

    def __init__(self):
        self.values = []

    def after_run(self, run_context, run_values):
        session = run_context.session
        wanted = {each.op.name: each for each in tf.global_variables() if "Momentum" not in each.op.name}
        self.values.append(session.run(wanted))


def make(kind, folder, begin=3, end=5, **options):
    if kind != "Weight":
        options["end"] = end
    return getattr(hooks, kind + "QuantizerHook")(
        bits=4, begin=begin, output_names=["logits"], export_dir=str(folder / "out"), **options)


def train(folder, make_hook=None, last=LAST, optimizer=None):
    """Train until a global step; returns the hook and what every step left in the variables."""
    with tf.Graph().as_default():
        x, logits = network()
        hook = make_hook() if make_hook else None
        loss = tf.reduce_mean(tf.square(logits - 1.0))
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            update = (optimizer or tf.train.MomentumOptimizer)(0.01, 0.9).minimize(loss, global_step=step)
        watch = Watch()
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=str(folder), hooks=[each for each in (hook, watch) if each], save_checkpoint_steps=100,
                save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
                config=one_thread()) as session:
            raw = session._tf_sess()
            for number in range(raw.run(step), last):
                session.run(update, {x: batch(number)})
    return hook, watch.values


def weights(values):
    return {name: value for name, value in values.items() if not name.startswith("MNN_QAT") and "step" not in name}


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return [weights(values) for values in train(tmp_path_factory.mktemp("plain"))[1]]


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """(kind, folder, hook, values after each step) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param)
    return (request.param, folder) + train(folder, lambda: make(request.param, folder))


def test_the_network_is_trained_in_float_until_then(whole, plain):
    found = [same(wanted, weights(values)) for wanted, values in zip(plain, whole[3])]
    assert found == [True] * 3 + [False] * 5


def test_scales_move_in_the_window_alone(whole):
    kind, _, hook, values = whole
    if kind == "Weight":
        return
    names = [name for name in values[0] if name.startswith("MNN_QAT/") and "initialized" not in name
             and "window" not in name and "overflow" not in name and not name.endswith(("_size", "winograd_unit"))]
    moved = [not same({name: before[name] for name in names}, after) for before, after in zip(values, values[1:])]
    assert moved == [False, False, True, True, False, False, False]
    assert not any(same(weights(before), weights(after)) for before, after in zip(values, values[1:]))


def test_scales_start_from_the_weights_of_that_moment(whole):
    kind, _, hook, values = whole
    if kind != "LSQ":
        return
    wanted = mse_scale(values[2]["c2/kernel"], weight_grid(4), 3)
    size = values[3]["MNN_QAT/c2/conv/weight_scale_size"]
    assert size == 2.0 ** np.round(np.mean(np.log2(wanted)))
    found = values[3]["MNN_QAT/c2/conv/weight_scale"] * size  # after one step of the optimizer
    np.testing.assert_allclose(found, wanted, rtol=0.05)


def test_what_was_trained_is_deployed_also_from_a_graph_without_a_window(whole):
    kind, folder, hook, _ = whole
    stem, images = str(folder / "out" / "model"), batch(99)
    conversion = convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    (found,) = run_model(stem + ".mnn", {"x": images}).values()
    with tf.Graph().as_default() as graph:
        network(training=False)
        options = {} if kind == "Weight" else {"is_training": False}
        quantizer = getattr(hooks, kind + "Quantizer")(graph, bits=4, output_names=["logits"], **options)
        with tf.Session(config=one_thread()) as session:
            tf.train.Saver().restore(session, tf.train.latest_checkpoint(str(folder)))
            simulated = quantizer.simulate(session, ["logits"], {"x:0": images})[0]
    assert sqnr_db(simulated, found.reshape(simulated.shape)) >= 100
    assert (conversion.weight_only if kind == "Weight" else conversion.coverage).share(LayerState.FLOAT) == 0
    assert len(decode(stem + ".mnn")) == 3


@pytest.mark.parametrize("step", [  # just before it begins; with fixed scales; in float; quantized
    3, 6, pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(step, whole, tmp_path):
    kind, _, _, values = whole
    train(tmp_path, lambda: make(kind, tmp_path), last=step)
    rest = train(tmp_path, lambda: make(kind, tmp_path))[1]
    assert set(rest[-1]) == set(values[-1]) and same(values[-1], rest[-1])


def test_nothing_is_exported_before_it_is_quantized(tmp_path, caplog):
    train(tmp_path, lambda: make("LSQ", tmp_path, begin=6, end=7), last=4)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pb"))


def adam(rate, _):
    return tf.train.AdamOptimizer(rate)


def test_adam_moves_a_scale_by_the_learning_rate_of_its_size(tmp_path):
    _, values = train(tmp_path, lambda: make("LSQ", tmp_path, begin=0, end=1.0), optimizer=adam, last=4)
    scales = [name for name in values[0] if name.endswith("_scale")]
    assert len(scales) == 8  # of three weights, three results, the image and the mean that the last layer reads
    for before, after in zip(values, values[1:]):
        for name in scales:
            assert 0 < np.abs(after[name] - before[name]).max() < 2 * 0.01  # in units of about 1
            assert 0.5 <= np.exp2(np.log2(before[name]).mean()) < 2


@pytest.mark.parametrize("options, message", [
    ({"begin": 0.5}, "begin=0.5 is a part of the training, whose length a session does not know: give train_steps"),
    ({"begin": 1, "end": 0.5}, "end=0.5 is a part of the training"),
    ({"begin": 5, "end": 2}, "end must not lie before begin: 2 is before 5"),
    ({"begin": 0.9, "end": 0.95, "train_steps": 1}, "begin=0.9 is global step 1, and training ends with step 1"),
    ({"begin": "2 epochs"}, "length of an epoch is not known"),
    ({"end": "later"}, "end must be a step .* got 'later'")])
def test_moments_that_cannot_be_are_refused_before_the_graph_is_touched(options, message, tmp_path):
    with tf.Graph().as_default() as graph:
        network()
        before = len(graph.get_operations())
        with pytest.raises(ValueError, match=message):
            make("LSQ", tmp_path, **{"begin": 0.0, "end": 1.0, **options})
        assert len(graph.get_operations()) == before


def test_a_session_without_a_counted_step_is_refused(tmp_path):
    with tf.Graph().as_default():
        x, logits = network()
        hook = make("LSQ", tmp_path, begin=2)
        tf.train.get_or_create_global_step()
        tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_mean(logits))
        with pytest.raises(RuntimeError, match="no operation trains MNN_QAT.* and then counts the global step"):
            tf.train.MonitoredTrainingSession(hooks=[hook])


def test_without_moments_the_graph_is_what_it_was():
    with tf.Graph().as_default() as graph:
        network()
        hooks.LSQQuantizerHook(output_names=["logits"])
        assert not any("window" in op.name for op in graph.get_operations())
