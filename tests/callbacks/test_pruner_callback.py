"""Pruning inside a Lightning Trainer: the right steps and gradients, stopping and going on, two ranks, stacking."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint

# pytest has done so, but this module is also imported by the processes that it starts
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
from mnn_weights import decode
from nets import Lit, StepOnly, images, loader, trainer
from slimtrain.callbacks import (
    LSQQuantizerCallback,
    SIMDOCPrunerCallback,
    SNIPLevelPruner,
    SNIPLevelPrunerCallback,
    TaylorFOChannelPruner,
    TaylorFOChannelPrunerCallback,
    load_shrunk,
)
from slimtrain.proto import read_params, run_model

HERE = os.path.dirname(os.path.abspath(__file__))
ALL = [SNIPLevelPrunerCallback, SIMDOCPrunerCallback, TaylorFOChannelPrunerCallback]
PLAN = {"sparsity": 0.5, "total_pruning_iterations": 3, "sensitivity_steps": 2, "begin": 1, "end": 6, "export_to": ""}


class Stepwise(Lit):
    """Trains on the data of the optimizer step: a plain loader starts a half finished epoch anew."""

    def training_step(self, batch, batch_idx):
        x, y = images(64)
        start = 8 * (self.global_step % 8)
        return F.cross_entropy(self(x[start:start + 8]), y[start:start + 8])


def seeded(kind=Lit, *args):
    torch.manual_seed(7)
    return kind(*args)


def fit(folder, kind, *others, model=None, ckpt_path=None, plan=None, **options):
    callback = kind(**{**PLAN, **(plan or {})})
    model = model or seeded(Stepwise, 12)
    trainer(folder, callback, *others, **{"max_epochs": 3, **options}).fit(model, loader(), ckpt_path=ckpt_path)
    return model, callback


def values(model, callback):
    return {**{name: value.clone() for name, value in model.state_dict().items()},
            "sparsity": torch.tensor(callback.pruner.sparsity)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def zero_share(state, callback):
    weights = [state[name] for name in callback.pruner.weights()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class Watch(pl.Callback):
    """Looks at zeros and gradients from outside."""

    def __init__(self, callback):
        self.callback, self.zeros = callback, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        target = dict(self.callback.pruner.model.named_parameters())
        if not self.zeros or self.zeros[-1][0] != trainer.global_step:
            self.zeros.append((trainer.global_step, round(zero_share(target, self.callback), 4)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_events_are_at_optimizer_steps_and_zeros_stay(tmp_path, accumulate):
    callback = SNIPLevelPrunerCallback(**PLAN)
    watch = Watch(callback)
    trainer(tmp_path, callback, watch, max_epochs=3 * accumulate, accumulate_grad_batches=accumulate).fit(
        seeded(Lit, 12), loader())
    shares = [0.0] + [0.5 * 19 / 27] * 2 + [0.5 * 26 / 27] * 2 + [0.5] * 7
    found = [share for step, share in watch.zeros if step]
    assert found == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, step, tmp_path):
    whole = values(*fit(tmp_path, kind))
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, kind, saver, max_steps=step)
    assert same(values(*fit(tmp_path, kind, ckpt_path=str(tmp_path / ("step=%d.ckpt" % step)))), whole)


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_pruner_callback import fit, values
from slimtrain.callbacks import SNIPLevelPrunerCallback
from pytorch_lightning.callbacks import ModelCheckpoint
import pytorch_lightning as pl

class Slow(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        with open(os.path.join(sys.argv[1], "steps"), "a") as file:
            file.write("x")
        time.sleep(0.01)

saver = ModelCheckpoint(sys.argv[1], "{step}", every_n_train_steps=1, save_top_k=2, save_last=True, monitor="step",
                        mode="max")
last = os.path.join(sys.argv[1], "last.ckpt")
whole = fit(sys.argv[1], SNIPLevelPrunerCallback, saver, Slow(), ckpt_path=last if os.path.exists(last) else None)
torch.save(values(*whole), os.path.join(sys.argv[1], "values.pt"))
"""


def test_a_killed_run_resumed_ends_like_an_uninterrupted_one(tmp_path):
    whole = values(*fit(tmp_path / "whole", SNIPLevelPrunerCallback))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), HERE]
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted, deadline = random.randrange(2, 9), time.time() + 120
    while time.time() < deadline and victim.poll() is None:
        if (tmp_path / "steps").exists() and len((tmp_path / "steps").read_text()) >= wanted:
            break
        time.sleep(0.002)
    assert victim.poll() is None, "the process ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "values.pt", weights_only=True), whole)


@pytest.mark.parametrize("kind", ALL)
def test_every_checkpoint_is_sparse_and_loads_as_the_plain_model(kind, tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)
    _, callback = fit(tmp_path, kind, saver)
    shares = []
    for step in range(1, 13):
        plain = Lit.load_from_checkpoint(tmp_path / ("step=%d.ckpt" % step), width=12)
        shares.append(zero_share(plain.state_dict(), callback))
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(callback.pruner.sparsity)
    assert shares[6:] == [shares[-1]] * 6


def test_weights_only_checkpoints_have_their_state_beside_them(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=4, save_top_k=-1, save_weights_only=True)
    _, callback = fit(tmp_path, SNIPLevelPrunerCallback, saver)
    state = torch.load(tmp_path / "step=8.ckpt.slimtrain", weights_only=True)["callbacks"][callback.state_key]
    assert state["pruner"]["step"] == 8


class Manual(StepOnly):
    """Steps its optimizer itself, twice per batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            dead = getattr(self, "dead", {})
            assert all(torch.all(value[dead[name]] == 0) for name, value in self.net.named_parameters() if name in dead)
            self.dead = {name: value == 0 for name, value in self.net.named_parameters()}


@pytest.mark.parametrize("kind", ALL)
def test_manual_optimization_prunes_by_optimizer_steps(kind, tmp_path):
    model, callback = fit(tmp_path, kind, model=seeded(Manual), max_epochs=1)
    assert callback.pruner.finished and zero_share(dict(model.net.named_parameters()), callback) > 0.3


def test_a_step_that_calls_no_forward_of_ours_still_finds_the_channels(tmp_path):
    _, callback = fit(tmp_path, TaylorFOChannelPrunerCallback, model=seeded(StepOnly))
    assert callback.pruner.classes.groups


class Logged(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        self.metrics = dict(trainer.progress_bar_metrics), dict(trainer.logged_metrics)


def test_sparsity_is_on_the_progress_bar_and_in_the_log(tmp_path):
    logged = Logged()
    fit(tmp_path, SNIPLevelPrunerCallback, logged)
    for metrics in logged.metrics:
        assert float(metrics["sparsity"]) == pytest.approx(0.5, abs=1e-3)


def test_training_that_ends_too_early_says_so(tmp_path, caplog):
    with caplog.at_level("WARNING", "slimtrain"):
        fit(tmp_path, SNIPLevelPrunerCallback, max_steps=3)
    assert "asked for was 0.5" in caplog.text


@pytest.mark.parametrize("change, error", [({"begin": 0.5, "end": 0.2}, ValueError), ({"begin": -1}, ValueError),
                                           ({"end": 1.5}, ValueError)])
def test_bad_moments_are_refused_at_once(change, error):
    with pytest.raises(error):
        SNIPLevelPrunerCallback(**{**PLAN, **change})


@pytest.mark.parametrize("kind", ALL)
def test_the_end_of_fit_writes_a_sparse_model(kind, tmp_path):
    pytest.importorskip("MNN")
    model, callback = fit(tmp_path, kind, plan={"export_to": str(tmp_path / "out" / "net"), "sparsity": 0.6})
    wanted = model.eval()(images(4, seed=3)[0]).detach().numpy()
    found = next(iter(run_model(callback.deployed.mnn, images(4, seed=3)[0].numpy()).values()))
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=0.02 * np.abs(wanted).max())
    assert callback.deployed.sqnr_db > 30
    algo, = read_params(tmp_path / "out" / "net.compress_params.bin").algo
    assert algo.HasField("prune_params")
    if kind is TaylorFOChannelPrunerCallback:
        exported = onnx.load(str(tmp_path / "out" / "net.onnx"))
        kept = sum(int(np.prod(tensor.dims)) for tensor in exported.graph.initializer if len(tensor.dims) > 1)
        total = sum(weight.numel() for weight in callback.pruner.weights().values())
        assert kept == pytest.approx((1 - callback.pruner.sparsity) * total, abs=3)
        fresh = load_shrunk(seeded(Lit, 12), tmp_path / "out" / "net.channels.json",
                            callback.pruner.shrink().state_dict())
        np.testing.assert_allclose(fresh.eval()(images(4, seed=3)[0]).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import slimtrain.callbacks as callbacks
from pytorch_lightning.callbacks import Callback

class Save(Callback):
    def on_train_end(self, trainer, pl_module):
        keep = self.callback.pruner.state_dict()["keep"]
        parameters = {"value of " + name: value.detach() for name, value in pl_module.named_parameters()}
        torch.save({**keep, **parameters}, os.path.join(sys.argv[1], "rank%d.pt" % trainer.global_rank))

from test_pruner_callback import PLAN, seeded, Lit, loader, trainer
save, callback = Save(), getattr(callbacks, sys.argv[3])(**PLAN)
save.callback = callback
trainer(sys.argv[1], callback, save, max_epochs=4, strategy="ddp", devices=2).fit(seeded(Lit, 12), loader())
"""


@pytest.mark.parametrize("kind", [SNIPLevelPrunerCallback, TaylorFOChannelPrunerCallback])
def test_two_ranks_prune_the_same_weights(kind, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(tmp_path), HERE, kind.__name__],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / ("rank%d.pt" % rank), weights_only=True) for rank in (0, 1))
    assert same(first, second) and any((value == 0).any() for name, value in first.items() if "value" in name)


@pytest.mark.parametrize("kind", [SNIPLevelPrunerCallback, SIMDOCPrunerCallback])
def test_pruning_and_quantization_in_one_run_deploy_exactly_with_every_zero_kept(kind, tmp_path):
    pytest.importorskip("MNN")
    stem = str(tmp_path / "net")
    pruning = kind(**{**PLAN, "sparsity": 0.6, "export_to": None})
    quantizing = LSQQuantizerCallback(retain_sparsity=True, export_to=stem)
    model = seeded(Lit, 12)
    trainer(tmp_path, pruning, quantizing, max_epochs=4).fit(model, loader())
    assert pruning.pruner.sparsity == pytest.approx(0.6, abs=5e-3)
    assert quantizing.deployed.sqnr_db >= 100
    assert quantizing.deployed.coverage.fraction == 1.0
    assert [algo.HasField("prune_params") for algo in read_params(stem + ".compress_params.bin").algo] == [False, True]
    exported = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(stem + ".onnx").graph.initializer]
    convolutions = [value for value in exported if value.ndim == 4]
    for name, keep in pruning.pruner.state_dict()["keep"].items():
        dead = ~keep.numpy().reshape(keep.shape + (1,) * (4 - keep.dim()))
        assert any(value.shape == dead.shape and not value[dead].any() for value in convolutions), name
        stored = [each.levels.reshape(dead.shape) for each in decode(stem + ".mnn").values()
                  if each.levels.size == dead.size]
        assert any(not levels[dead].any() and levels.any() for levels in stored), name


def test_the_seed_names_of_the_objects_are_those_of_the_callbacks():
    for kind, wanted in ((SNIPLevelPrunerCallback, SNIPLevelPruner),
                         (TaylorFOChannelPrunerCallback, TaylorFOChannelPruner)):
        model = seeded(Lit, 12)
        assert type(kind(**PLAN).make_pruner(model)) is wanted
