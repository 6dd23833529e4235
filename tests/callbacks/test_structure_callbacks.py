"""Low rank and over-parameterization in a Lightning Trainer: checkpoints, resumes, two ranks, other callbacks."""
from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from nets import Lit, Resumable, images, loader, trainer
from slimtrain.callbacks import (
    LOPCallback,
    LowRankDecompositionCallback,
    LSQQuantizerCallback,
    SNIPLevelPrunerCallback,
    load_decomposed,
    restore_dense,
    structure_of,
)
from slimtrain.core import EnergyRanks, ExplicitRanks, SlimtrainError
from slimtrain.proto import read_params

HERE = os.path.dirname(os.path.abspath(__file__))
WIDTH = 16
X = images(4, seed=9)[0]


def lop(**options):
    return LOPCallback(2, **{"export_to": "", **options})


def low_rank(**options):
    return LowRankDecompositionCallback(**{"align_channels": 2, "tucker_minimal_ratio": 0.0, "export_to": "",
                                           "rank_rule": EnergyRanks(0.7), **options})


def pruner(**options):
    return SNIPLevelPrunerCallback(**{"sparsity": 0.5, "total_pruning_iterations": 3, "sensitivity_steps": 2,
                                      "begin": 1, "end": 6, "export_to": "", **options})


ALL = {"LOP": lop, "low rank": low_rank}


def seeded(seed=7):
    torch.manual_seed(seed)
    return Lit(WIDTH)


def fit(folder, callback, *others, model=None, ckpt_path=None, **options):
    model = model or seeded()
    trainer(folder, callback, *others, **{"max_epochs": 2, **options}).fit(model, Resumable(), ckpt_path=ckpt_path)
    return model, callback


def values(model):
    """Everything that is trained or tracked, expanded and factorized weights included."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outputs(model, x=X):
    with torch.no_grad():
        return copy.deepcopy(model).cpu().eval()(x)


def close(found, expected, tolerance=1e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


# -- resume


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_resumed_run_ends_like_an_uninterrupted_one(name, step, tmp_path):
    whole = values(fit(tmp_path / "whole", ALL[name]())[0])
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, ALL[name](), saver, max_steps=step)
    # another model: its ranks and its random expansion are not those of the checkpoint
    resumed, _ = fit(tmp_path, ALL[name](), model=seeded(99), ckpt_path=str(tmp_path / ("step=%d.ckpt" % step)))
    assert same(values(resumed), whole)


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_structure_callbacks import ALL, fit, values
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
whole = fit(sys.argv[1], ALL[sys.argv[3]](), saver, Slow(), ckpt_path=last if os.path.exists(last) else None)
torch.save(values(whole[0]), os.path.join(sys.argv[1], "values.pt"))
"""


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_killed_run_resumed_ends_like_an_uninterrupted_one(name, tmp_path):
    whole = values(fit(tmp_path / "whole", ALL[name]())[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), HERE, name]
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted, deadline = random.randrange(2, 7), time.time() + 120
    while time.time() < deadline and victim.poll() is None:
        if (tmp_path / "steps").exists() and len((tmp_path / "steps").read_text()) >= wanted:
            break
        time.sleep(0.002)
    assert victim.poll() is None, "the process ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "values.pt").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "values.pt", weights_only=True), whole)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", sorted(ALL))
def test_a_checkpoint_is_evaluated_in_its_own_structure(name, weights_only, tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "last", save_weights_only=weights_only)
    model, _ = fit(tmp_path, ALL[name](), saver)
    found = trainer(tmp_path, ALL[name]()).predict(seeded(99), loader(8, seed=3), ckpt_path=saver.best_model_path)
    close(torch.cat(found), outputs(model, images(8, seed=3)[0]))


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_second_fit_goes_on(name, tmp_path):
    model, callback = fit(tmp_path, ALL[name](), max_epochs=1)
    parameters = [id(parameter) for parameter in model.parameters()]
    before = values(model)
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not same(values(model), before)


# -- what checkpoints hold


PLAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from nets import Lit, images
model = Lit.load_from_checkpoint(sys.argv[2]).eval()
assert not [name for name in sys.modules if name.startswith("slimtrain")]
torch.save(model(images(4, seed=9)[0]).detach(), sys.argv[3])
"""


def test_an_expanded_run_saves_the_small_model_under_its_own_names(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=3, save_top_k=-1)
    model, callback = fit(tmp_path, lop(), saver, max_steps=6)
    assert len(list(model.parameters())) > len(list(Lit(WIDTH).parameters()))
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert {name: value.shape for name, value in saved["state_dict"].items()} == {
        name: value.shape for name, value in Lit(WIDTH).state_dict().items()}
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN, HERE, str(tmp_path / "step=6.ckpt"),
                    str(tmp_path / "out.pt")], env=environment, check=True, capture_output=True, timeout=300)
    close(torch.load(tmp_path / "out.pt", weights_only=True), outputs(model))
    wanted = outputs(model)
    merged = callback.merge()
    assert merged is model and [name for name, _ in model.named_parameters()] == [
        name for name, _ in Lit(WIDTH).named_parameters()]
    close(outputs(model), wanted)


def test_a_decomposed_checkpoint_loads_without_a_trainer_and_becomes_dense_again(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "last")
    model, callback = fit(tmp_path, low_rank(), saver)
    assert structure_of(model) and any(line.ranks for line in callback.report)
    loaded = load_decomposed(Lit, saver.best_model_path)
    assert type(loaded) is Lit and structure_of(loaded) == structure_of(model)
    assert torch.equal(outputs(loaded), outputs(model))
    dense = restore_dense(loaded)
    fresh = Lit(WIDTH)
    fresh.load_state_dict(dense.state_dict())
    close(outputs(fresh), outputs(model))


def test_decomposition_starts_from_the_weights_of_a_file(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "float")
    model = seeded()
    trainer(tmp_path, saver, max_epochs=1).fit(model, loader())

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.dense = restore_dense(copy.deepcopy(pl_module)).state_dict()

    look = Look()
    half = low_rank(start_from=saver.best_model_path, rank_rule=ExplicitRanks({"net.inner": (8, 8)}))
    fit(tmp_path, half, look, model=seeded(99), max_epochs=1)
    wanted = model.state_dict()
    factors = wanted.pop("net.inner.weight")
    assert all(torch.equal(look.dense[name], value) for name, value in wanted.items())
    close(look.dense["net.inner.weight"], factors, 0.9)  # half of the ranks; other weights would be 1.4 away
    assert not torch.equal(look.dense["net.inner.weight"], factors)


def test_the_weights_of_a_dense_model_are_not_taken_for_factors(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "float")
    trainer(tmp_path, saver, max_epochs=1).fit(seeded(), loader())
    with pytest.raises(SlimtrainError, match="start_from"):
        fit(tmp_path, low_rank(), ckpt_path=saver.best_model_path)
    with pytest.raises(RuntimeError, match="keep_weights"):
        fit(tmp_path, lop(), ckpt_path=saver.best_model_path)
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    with pytest.raises(SlimtrainError, match="broken.ckpt"):
        fit(tmp_path, low_rank(start_from=str(tmp_path / "broken.ckpt")))


# -- two ranks


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pytorch_lightning.callbacks import Callback
from test_structure_callbacks import ALL, loader, seeded, trainer

class Save(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save({name: value.detach() for name, value in pl_module.named_parameters()},
                   os.path.join(sys.argv[1], "rank%d.pt" % trainer.global_rank))

# what the ranks start from is not the same: the first one decides
model = seeded(7 + int(os.environ.get("LOCAL_RANK", 0)))
trainer(sys.argv[1], ALL[sys.argv[3]](), Save(), max_epochs=2, strategy="ddp", devices=2).fit(model, loader())
"""


@pytest.mark.parametrize("name", sorted(ALL))
def test_two_ranks_train_the_same_structure(name, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(tmp_path), HERE, name],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / ("rank%d.pt" % rank), weights_only=True) for rank in (0, 1))
    assert same(first, second) and len(first) > len(list(Lit(WIDTH).parameters()))


# -- files


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_end_of_fit_writes_the_small_model(name, tmp_path):
    pytest.importorskip("MNN")
    model, callback = fit(tmp_path, ALL[name](export_to=str(tmp_path / "net")))
    assert callback.deployed.sqnr_db > 100
    assert len(read_params(tmp_path / "net.compress_params.bin").algo) == 0
    weights = sum(value.numel() for value in model.state_dict().values())
    assert callback.deployed.bytes < 4 * weights + 6000


def test_nothing_is_known_before_there_is_a_model():
    for callback in (lop(), low_rank()):
        with pytest.raises(RuntimeError, match="no model yet"):
            callback.export("net")
    for call in (lambda: LOPCallback(0), lambda: low_rank(align_channels=0), lambda: low_rank(refinements=-1)):
        with pytest.raises(ValueError, match="at least|negative"):
            call()


# -- beside other algorithms


def quantizer(**options):
    return LSQQuantizerCallback(**{"export_to": "", **options})


def test_low_rank_and_quantization_in_one_run_deploy_exactly(tmp_path):
    pytest.importorskip("MNN")
    stem = str(tmp_path / "net")
    model, quantizing = seeded(), quantizer(export_to=stem)
    trainer(tmp_path, low_rank(export_to=None), quantizing).fit(model, loader())
    assert quantizing.deployed.sqnr_db >= 100 and quantizing.deployed.coverage.fraction == 1.0
    assert len(quantizing.quantizer.layers) > len([m for m in Lit(WIDTH).modules() if hasattr(m, "weight")]) - 1
    assert len(read_params(stem + ".compress_params.bin").algo) == 1


def test_over_parameterization_pruning_and_quantization_in_one_file(tmp_path):
    pytest.importorskip("MNN")
    stem = str(tmp_path / "net")
    model, expanding = fit(tmp_path, lop(export_to=stem))
    expanding.merge()
    pruning, quantizing = pruner(export_to=None), quantizer(export_to=stem, retain_sparsity=True)
    trainer(tmp_path, pruning, quantizing).fit(model, loader())
    assert quantizing.deployed.sqnr_db >= 100 and quantizing.deployed.coverage.fraction == 1.0
    assert [algo.HasField("prune_params") for algo in read_params(stem + ".compress_params.bin").algo] == [False, True]
    assert pruning.pruner.sparsity == pytest.approx(0.5, abs=1e-3)


PAIRS = {"low rank and quantizer": (low_rank, quantizer), "low rank and pruner": (low_rank, pruner),
         "pruner and quantizer": (pruner, lambda: quantizer(retain_sparsity=True))}


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_the_order_of_two_callbacks_does_not_matter(pair, tmp_path):
    first, second = PAIRS[pair]
    results = []
    for kinds in ((first, second), (second, first)):
        model = seeded()
        trainer(tmp_path, *(kind() for kind in kinds)).fit(model, loader())
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_two_callbacks_resume(pair, tmp_path):
    kinds = PAIRS[pair]
    whole = values(fit(tmp_path / "whole", *(kind() for kind in kinds))[0])
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, *(kind() for kind in kinds), saver, max_steps=5)
    resumed, _ = fit(tmp_path, *(kind() for kind in reversed(kinds)), model=seeded(99),
                     ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert same(values(resumed), whole)


@pytest.mark.parametrize("other", [quantizer, pruner, low_rank])
@pytest.mark.parametrize("first", [True, False])
def test_an_expanded_model_is_not_compressed_otherwise_at_the_same_time(other, first, tmp_path):
    callbacks = [lop(), other()] if first else [other(), lop()]
    with pytest.raises(RuntimeError, match="merge"):
        trainer(tmp_path, *callbacks).fit(seeded(), loader())


def test_different_parts_of_a_model_are_compressed_differently(tmp_path):
    model = seeded()
    callbacks = lop(module="net.inner"), pruner(module="net.head")
    trainer(tmp_path, *callbacks).fit(model, loader())
    assert float(np.mean(model.net.head.weight.detach().numpy() == 0)) == pytest.approx(0.5, abs=0.02)
