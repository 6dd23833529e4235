"""Hooks from a pipeline: the file that PyTorch reads, a monitored session, a model that MNN runs as simulated."""
import dataclasses
import inspect
import os

import numpy as np
import pytest

import tf_nets
from mnn_weights import decode
from slimtrain.core import Kind, PipelineError, define_compress_flag, load_pipeline, load_report, sqnr_db
from slimtrain.core.stages import STAGES
from slimtrain.hooks import LSQQuantizerHook, SIMDOCPrunerHook, WeightQuantizerHook, from_config
from slimtrain.hooks.configuration import _HOOKS
from slimtrain.proto import convert, run_model
from tf_setup import one_thread, tf

STAGE_CLASSES = [stage for kind, known in STAGES.items() if kind is not Kind.EXPORT for stage in known.values()]
OTHER_NAME = {"result_file": "prune_ratio_result_file"}  # the seed's interface for TensorFlow calls it so


@pytest.mark.parametrize("stage", STAGE_CLASSES, ids=lambda stage: stage.__name__)
def test_a_stage_has_the_arguments_of_its_hook(stage):
    parameters = inspect.signature(_HOOKS[stage.OBJECT].__init__).parameters
    missing = [field.name for field in dataclasses.fields(stage)
               if OTHER_NAME.get(field.name, field.name) not in parameters]
    assert missing == []


def network():
    """(input, output) of a small network, in the default graph."""
    x = tf.placeholder(tf.float32, [4, 8, 8, 3], name="x")
    y = tf.nn.relu(tf_nets.conv(x, "c1", 8, seed=1), name="r1")
    y = tf.nn.relu(tf_nets.conv(y, "c2", 8, stride=2, seed=3), name="r2")
    return x, tf.identity(tf_nets.dense(tf.reduce_mean(y, [1, 2]), "fc", 5, seed=5), name="logits")


def run(config, folder, steps=6, **arguments):
    """Train for a few steps with the hooks of a pipeline; returns the hooks."""
    with tf.Graph().as_default():
        x, logits = network()
        hooks = from_config(config, output_names=["logits"], **arguments)
        loss = tf.reduce_mean(tf.square(logits - 1.0))
        step = tf.train.get_or_create_global_step()
        train = tf.train.MomentumOptimizer(0.01, 0.9).minimize(loss, global_step=step)
        with tf.train.MonitoredTrainingSession(checkpoint_dir=str(folder), hooks=hooks, config=one_thread()) as session:
            for number in range(steps):
                session.run(train, {x: np.random.RandomState(number).randn(4, 8, 8, 3)})
            simulated = None
            quantizers = [hook for hook in hooks if isinstance(hook, LSQQuantizerHook)]
            if quantizers:
                simulated = quantizers[0].quantizer.simulate(session._tf_sess(), ["logits"], {x: images()})[0]
    return hooks, simulated


def images():
    return np.random.RandomState(99).randn(4, 8, 8, 3).astype(np.float32)


def test_prune_then_quantize_from_one_file(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text("pipeline:\n- prune: simd_oc\n  sparsity: 0.5\n  total_pruning_iterations: 2\n"
                    "  sensitivity_steps: 1\n  begin: 0.0\n  end: 1 epoch\n- quantize: lsq\n- export: %s\n"
                    % (tmp_path / "out" / "net"), encoding="utf-8")
    (pruner, quantizer, report), simulated = run(path, tmp_path / "run", train_steps=6, epoch_steps=3, report=True)
    assert (type(pruner), type(quantizer)) == (SIMDOCPrunerHook, LSQQuantizerHook)
    assert pruner.pruner.schedule.last_step == 3
    stem = str(tmp_path / "out" / "net")
    check_report(load_report(tmp_path / "out" / "compression_report.json"), report.report, stem)
    conversion = convert(stem + ".pb", stem + ".mnn", stem + ".compress_params.bin")
    (found,) = run_model(stem + ".mnn", {"x": images()}).values()
    assert conversion.coverage.fraction == 1.0 and sqnr_db(simulated, found.reshape(simulated.shape)) >= 100
    zeros = {name: float((layer.levels == 0).mean()) for name, layer in decode(stem + ".mnn").items()}
    assert min(zeros.values()) > 0.2 and len(zeros) == 3


def check_report(saved, reported, stem):
    """The report is that of the file, and of the training."""
    assert saved == reported and saved.coverage == 1.0 and saved.real_bytes == os.path.getsize(stem + ".mnn")
    assert len(saved.layers) == 3 and all("8-bit" in row.note for row in saved.layers)
    assert max(row.sparsity for row in saved.layers) > 0.4 and "pruned" in saved.layers[0].note
    assert saved.curves["sparsity"].values[-1] == pytest.approx(0.5, abs=0.05)
    assert any(name.endswith("input_scale") for name in saved.curves)
    assert saved.sqnr_db >= 100 and set(saved.layer_sqnr_db) == {row.name for row in saved.layers}
    assert all(10 < decibels < 60 for decibels in saved.layer_sqnr_db.values())
    assert set(saved.weights) == set(saved.activations) == set(saved.layer_sqnr_db)


def test_weights_alone(tmp_path):
    (hook,), _ = run("quantize:weight,bits=4;export:%s" % (tmp_path / "w"), tmp_path / "run")
    assert isinstance(hook, WeightQuantizerHook) and (tmp_path / "w.pb").exists()


def test_only_the_first_stage_restores(tmp_path):
    run(load_pipeline("prune:snip,sensitivity_steps=1,total_pruning_iterations=1"), tmp_path / "first", train_steps=6)
    trained = tf.train.latest_checkpoint(str(tmp_path / "first"))
    hooks, _ = run("quantize:lsq", tmp_path / "second", init_checkpoint=trained)
    assert len(hooks) == 1


@pytest.mark.parametrize("config, message", [
    ("quantise:lsq", "did you mean quantize"),
    ("over_parameterize:lop,expand_rate=2;quantize:lsq", "has a training run of its own"),
    ("prune:snip", "give train_steps"),
    ("prune:snip,begin=0,end=2 epochs", "length of an epoch is not known"), ("low_rank", "weight_npy_file is missing")])
def test_what_cannot_work_is_refused_before_the_session(config, message):
    with tf.Graph().as_default():
        network()
        with pytest.raises((PipelineError, ValueError), match=message):
            from_config(config, output_names=["logits"])


def test_the_flag_is_checked_where_flags_are(tmp_path):
    flags = tf.app.flags if hasattr(tf, "app") else tf.flags
    values = flags.FLAGS
    define_compress_flag(flags, "compress_test")
    values(["program", "--compress_test", "quantize:lsq,bits=4"])
    assert load_pipeline(values.compress_test).last.bits == 4
    with pytest.raises(Exception, match="bits must be an integer from 2 to 8, got 9"):
        values(["program", "--compress_test", "quantize:lsq,bits=9"])
