"""Monitored sessions: kills, aborts, fresh starts from a float checkpoint, workers with a parameter server."""
import logging
import os
import shlex
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

import monitored_run
import tf_nets
from slimtrain.core import sqnr_db
from slimtrain.hooks import LSQQuantizerHook
from slimtrain.proto import convert, run_model
from slimtrain.proto.cli import cli
from tf_setup import one_thread, session, tf

SCRIPT = monitored_run.__file__


def start(*arguments, script=SCRIPT):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    environment["PYTHONPATH"] = os.pathsep.join([path for path in sys.path if path])
    return subprocess.Popen([sys.executable, script] + [str(argument) for argument in arguments], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, wanted=0, timeout=240):
    try:
        output = process.communicate(timeout=timeout)[0].decode()
    finally:
        process.kill()
    assert process.returncode == wanted, output[-3000:]
    return output


def checkpoint_values(folder):
    reader = tf.train.load_checkpoint(str(folder / "ckpt"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


@pytest.mark.parametrize("quantizer", ["LSQ", "EMA", "OAQ"])
def test_a_killed_run_ends_as_one_never_killed(quantizer, tmp_path):
    killed_at = int(np.random.RandomState(os.getpid()).randint(4, 11))
    finish(start(tmp_path / "whole", 11, "--quantizer", quantizer))
    finish(start(tmp_path / "killed", 11, "--quantizer", quantizer, "--kill", killed_at), wanted=-9)
    after_kill = checkpoint_values(tmp_path / "killed")
    assert 0 < after_kill["global_step"] < 11
    flags = [name for name in after_kill if name.endswith("_initialized")]
    assert flags and all(after_kill[name] for name in flags)
    finish(start(tmp_path / "killed", 11, "--quantizer", quantizer))
    whole, resumed = checkpoint_values(tmp_path / "whole"), checkpoint_values(tmp_path / "killed")
    assert sorted(whole) == sorted(resumed)
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg="{} (killed at {})".format(name, killed_at))
    for suffix in (".pb", ".compress_params.bin"):
        files = [(tmp_path / run / "export" / ("model" + suffix)).read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1]


def test_exports_lie_beside_the_checkpoints_and_go_with_them(tmp_path):
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("LSQ", str(tmp_path))
        hook._export_dir = None
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=str(tmp_path / "ckpt"), hooks=[hook], save_checkpoint_steps=1,
                save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
                config=one_thread()) as run:
            for number in range(8):
                run.run(train, {x: monitored_run.batch(number)})
    names = set(os.listdir(str(tmp_path / "ckpt")))
    kept = {name[:-len(".index")] for name in names if name.endswith(".index")}
    exported = {name[:-len(".pb")] for name in names if name.endswith(".pb")}
    assert exported == kept | {"model"}
    assert {name + ".compress_params.bin" for name in exported} <= names


class Abort(tf.train.SessionRunHook):
    """Raises from a step what a lost parameter server raises, once."""

    def __init__(self, at):
        self.at, self.sessions = at, []

    def after_create_session(self, session, coord):
        self.sessions.append(session)

    def after_run(self, run_context, run_values):
        if self.at is not None and run_context.session.run(tf.train.get_global_step()) == self.at:
            self.at = None
            raise tf.errors.AbortedError(None, None, "lost")


@pytest.mark.parametrize("quantizer", ["LSQ", "EMA", "OAQ"])
def test_an_aborted_session_recovers_by_itself(quantizer, tmp_path):
    results = []
    for at in (None, 5):
        folder = tmp_path / str(at)
        with tf.Graph().as_default() as graph:
            x, train, step, hook = monitored_run.build(quantizer, str(folder))
            abort = Abort(at)
            with tf.train.MonitoredTrainingSession(
                    checkpoint_dir=str(folder / "ckpt"), hooks=[hook, abort], save_checkpoint_steps=3,
                    save_summaries_steps=None, save_summaries_secs=None, log_step_count_steps=None,
                    config=one_thread()) as run:
                now = run.run(step)
                while now < 9:
                    run.run(train, {x: monitored_run.batch(0)})  # a recovered session repeats the call with its data
                    now = run.run(step)
                assert graph.finalized
        assert len(abort.sessions) == (1 if at is None else 2)
        results.append(checkpoint_values(folder))
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


def test_a_fresh_run_starts_from_a_float_checkpoint_and_a_resumed_one_does_not(tmp_path):
    def model():
        x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
        return x, tf_nets.conv(x, "c", 4, seed=1)

    with tf.Graph().as_default() as graph:
        model()
        saver, init = tf.train.Saver(), tf.global_variables_initializer()
        with session(graph) as run:
            run.run(init)
            kernel = tf.global_variables()[0]  # with resource variables the tensor of this name is a handle
            run.run(tf.assign(kernel, np.full(kernel.shape.as_list(), 0.25, np.float32)))
            saved = saver.save(run, str(tmp_path / "float"))

    def train(steps):
        with tf.Graph().as_default():
            x, y = model()
            extra = tf.get_variable("extra", initializer=3.0)
            hook = LSQQuantizerHook(init_checkpoint=saved)
            step = tf.train.get_or_create_global_step()
            update = tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_mean(y) * extra, global_step=step)
            with tf.train.MonitoredTrainingSession(checkpoint_dir=str(tmp_path / "ckpt"), hooks=[hook],
                                                   config=one_thread()) as run:
                start_value, start_extra = run.run([first_variable(), extra])
                for _ in range(steps):
                    run.run(update, {x: monitored_run.batch(0)})
            return start_value, start_extra

    def first_variable():
        return tf.get_default_graph().get_collection(tf.GraphKeys.GLOBAL_VARIABLES)[0]

    first, extra = train(3)
    np.testing.assert_array_equal(first, np.full_like(first, 0.25))
    assert extra == 3.0
    second, extra = train(1)
    assert np.abs(second - 0.25).max() > 0 and extra != 3.0


def test_a_resumed_run_is_not_initialised_from_its_data(tmp_path):
    scales = []
    for factor in (1, 100):
        with tf.Graph().as_default() as graph:
            x, train, step, hook = monitored_run.build("LSQ", str(tmp_path))
            name = "MNN_QAT/c1/conv/input_scale:0"
            with tf.train.MonitoredTrainingSession(checkpoint_dir=str(tmp_path / "ckpt"), hooks=[hook],
                                                   config=one_thread()) as run:
                variable = next(v for v in tf.global_variables() if v.name == name)
                if factor == 1:
                    run.run(train, {x: monitored_run.batch(0)})
                scales.append(run.run(variable))
                before = run.run(variable)
                run.run(graph.get_tensor_by_name("r1:0"), {x: factor * monitored_run.batch(1)})
                scales.append(run.run(variable))
    assert scales[0] == scales[1] == scales[2] == scales[3] and before == scales[0] != 1.0


def test_the_state_is_fed_unless_a_run_feeds_it(tmp_path):
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("LSQ", str(tmp_path))
        seen = tf.cast(hook.is_training, tf.int32)
        with tf.train.MonitoredTrainingSession(hooks=[hook], config=one_thread()) as run:
            assert run.run(seen) == 0
            assert run.run([train, seen], {x: monitored_run.batch(0)})[1] == 1
            assert run.run(seen, {hook.is_training: True}) == 1
            assert run.run([train, seen], {x: monitored_run.batch(0), hook.is_training: False})[1] == 0


def test_looking_at_other_data_between_steps_tracks_no_ranges(tmp_path):
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("EMA", str(tmp_path))
        scale = next(v for v in tf.global_variables() if v.op.name == "MNN_QAT/c1/conv/input_scale")
        with tf.train.MonitoredTrainingSession(hooks=[hook], config=one_thread()) as run:
            run.run(train, {x: monitored_run.batch(0)})
            before = run.run(scale)
            run.run("logits:0", {x: 100 * monitored_run.batch(1)})
            assert run.run(scale) == before
            run.run(train, {x: 100 * monitored_run.batch(1)})
            assert run.run(scale) > 1.5 * before


def test_a_saver_of_the_users_own_is_followed(tmp_path):
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("EMA", str(tmp_path))
        scaffold = tf.train.Scaffold(saver=tf.train.Saver(max_to_keep=2))
        with tf.train.MonitoredTrainingSession(
                checkpoint_dir=str(tmp_path / "ckpt"), scaffold=scaffold, hooks=[hook], save_checkpoint_steps=1,
                save_summaries_steps=None, save_summaries_secs=None, config=one_thread()) as run:
            for number in range(4):
                run.run(train, {x: monitored_run.batch(number)})
    exported = {name for name in os.listdir(str(tmp_path / "export")) if name.endswith(".pb")}
    assert exported == {"model.ckpt-3.pb", "model.ckpt-4.pb", "model.pb"}


def test_a_run_leaves_curves_and_a_table_of_its_layers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("OAQ", str(tmp_path), skip_quant_layers=["c2/conv"])
        with tf.train.MonitoredTrainingSession(checkpoint_dir=str(tmp_path / "ckpt"), hooks=[hook],
                                               save_summaries_steps=1, config=one_thread()) as run:
            for number in range(2):
                run.run(train, {x: monitored_run.batch(number)})
    (events,) = (tmp_path / "ckpt").glob("events*")
    last = {value.tag: value.simple_value for event in tf.train.summary_iterator(str(events))
            for value in event.summary.value}
    values = checkpoint_values(tmp_path)
    curves = {tag[len("MNN_QAT/summary/"):]: value for tag, value in last.items() if tag.startswith("MNN_QAT/summary/")}
    assert curves["weight_bits"] == curves["activation_bits"] == 8
    assert curves["c1/conv/clamp"] <= 127 and "c2/conv/clamp" not in curves
    assert {"c1/conv/weight_scale", "c1/conv/input_scale", "fc/matmul/output_scale"} <= set(curves)
    assert 0 < values["MNN_QAT/fc/matmul/output_scale"] != 1 and curves["fc/matmul/output_scale"] != 1
    assert "| c2/conv   | Conv2D |     432 | 68.1% | float | it was skipped |" in caplog.text
    assert "| fc/matmul | MatMul |      40 |  6.3% | int8  |                |" in caplog.text
    stem = str(tmp_path / "export" / "model")
    command = next(line.split("MNN: ")[1] for line in caplog.text.splitlines() if "to convert it for MNN" in line)
    assert shlex.split(command)[:2] == ["slimtrain", "convert"]
    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert os.path.exists(stem + ".mnn")


def test_what_a_hook_exports_deploys_exactly(tmp_path):
    with tf.Graph().as_default():
        x, train, step, hook = monitored_run.build("OAQ", str(tmp_path), bits=4)
        judge = {}

        class Judge(tf.train.SessionRunHook):
            def end(self, session):
                judge["logits"] = hook.quantizer.simulate(session, ["logits"], {x: monitored_run.batch(77)})[0]

        with tf.train.MonitoredTrainingSession(hooks=[hook, Judge()], config=one_thread()) as run:
            for number in range(3):
                run.run(train, {x: monitored_run.batch(number)})
    stem = str(tmp_path / "export" / "model")
    assert convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin").coverage.fraction == 1.0
    (output,) = run_model(stem + ".mnn", {"x": monitored_run.batch(77).astype(np.float32)}).values()
    assert sqnr_db(judge["logits"], output) >= 100


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.1)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = ",".join(str(each.getsockname()[1]) for each in sockets)
    for each in sockets:
        each.close()
    return ports


@pytest.mark.parametrize("quantizer", ["EMA", "OAQ"])
def test_two_workers_share_one_state_on_a_parameter_server(quantizer, tmp_path):
    arguments = [tmp_path, 40, "--quantizer", quantizer, "--ports", free_ports(3), "--worker"]
    server = start(*arguments + [-1])
    try:
        chief = start(*arguments + [0])
        wait_for(tmp_path / "ckpt" / "model.ckpt-0.index", chief)  # a worker that comes too early sleeps for 30 seconds
        finish(start(*arguments + [1]))
        finish(chief)
    finally:
        server.kill()
        server.communicate()
    values = checkpoint_values(tmp_path)
    assert values["global_step"] == 40
    assert all(value for name, value in values.items() if name.endswith("_initialized"))
    assert (tmp_path / "worker-0" / "model.pb").exists()
    assert not (tmp_path / "worker-1").exists()
    if quantizer == "EMA":
        # one batch with a range of 1, then only batches with 2: each step takes 1 % of the difference away
        steps = np.log(2 - 127 * values["MNN_QAT/c1/conv/input_scale"]) / np.log(0.99)
        assert 36 <= steps <= 39.1  # two workers that read at the same moment may lose a step's share
