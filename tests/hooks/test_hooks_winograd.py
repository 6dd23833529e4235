"""Winograd-aware quantization of graphs: against the numpy core, against MNN, and back to plain int8 where it loses."""
import numpy as np
import pytest

import tf_nets
from deploying import build, deployed, images, train
from monitored_run import batch
from slimtrain.core import Grid, WinogradForm, fake_quantize, sqnr_db
from slimtrain.core import winograd as core
from slimtrain.hooks import LSQQuantizer, WAQQuantizer, WAQQuantizerHook
from slimtrain.hooks.winograd import Scales, stable_ratio, winograd_conv
from slimtrain.proto import convert, read_params, run_model
from tf_setup import one_thread, session, tf

INT8 = Grid(8, -127, 127)
ALWAYS, NEVER = -1000.0, 1000.0


def conv_net(x, training):
    """Winograd candidates with 3x3 and 5x5 kernels and both paddings, a batch norm, and layers that are none."""
    y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 8, bias=False, seed=1), "b1", training, 2))
    y = tf.nn.relu(tf_nets.conv(y, "c2", 12, padding="VALID", seed=3), name="r2")
    y = tf.nn.relu(tf_nets.conv(y, "c3", 6, kernel=5, seed=5), name="r3")
    y = tf.nn.relu(tf_nets.conv(y, "c4", 6, stride=2, seed=7), name="r4")
    return tf_nets.conv(y, "c5", 5, kernel=1, seed=9)


# -- the operation


def test_ratios_are_those_of_the_core_bit_for_bit():
    asked = np.geomspace(1e-6, 250, 5000).astype(np.float32)
    with tf.Graph().as_default() as graph:
        made = stable_ratio(tf.constant(asked))
    with session(graph) as run:
        np.testing.assert_array_equal(run.run(made), core.stable_ratio(asked).astype(np.float32))


@pytest.mark.parametrize("padding", [b"SAME", b"VALID"])
@pytest.mark.parametrize("form", [WinogradForm(2, 3), WinogradForm(4, 3), WinogradForm(2, 5), WinogradForm(3, 4)],
                         ids=str)
def test_training_computes_with_fake_quantized_transforms(form, padding):
    rng = np.random.RandomState(0)
    x, kernel = (rng.randn(2, 7, 8, 3) * 0.7).astype(np.float32), rng.randn(form.kernel, form.kernel, 3, 5) * 0.3
    learned = rng.uniform(0.02, 0.06, (form.positions, 6)).astype(np.float32)
    before = np.array([0.02] + [0.04] * 5, np.float32)
    with tf.Graph().as_default() as graph:
        fed = tf.placeholder(tf.float32, [None, None, None, 3])
        scales = Scales(tf.constant(before[0]), tf.constant(before[1:]), tf.constant(learned))
        made = winograd_conv(fed, tf.constant(kernel, tf.float32), scales, form, padding)
        assert made.shape.as_list()[3] == 5
    with session(graph) as run:
        found = run.run(made, {fed: x})
    total = form.kernel - 1 if padding == b"SAME" else 0
    pads = ((total // 2, total - total // 2),) * 2
    used = core.stable_ratio(learned / before) * before.astype(np.float64)
    inputs = core.transform_input(x.transpose(0, 3, 1, 2), form, pads)
    weights = core.transform_weight(kernel.transpose(3, 2, 0, 1), form)
    rounded = np.stack([fake_quantize(row, scale, INT8) for row, scale in zip(inputs, used[:, 0])])
    kernels = np.stack([fake_quantize(row, scale, INT8, axis=0) for row, scale in zip(weights, used[:, 1:])])
    plain = core.winograd_convolution(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), form, pads)
    expected = core.transform_output(core.multiply(kernels, rounded), form, plain.shape[2:])
    assert sqnr_db(plain, expected) < 50
    # a real number next to a tie may go to either side in float32
    assert sqnr_db(expected, found.transpose(0, 3, 1, 2)) > 50


# -- deployment


@pytest.mark.parametrize("threshold, units", [(ALWAYS, [4, 4, 2]), (30.0, [2, 2, 0])])
def test_it_deploys_as_simulated(threshold, units, tmp_path):
    trained = train(conv_net, "WAQ", tmp_path, min_sqnr_db=threshold)
    graph, _, y, made = build(conv_net, "WAQ", False, min_sqnr_db=threshold)
    x = images()
    with graph.as_default():
        saver = tf.train.Saver()
    with session(graph) as run:
        saver.restore(run, trained.checkpoint)
        choices = made.choices(run)
        fake = run.run(y, {"x:0": x})
        (integers,) = made.simulate(run, [y.name], {"x:0": x})
    assert [choice.layer for choice in choices] == ["c1/conv", "c2/conv", "c3/conv"]
    assert [choice.form.unit if choice.form else 0 for choice in choices] == units
    assert ["sensitivity" in choice.reason for choice in choices] == [unit == 0 for unit in units]
    coverage, output = deployed(trained.stem, x)
    assert coverage.fraction == 1.0
    # MNN sums transformed products in float32: an output next to a tie may be one level off
    assert sqnr_db(integers, output) >= 55
    assert sqnr_db(integers, fake) > 30
    (algorithm,) = read_params(trained.stem + ".compress_params.bin").algo
    methods = {entry.weight[0].name: len(entry.wino_params.units_attr) > 0 for entry in algorithm.quant_params.layer}
    assert [methods[choice.layer] for choice in choices] == [unit > 0 for unit in units]
    assert not methods["c4/conv"] and not methods["c5/conv"]


def test_without_forms_it_is_lsq(tmp_path):
    outputs = []
    for name, arguments in (("LSQ", {}), ("WAQ", {"min_sqnr_db": NEVER})):
        (tmp_path / name).mkdir()
        trained = train(conv_net, name, tmp_path / name, steps=4, **arguments)
        outputs.append(deployed(trained.stem, images())[1])
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-6)


def test_every_scale_of_a_tile_is_trained():
    graph, _, y, _ = build(conv_net, "WAQ", True, min_sqnr_db=ALWAYS)
    with graph.as_default():
        learned = [variable for variable in tf.trainable_variables() if "winograd_positions" in variable.op.name]
        gradients, init = tf.gradients(tf.square(y), learned), tf.global_variables_initializer()
    assert len(learned) == 3
    with session(graph) as run:
        run.run(init)
        for found in run.run(gradients, {"x:0": images(4)}):
            assert np.isfinite(found).all()
            assert (found != 0).mean() > 0.9


def test_choices_before_any_step_and_bad_thresholds_are_refused():
    graph, _, _, made = build(conv_net, "WAQ", True)
    with graph.as_default():
        init = tf.global_variables_initializer()
    with session(graph) as run:
        run.run(init)
        with pytest.raises(RuntimeError, match="nothing is decided"):
            made.choices(run)
    for value in ("25", None, True, float("nan")):
        for make in (WAQQuantizer, WAQQuantizerHook):
            with tf.Graph().as_default(), pytest.raises(ValueError, match="min_sqnr_db"):
                make(min_sqnr_db=value)


def test_hook_resumes_and_exports(tmp_path):
    def monitored(folder, last):
        with tf.Graph().as_default():
            x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
            y = tf.identity(conv_net(x, True), name="out")
            hook = WAQQuantizerHook(min_sqnr_db=ALWAYS, output_names=["out"], export_dir=str(folder / "export"))
            loss, step = tf.reduce_mean(tf.square(y - 1.0)), tf.train.get_or_create_global_step()
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                train_op = tf.train.MomentumOptimizer(0.01, 0.9).minimize(loss, global_step=step)
            with tf.train.MonitoredTrainingSession(
                    checkpoint_dir=str(folder / "ckpt"), hooks=[hook], save_checkpoint_steps=2,
                    save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
                    config=one_thread()) as run:
                for number in range(run.run(step), last):
                    run.run(train_op, {x: batch(number)})

    monitored(tmp_path / "whole", 4)
    monitored(tmp_path / "parts", 2)
    monitored(tmp_path / "parts", 4)
    outputs = []
    for folder in ("whole", "parts"):
        stem = str(tmp_path / folder / "export" / "model")
        convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
        outputs += run_model(stem + ".mnn", {"x": batch(9).astype(np.float32)}).values()
    np.testing.assert_array_equal(*outputs)


def test_it_learns_what_lsq_learns():
    rng = np.random.RandomState(0)
    inputs = rng.rand(128, 8, 8, 1).astype(np.float32)
    targets = np.stack([inputs[:, :4].mean((1, 2, 3)), inputs[:, 4:].mean((1, 2, 3))], 1) * 10 - 5
    losses = {}
    for name, make in (("LSQ", LSQQuantizer), ("WAQ", WAQQuantizer)):
        with tf.Graph().as_default() as graph:
            x = tf.placeholder(tf.float32, [None, 8, 8, 1])
            y = tf.nn.relu(tf_nets.conv(x, "c1", 8, seed=1))
            y = tf.nn.relu(tf_nets.conv(y, "c2", 8, seed=3))
            y = tf.reshape(tf.nn.avg_pool(y, 4, 4, "VALID"), [-1, 32])
            y = tf.identity(tf_nets.dense(y, "fc", 2, seed=5), name="out")
            make(graph, True, output_names=["out"])
            loss = tf.reduce_mean(tf.square(y - targets))
            step, init = tf.train.AdamOptimizer(5e-3).minimize(loss), tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            for _ in range(60):
                run.run(step, {x: inputs})
            losses[name] = run.run(loss, {x: inputs})
    assert losses["WAQ"] < 1.5 * losses["LSQ"] < 1.2 * np.mean(targets ** 2)
