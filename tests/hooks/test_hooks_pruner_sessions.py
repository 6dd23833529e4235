"""Pruner hooks in monitored sessions: checkpoints, kills, aborts, workers, stacking with a quantizer."""
import os

import numpy as np
import pytest

import pruned_run
import tf_nets
from mnn_weights import decode
from monitored_run import batch
from pruned_run import build, zero_shares
from pruning import read_graph
from slimtrain.core import PruningSchedule, save_sensitivity, sqnr_db
from slimtrain.hooks import LSQQuantizerHook, SNIPLevelPrunerHook, pruning_step
from slimtrain.proto import ConvertOptions, convert, read_params, run_model
from test_hooks_sessions import Abort, checkpoint_values, finish, free_ports, wait_for
from test_hooks_sessions import start as start_script
from tf_setup import session, tf

PRUNERS = ["SNIPLevelPruner", "SIMDOCPruner", "TaylorFOChannelPruner"]
WEIGHTS = ["c1/kernel", "c2/kernel", "fc/kernel"]


def start(*arguments):
    return start_script(*arguments, script=pruned_run.__file__)


class Record(tf.train.SessionRunHook):
    """The weights after each step, as they are between two runs."""

    def __init__(self):
        self.after = []

    def after_run(self, run_context, run_values):
        variables = {v.op.name: v for v in tf.global_variables()}
        self.after.append(run_context.session.run({name: variables[name] for name in WEIGHTS}))


@pytest.mark.parametrize("schedule, window", [
    (PruningSchedule(0.5), 1), (PruningSchedule(0.5, 3, 4, 5), 2), (PruningSchedule(0.5, 4, 1, 2), 10)])
def test_the_graph_keeps_the_schedule_of_the_core(schedule, window):
    with tf.Graph().as_default() as graph:
        step = tf.placeholder(tf.int64, [])
        fetches = [pruning_step.looking(schedule, window, step), pruning_step.events_due(schedule, step)]
        with session(graph) as run:
            found = [run.run(fetches, {step: number}) for number in range(25)]
    events = [schedule.event_at(number) is not None for number in range(25)]
    assert [bool(looks) for looks, _ in found] == [schedule.looks_at(number, window) for number in range(25)]
    assert [due for _, due in found] == np.cumsum(events).tolist()


@pytest.mark.parametrize("pruner", ["SNIPLevelPruner", "TaylorFOChannelPruner"])
def test_the_step_measures_what_gradients_and_weights_say(pruner, tmp_path):
    with tf.Graph().as_default() as graph:
        x, train, step, made = build(pruner, str(tmp_path), sensitivity_steps=3, begin=9,
                                     optimizer=tf.train.GradientDescentOptimizer(0.05))
        record = Record()
        applied = {op.inputs[0].op.name: op for op in graph.get_operations() if "ApplyGradientDescent" in op.type}
        gradients = {name: applied[name].inputs[2] for name in WEIGHTS}
        variables = {v.op.name: v for v in tf.global_variables()}
        with pruned_run.session(tmp_path, made + [record]) as run:
            seen = [run.run([train, gradients], {x: batch(number)})[1] for number in range(9)]
            before_event = run.run({name: variables["MNN_PRUNE/%s/sensitivity" % name] for name in WEIGHTS})
    assert all((weights[name] != 0).all() for weights in record.after for name in WEIGHTS)
    for name in WEIGHTS:
        products = [np.float64(seen[number][name]) * record.after[number][name] for number in (7, 8)]
        wanted = sum(map(np.abs, products)) / 2
        if pruner.startswith("Taylor"):
            wanted = wanted.reshape(-1, wanted.shape[-1]).sum(axis=0)
        np.testing.assert_allclose(before_event[name], wanted, rtol=1e-3, atol=1e-7 * wanted.max())


def test_a_file_of_sensitivities_takes_the_place_of_measuring(tmp_path):
    random = np.random.RandomState(5)
    shapes = {"c1/kernel": [3, 3, 3, 12], "c2/kernel": [3, 3, 12, 16], "fc/kernel": [16, 5]}
    scores = {name: random.rand(*shape) for name, shape in shapes.items()}
    save_sensitivity(str(tmp_path / "sens.npy"), scores)
    with tf.Graph().as_default():
        x, train, step, made = build("SNIPLevelPruner", str(tmp_path), total_pruning_iterations=1, begin=1,
                                     sensitivity_npy_file=str(tmp_path / "sens.npy"))
        record = Record()
        assert not [v for v in tf.global_variables() if v.op.name.endswith("/sensitivity")]
        with pruned_run.session(tmp_path, made + [record], 100) as run:
            for number in range(3):
                run.run(train, {x: batch(number)})
    assert all((record.after[0][name] != 0).all() for name in WEIGHTS)
    ranked = np.concatenate([(scores[name] / np.sqrt((scores[name] ** 2).sum())).ravel() for name in WEIGHTS])
    dead = np.concatenate([(record.after[1][name] == 0).ravel() for name in WEIGHTS])
    wanted = np.zeros(ranked.size, bool)
    wanted[np.argsort(ranked)[:int(round(0.6 * ranked.size))]] = True
    assert (wanted != dead).sum() <= 2  # float32 may swap neighbours at the border


@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_checkpoint_is_as_sparse_as_its_step(pruner, tmp_path):
    align = dict(align_channels=1) if pruner.startswith("Taylor") else {}
    with tf.Graph().as_default():
        x, train, step, made = build(pruner, str(tmp_path), optimizer=tf.train.AdamOptimizer(0.01), **align)
        scaffold = tf.train.Scaffold(saver=tf.train.Saver(max_to_keep=20))
        record = Record()
        with pruned_run.session(tmp_path, made + [record], 1, scaffold=scaffold) as run:
            for number in range(10):
                run.run(train, {x: batch(number)})
    shares = []
    for number in range(1, 11):
        reader = tf.train.load_checkpoint(str(tmp_path / "ckpt" / ("model.ckpt-%d" % number)))
        values = {name: reader.get_tensor(name) for name in WEIGHTS}
        for name in WEIGHTS:
            np.testing.assert_array_equal(values[name], record.after[number - 1][name])
        shares.append(sum(int((value == 0).sum()) for value in values.values()) /
                      sum(value.size for value in values.values()))
    wanted = [0.6 * (1 - (1 - event / 3) ** 3) for event in (1, 2, 3)]
    tolerance = {"SNIPLevelPruner": 1e-3, "SIMDOCPruner": 5e-3, "TaylorFOChannelPruner": 0.06}[pruner]
    assert shares == pytest.approx([0, 0] + [wanted[0]] * 2 + [wanted[1]] * 2 + [wanted[2]] * 4, abs=tolerance)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_step_that_overflows_leaves_zeros_at_zero(pruner, tmp_path):
    with tf.Graph().as_default():
        x, train, step, made = build(pruner, str(tmp_path), output_names=None, export_dir=None)
        with pruned_run.session(tmp_path, made, 1) as run:
            for number in range(8):
                run.run(train, {x: batch(number)})
            run.run(train, {x: np.full_like(batch(8), np.nan)})
            keeps = run.run(made[0].pruner.keeps)
        variables = set(made[0].pruner.keeps) & {v.op.name for v in tf.trainable_variables()}
    reader = tf.train.load_checkpoint(str(tmp_path / "ckpt" / "model.ckpt-9"))
    assert variables >= set(WEIGHTS)
    for name in variables:
        value = reader.get_tensor(name)
        assert (value[keeps[name] == 0] == 0).all()
        assert not np.isfinite(value[keeps[name] == 1]).any()


@pytest.mark.parametrize("pruner, options", [
    ("SNIPLevelPruner", ["--quantize"]), pytest.param("TaylorFOChannelPruner", [], marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_never_killed(pruner, options, tmp_path):
    arguments = [10, "--pruner", pruner] + options
    killed_at = int(np.random.RandomState(os.getpid()).randint(3, 9))
    finish(start(tmp_path / "whole", *arguments))
    finish(start(tmp_path / "killed", *arguments + ["--kill", killed_at]), wanted=-9)
    finish(start(tmp_path / "killed", *arguments))
    whole, resumed = checkpoint_values(tmp_path / "whole"), checkpoint_values(tmp_path / "killed")
    assert sorted(whole) == sorted(resumed) and whole["MNN_PRUNE/events"] == 3
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg="{} (killed at {})".format(name, killed_at))
    for suffix in (".pb", ".compress_params.bin"):
        files = [(tmp_path / run / "export" / ("model" + suffix)).read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1]


def test_an_aborted_session_recovers_by_itself(tmp_path):
    results = []
    for at in (None, 6):
        folder = tmp_path / str(at)
        with tf.Graph().as_default():
            x, train, step, made = build("SIMDOCPruner", str(folder))
            abort = Abort(at)
            with pruned_run.session(folder, made + [abort]) as run:
                now = run.run(step)
                while now < 9:
                    run.run(train, {x: batch(0)})  # a recovered session repeats the call with its data
                    now = run.run(step)
        assert len(abort.sessions) == (1 if at is None else 2)
        results.append(checkpoint_values(folder))
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


def test_two_workers_share_the_masks_that_the_chief_chose(tmp_path):
    arguments = [tmp_path, 40, "--ports", free_ports(3), "--worker"]
    server = start(*arguments + [-1])
    try:
        chief = start(*arguments + [0])
        wait_for(tmp_path / "ckpt" / "model.ckpt-0.index", chief)
        finish(start(*arguments + [1]))
        finish(chief)
    finally:
        server.kill()
        server.communicate()
    values = checkpoint_values(tmp_path)
    assert values["global_step"] == 40 and values["MNN_PRUNE/events"] == 3
    shares = zero_shares({name: values[name] for name in WEIGHTS})
    total = sum(values[name].size for name in WEIGHTS)
    assert sum(shares[name] * values[name].size for name in WEIGHTS) / total == pytest.approx(0.6, abs=1e-3)
    for name in WEIGHTS:
        assert (values[name][values["MNN_PRUNE/%s/keep" % name] == 0] == 0).all()


def test_pruned_and_quantized_in_one_run_deploys_exactly_with_its_zeros(tmp_path):
    with tf.Graph().as_default():
        x, train, step, made = build("SNIPLevelPruner", str(tmp_path), quantize=True, total_pruning_iterations=1)
        record, judge = Record(), {}

        class Judge(tf.train.SessionRunHook):
            def end(self, run):
                judge["logits"] = made[1].quantizer.simulate(run, ["logits"], {x: batch(77)})[0]

        with pruned_run.session(tmp_path, made + [record, Judge()], 100) as run:
            for number in range(6):
                run.run(train, {x: batch(number)})
    stem = str(tmp_path / "export" / "model")
    assert sorted(algorithm.type for algorithm in read_params(stem + ".compress_params.bin").algo) == [0, 1]
    assert_deploys(stem, judge["logits"], record.after[-1])


def assert_deploys(stem, wanted, weights):
    """MNN computes what was simulated, and stores as zero whatever was pruned."""
    conversion = convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    assert conversion.coverage.fraction == 1.0
    (output,) = run_model(stem + ".mnn", {"x": batch(77).astype(np.float32)}).values()
    assert sqnr_db(wanted, output) >= 100
    stored = {levels.levels.size: levels.levels for levels in decode(stem + ".mnn").values()}
    for name in WEIGHTS:
        kernel = weights[name]
        rows = np.moveaxis(kernel, -1, 0) if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
        dead = rows.reshape(-1) == 0
        assert dead.sum() > 0 and (stored[kernel.size].reshape(-1)[dead] == 0).all()


def test_pruned_first_and_quantized_in_a_second_run_keeps_its_zeros(tmp_path):
    with tf.Graph().as_default():
        x, train, step, made = build("SIMDOCPruner", str(tmp_path / "first"), total_pruning_iterations=1)
        record = Record()
        with pruned_run.session(tmp_path / "first", made + [record], 100) as run:
            for number in range(5):
                run.run(train, {x: batch(number)})
    params = str(tmp_path / "first" / "export" / "model.compress_params.bin")
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        y = tf.nn.relu(tf_nets.batch_norm(tf_nets.conv(x, "c1", 12, bias=False), "b1", True))
        y = tf.nn.relu(tf_nets.conv(y, "c2", 16, stride=2))
        logits = tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5), name="logits")
        hook = LSQQuantizerHook(is_training=True, retain_sparsity=True, output_names=["logits"],
                                export_dir=str(tmp_path / "second"), init_checkpoint=str(tmp_path / "first" / "ckpt"))
        step = tf.train.get_or_create_global_step()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train = tf.train.MomentumOptimizer(0.05, 0.9).minimize(tf.reduce_mean(tf.square(logits - 1.0)),
                                                                   global_step=step)
        judge = {}

        class Judge(tf.train.SessionRunHook):
            def end(self, run):
                judge["logits"] = hook.quantizer.simulate(run, ["logits"], {x: batch(77)})[0]
                hook.quantizer.save_compress_params(params, run, append=True)

        with tf.train.MonitoredTrainingSession(hooks=[hook, Judge()]) as run:
            for number in range(4):
                run.run(train, {x: batch(number)})
    assert sorted(algorithm.type for algorithm in read_params(params).algo) == [0, 1]
    assert_deploys(str(tmp_path / "second" / "model"), judge["logits"], record.after[-1])


def test_the_exported_network_is_sparse_and_its_file_small(tmp_path):
    sizes = []
    for sparsity in (0.1, 0.8):
        folder = tmp_path / str(sparsity)
        with tf.Graph().as_default():
            x, train, step, made = build("SIMDOCPruner", str(folder), sparsity=sparsity, total_pruning_iterations=1)
            record = Record()
            with pruned_run.session(folder, made + [record], 100) as run:
                for number in range(4):
                    run.run(train, {x: batch(number)})
        stem = str(folder / "export" / "model")
        kernels = {node.name.replace("/read", ""): tf.make_ndarray(node.attr["value"].tensor)
                   for node in read_graph(stem + ".pb").node if node.op == "Const" and "/kernel" in node.name}
        for name in WEIGHTS:
            np.testing.assert_array_equal(kernels[name], record.after[-1][name])
        options = ConvertOptions(weight_bits=8, sparse=True)
        sizes.append(convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin", options).bytes)
    weights = sum(kernel.size for kernel in kernels.values())
    assert sizes[0] - sizes[1] > 0.35 * weights  # the rest of so small a file is the graph itself


@pytest.mark.parametrize("change, words", [
    (dict(begin=0.1), "give train_steps"), (dict(prune_finetune_iterations=None), "end, which is missing"),
    (dict(begin="soon"), "must be a step"), (dict(sensitivity_steps=0), "sensitivity_steps"),
    (dict(prune_finetune_iterations=None, begin=4, end=5), "do not fit between"),
    (dict(output_names=None), "without output_names")])
def test_bad_arguments_of_a_hook_are_refused(change, words, tmp_path):
    with tf.Graph().as_default(), pytest.raises(ValueError, match=words):
        build("SNIPLevelPruner", str(tmp_path), **change)


def test_parts_of_the_training_are_steps(tmp_path):
    with tf.Graph().as_default():
        _, _, _, (hook,) = build("SNIPLevelPruner", str(tmp_path), begin=0.1, end=0.5, train_steps=100,
                                 prune_finetune_iterations=None)
    assert hook.pruner.schedule == PruningSchedule(0.6, 3, 20, 10)


def test_a_step_that_is_not_counted_is_refused(tmp_path):
    with tf.Graph().as_default():
        loss = tf.reduce_mean(tf_nets.conv(tf.placeholder(tf.float32, [None, 8, 8, 3]), "c", 8))
        hook = SNIPLevelPrunerHook(prune_ratio_result_file="")
        tf.train.GradientDescentOptimizer(0.1).minimize(loss)
        with pytest.raises(RuntimeError, match="has no global step"):
            hook.begin()
        step = tf.train.get_or_create_global_step()
        with pytest.raises(RuntimeError, match="give global_step to the minimize"):
            hook.begin()
        tf.assign_add(step, 1)
        with pytest.raises(RuntimeError, match="give global_step to the minimize"):
            hook.begin()
    with tf.Graph().as_default(), pytest.raises(RuntimeError, match="is not the one"):
        hook.begin()


class TwoOptimizers:
    """Trains one scope with an optimizer of its own, which does not count the global step."""

    def __init__(self, scope, one_after_the_other=False):
        self.scope = scope
        self.one_after_the_other = one_after_the_other

    def minimize(self, loss, global_step):
        other = [v for v in tf.trainable_variables() if v.op.name.startswith(self.scope)]
        rest = [v for v in tf.trainable_variables() if not v.op.name.startswith(self.scope)]
        counts = tf.train.MomentumOptimizer(0.05, 0.9)
        gradients = counts.compute_gradients(loss, rest)
        first = tf.train.AdamOptimizer(0.01).minimize(loss, var_list=other)
        with tf.control_dependencies([first] if self.one_after_the_other else []):
            return tf.group(first, counts.apply_gradients(gradients, global_step))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("measures", [True, False])
def test_what_another_optimizer_trains_is_left_and_listed(pruner, measures, tmp_path):
    shapes = {"c1/kernel": [3, 3, 3, 12], "c2/kernel": [3, 3, 12, 16], "fc/kernel": [16, 5]}
    save_sensitivity(str(tmp_path / "sens.npy"),
                     {name: np.random.RandomState(5).rand(*shape) for name, shape in shapes.items()})
    given = {} if measures else {"sensitivity_npy_file": str(tmp_path / "sens.npy")}
    with tf.Graph().as_default():
        x, train, step, (hook,) = build(pruner, str(tmp_path), optimizer=TwoOptimizers("fc/"), **given)
        variables = {v.op.name: v for v in tf.global_variables() if v.op.name in WEIGHTS}
        with pruned_run.session(tmp_path, [hook], 100) as run:
            for number in range(8):
                run.run(train, {x: batch(number)})
                shares = zero_shares(run.run(variables))
            ratios = hook.pruner.current_prune_ratios(run._tf_sess())
            rows = {row.name: row for row in hook.pruner.report(run._tf_sess())}
    assert {name: ratios[name] for name in WEIGHTS} == pytest.approx(shares)
    assert shares["fc/kernel"] == 0 and shares["c2/kernel"] > 0.3
    assert "does not run before the global step is counted" in rows["fc/matmul"].reason


def test_another_optimizer_that_is_waited_for_is_pruned_too(tmp_path):
    with tf.Graph().as_default():
        x, train, step, (hook,) = build("SNIPLevelPruner", str(tmp_path), optimizer=TwoOptimizers("fc/", True))
        variables = {v.op.name: v for v in tf.global_variables() if v.op.name in WEIGHTS}
        with pruned_run.session(tmp_path, [hook], 100) as run:
            for number in range(8):
                run.run(train, {x: batch(number)})
            shares = zero_shares(run.run(variables))
            rows = {row.name: row for row in hook.pruner.report(run._tf_sess())}
    assert shares["fc/kernel"] == pytest.approx(rows["fc/matmul"].ratio) and shares["fc/kernel"] > 0


def test_channels_whose_norm_another_optimizer_trains_stay(tmp_path):
    with tf.Graph().as_default():
        x, train, step, (hook,) = build("TaylorFOChannelPruner", str(tmp_path), optimizer=TwoOptimizers("b1/"))
        variables = {v.op.name: v for v in tf.global_variables() if v.op.name in WEIGHTS}
        with pruned_run.session(tmp_path, [hook], 100) as run:
            for number in range(8):
                run.run(train, {x: batch(number)})
            shares = zero_shares(run.run(variables))
            rows = {row.name: row for row in hook.pruner.report(run._tf_sess())}
    assert shares["c1/kernel"] == 0 and shares["c2/kernel"] > 0.3
    assert "trains b1/" in rows["c1/conv"].reason
    with tf.Graph().as_default():
        _, _, _, (hook,) = build("TaylorFOChannelPruner", str(tmp_path), optimizer=TwoOptimizers(("b1/", "c2/bias")))
        with pytest.raises(RuntimeError, match="nothing is left to prune: .*trains c2/bias"):
            hook.begin()


def test_the_sparsity_is_a_summary(tmp_path):
    with tf.Graph().as_default() as graph:
        x, train, step, made = build("SNIPLevelPruner", str(tmp_path), total_pruning_iterations=1)
        with pruned_run.session(tmp_path, made, 100) as run:
            for number in range(4):
                run.run(train, {x: batch(number)})
            summaries = tf.Summary.FromString(run.run(graph.get_collection(tf.GraphKeys.SUMMARIES)[-1]))
    (found,) = [value.simple_value for value in summaries.value if value.tag == "sparsity"]
    assert found == pytest.approx(0.6, abs=1e-3)
