"""The report of a monitored session: its numbers against those of other graphs, and its page in a real browser."""

import numpy as np
import pytest

import tf_nets
from browser import visit
from slimtrain.core import EnergyRanks, WeightMode, load_report, sqnr_db, stored_weight
from slimtrain.hooks import (
    CompressionReportHook,
    LowRankDecompositionHook,
    LSQQuantizerHook,
    WeightQuantizerHook,
    get_op_weight_values,
)
from tf_setup import one_thread, tf

ENDS = {"c1/conv": "r1", "c2/conv": "r2", "fc/matmul": "fc/biased"}


def network():
    """(input, output) of a small network with one norm, in the default graph; the second batch size is free."""
    x = tf.placeholder(tf.float32, [None, 8, 8, 8], name="x")
    y = tf.nn.relu(tf_nets.conv(x, "c1", 16, seed=1), name="r1")
    y = tf.nn.relu(tf_nets.conv(y, "c2", 16, stride=2, seed=3), name="r2")
    return x, tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")


def batch(number):
    return np.random.RandomState(number).randn(20, 8, 8, 8).astype(np.float32)


def train(folder, make_hooks, steps=5):
    """Train with the hooks that ``make_hooks`` makes of the folder; returns them."""
    with tf.Graph().as_default():
        x, logits = network()
        hooks = make_hooks(folder)
        loss = tf.reduce_mean(tf.square(logits - 1.0))
        step = tf.train.get_or_create_global_step()
        update = tf.train.MomentumOptimizer(0.01, 0.9).minimize(loss, global_step=step)
        with tf.train.MonitoredTrainingSession(checkpoint_dir=str(folder), hooks=hooks, config=one_thread(),
                                               save_checkpoint_steps=2, log_step_count_steps=None) as session:
            while session.run(step) < steps:
                session.run(update, {x: batch(0)})
    return hooks


def quantizing(folder):
    quantizer = LSQQuantizerHook(output_names=["logits"], export_dir=str(folder), begin=2, end=4)
    return [quantizer, CompressionReportHook([quantizer], html=True)]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    return folder, train(folder, quantizing)


def test_each_layer_is_compared_with_the_float_network(quantized):
    folder, (quantizing, reporting) = quantized
    report, example = load_report(folder / "compression_report.json"), batch(0)[:16]
    assert report == reporting.report and report.sqnr_db >= 100
    checkpoint = tf.train.latest_checkpoint(str(folder))
    with tf.Graph().as_default(), tf.Session(config=one_thread()) as session:
        x, _ = network()
        tf.train.Saver().restore(session, checkpoint)
        plain = dict(zip(ENDS, session.run([name + ":0" for name in ENDS.values()], {x: example})))
        kernels = session.run({name: tf.get_default_graph().get_operation_by_name(name).inputs[1] for name in ENDS})
    with quantizing.quantizer.graph.as_default(), tf.Session(config=one_thread()) as session:
        tf.train.Saver().restore(session, checkpoint)
        simulated = dict(zip(ENDS, quantizing.quantizer.simulate(session, list(ENDS.values()), {"x:0": example})))
        scales = session.run({name: tensor for name, tensor in quantizing.quantizer.followed().items()
                              if hasattr(tensor, "op")})
    assert set(report.layer_sqnr_db) == set(ENDS)
    for name in ENDS:
        assert report.layer_sqnr_db[name] == pytest.approx(sqnr_db(plain[name], simulated[name]), abs=0.01)
        assert (report.weights[name].low, report.weights[name].high) == pytest.approx(
            (kernels[name].min(), kernels[name].max()))
        assert report.weights[name].clip_high == pytest.approx(127 * scales[name + "/weight_scale"].max())
    inputs = {"c1/conv": example, "c2/conv": plain["c1/conv"]}
    for name, values in inputs.items():
        found = report.activations[name]
        assert (found.low, found.high) == pytest.approx((values.min(), values.max()), abs=1e-5)
        assert sum(found.counts) == values.size
    assert report.activations["c1/conv"].clip_high == pytest.approx(127 * scales["c1/conv/input_scale"])


def test_the_page_shows_it_in_a_browser(quantized, tmp_path):
    found = visit(quantized[0] / "compression_report.html", tmp_path)
    assert (found.console, found.requests) == ([], [])
    assert found.dom.count("<svg") == 4 and "c2/conv" in found.dom and "slimtrain convert" in found.dom


def test_spectra_are_those_of_the_dense_weights_also_after_a_resume(tmp_path):
    with tf.Graph().as_default() as graph, tf.Session(graph=graph, config=one_thread()) as session:
        network()
        session.run(tf.global_variables_initializer())
        get_op_weight_values(session, str(tmp_path / "weights"))
        dense = session.run(graph.get_operation_by_name("c1/conv").inputs[1])

    def decomposing(folder):
        hook = LowRankDecompositionHook(
            weight_npy_file=str(tmp_path / "weights"), align_channels=2, tucker_minimal_ratio=0.0,
            rank_rule=EnergyRanks(0.7), output_names=["logits"], export_dir=str(folder), checkpoint_dir=str(folder))
        return [hook, CompressionReportHook([hook], html=True)]

    ranks = {line.name: line.ranks for line in train(tmp_path / "run", decomposing, 3)[0].report}
    first = load_report(tmp_path / "run" / "compression_report.json")
    for side, axis, rank in zip(("outputs", "inputs"), (3, 2), ranks["c1/conv"]):
        found = first.spectra["c1/conv (%s)" % side]
        unfolded = np.moveaxis(dense, axis, 0).reshape(dense.shape[axis], -1).astype(np.float64)
        np.testing.assert_allclose(found.values, np.linalg.svd(unfolded, compute_uv=False), rtol=1e-5)
        assert found.rank == rank
    assert not first.layer_sqnr_db and first.sqnr_db is None  # nothing was quantized
    found = visit(tmp_path / "run" / "compression_report.html", tmp_path)
    assert (found.console, found.requests) == ([], []) and "c1/conv (outputs)" in found.dom
    train(tmp_path / "run", decomposing, 5)
    assert load_report(tmp_path / "run" / "compression_report.json").spectra == first.spectra


def storing(folder):
    quantizer = WeightQuantizerHook(bits=3, output_names=["logits"], export_dir=str(folder))
    return [quantizer, CompressionReportHook([quantizer], html=True)]


def test_layers_with_weights_of_few_bits_are_compared_too(tmp_path):
    quantizing, reporting = train(tmp_path, storing)
    report, example = load_report(tmp_path / "compression_report.json"), batch(0)[:16]
    assert report == reporting.report and report.sqnr_db >= 100
    ends = {"c1/conv": "c1/biased", "c2/conv": "c2/biased", "fc/matmul": "fc/biased"}
    with tf.Graph().as_default() as graph, tf.Session(config=one_thread()) as session:
        x, _ = network()
        kernels = {name: graph.get_operation_by_name(name).inputs[1] for name in ends}
        tf.train.Saver().restore(session, tf.train.latest_checkpoint(str(tmp_path)))
        outputs = [name + ":0" for name in ends.values()]
        values, plain = session.run([kernels, outputs], {x: example})
        turned = {name: (1, 0) if value.ndim == 2 else (3, 2, 0, 1) for name, value in values.items()}
        stored = {kernels[name]: stored_weight(value.transpose(turned[name]), 3, WeightMode.SYMMETRIC).values.transpose(
            np.argsort(turned[name])) for name, value in values.items()}
        simulated = session.run(outputs, {x: example, **stored})  # a kernel may be fed in the place of its variable
    expected = {name: sqnr_db(*pair) for name, *pair in zip(ends, plain, simulated)}
    assert report.layer_sqnr_db == pytest.approx(expected, abs=0.01) and max(expected.values()) < 30
    assert report.weights["c1/conv"].high == pytest.approx(values["c1/conv"].max())
    found = visit(tmp_path / "compression_report.html", tmp_path)
    assert (found.console, found.requests) == ([], []) and "c2/conv" in found.dom
