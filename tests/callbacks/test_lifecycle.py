"""LSQ inside a Lightning Trainer: every stage, every way to stop and go on, everything that must be refused."""
from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from nets import Lit, Resumable, Small, StepOnly, images, loader, trainer
from slimtrain.callbacks import Deployed, LSQQuantizer, LSQQuantizerCallback
from slimtrain.core import Coverage

HERE = os.path.dirname(os.path.abspath(__file__))
X = images(4, seed=9)[0]


def values(model, callback):
    """Weights, buffers and scales after training."""
    state = {**model.state_dict(), **{"scale %d" % i: p for i, p in enumerate(callback.quantizer.scale_parameters())}}
    return {name: value.detach().clone() for name, value in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fit(folder, *callbacks, model=None, ckpt_path=None, data=None, **options):
    callback = LSQQuantizerCallback(bits=4, export_to="", **options.pop("callback", {}))
    model = model or seeded()
    trainer(folder, callback, *callbacks, **options).fit(model, data or Resumable(), ckpt_path=ckpt_path)
    return model, callback


def seeded(kind=Lit):
    torch.manual_seed(7)
    return kind()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return values(*fit(tmp_path_factory.mktemp("whole"), max_epochs=3))


# -- resume


@pytest.mark.parametrize("step", [2, 4, 6, 9])
def test_resumed_run_ends_like_an_uninterrupted_one(step, tmp_path, uninterrupted):
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, saver, max_epochs=3, max_steps=step)
    model, callback = fit(tmp_path, max_epochs=3, ckpt_path=str(tmp_path / ("step=%d.ckpt" % step)))
    assert same(values(model, callback), uninterrupted)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_resumed_run_of_each_mode(mode, tmp_path):
    extra = {"mode": mode, "retain_sparsity": True}
    whole = values(*fit(tmp_path / "whole", max_epochs=2, callback=extra))
    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, saver, max_epochs=2, max_steps=5, callback=extra)
    assert same(values(*fit(tmp_path, max_epochs=2, callback=extra, ckpt_path=str(tmp_path / "step=5.ckpt"))), whole)


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_lifecycle import fit, values
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
whole = fit(sys.argv[1], saver, Slow(), max_epochs=3, ckpt_path=last if os.path.exists(last) else None)
torch.save(values(*whole), os.path.join(sys.argv[1], "values.pt"))
"""


def test_killed_run_resumed_ends_like_an_uninterrupted_one(tmp_path, uninterrupted):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), HERE]
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted, deadline = random.randrange(2, 9), time.time() + 60
    while time.time() < deadline and victim.poll() is None:
        if (tmp_path / "steps").exists() and len((tmp_path / "steps").read_text()) >= wanted:
            break
        time.sleep(0.002)
    assert victim.poll() is None, "the process ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "values.pt").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "values.pt", weights_only=True), uninterrupted)


class Look(pl.Callback):
    """Keeps the scales with which training starts."""

    def __init__(self, callback) -> None:
        self.callback = callback

    def on_train_start(self, trainer, pl_module):
        self.scales = [p.detach().clone() for p in self.callback.quantizer.scale_parameters()]


def test_float_checkpoint_starts_scales_from_its_weights(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "float")
    model = seeded()
    trainer(tmp_path, saver, max_epochs=1).fit(model, loader())
    resumed, callback = Lit(), LSQQuantizerCallback(bits=4, export_to="")
    look = Look(callback)
    torch.manual_seed(99)
    trainer(tmp_path, callback, look, max_epochs=2).fit(resumed, loader(), ckpt_path=saver.best_model_path)
    wanted = LSQQuantizer(model, bits=4)
    wanted.calibrate([next(iter(loader()))[0]])
    assert all(torch.equal(a, b) for a, b in zip(look.scales, wanted.scale_parameters()))


def test_float_checkpoint_after_quantized_training_starts_anew(tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "float")
    trainer(tmp_path, saver, max_epochs=1).fit(seeded(), loader())
    model, callback = fit(tmp_path / "a", max_epochs=1, model=Lit())
    before, look = values(model, callback), Look(callback)
    trainer(tmp_path / "b", callback, look, max_epochs=2).fit(model, loader(), ckpt_path=saver.best_model_path)
    fresh = LSQQuantizer(Lit(), bits=4)
    fresh.model.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    fresh.calibrate([next(iter(loader()))[0]])
    assert not same(values(model, callback), before)
    assert all(torch.equal(a, b) for a, b in zip(look.scales, fresh.scale_parameters()))


def test_second_fit_goes_on(tmp_path):
    model, callback = fit(tmp_path, max_epochs=1)
    quantizer = callback.quantizer
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    scales = [p.detach().clone() for p in quantizer.scale_parameters()]
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader())
    assert callback.quantizer is quantizer
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(torch.equal(a, b) for a, b in zip(scales, quantizer.scale_parameters()))


def test_callback_moves_to_another_model(tmp_path):
    first, callback = fit(tmp_path, max_epochs=1)
    second = seeded()
    trainer(tmp_path, callback, max_epochs=1).fit(second, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in first.modules())
    assert len(list(first.parameters())) == len(list(Lit().parameters()))
    assert same(values(second, callback), values(*fit(tmp_path, max_epochs=1)))


# -- other stages


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_of_a_checkpoint(stage, weights_only, tmp_path):
    saver = ModelCheckpoint(str(tmp_path), "last", save_weights_only=weights_only)
    model, callback = fit(tmp_path, saver, max_epochs=1)
    wanted = trainer(tmp_path, callback).predict(model, loader(8, seed=3))
    fresh, other = Lit(), LSQQuantizerCallback(bits=4, export_to="")
    runner = trainer(tmp_path, other)
    result = getattr(runner, stage)(fresh, loader(8, seed=3), ckpt_path=saver.best_model_path)
    if stage == "predict":
        assert torch.equal(torch.cat(result), torch.cat(wanted))
    else:
        loss = F.cross_entropy(torch.cat(wanted), images(8, seed=3)[1])
        assert result[0][stage.replace("validate", "val") + "_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_predictions_carry_nothing_of_ours(tmp_path):
    model, callback = fit(tmp_path, max_epochs=1)
    out = trainer(tmp_path, callback).predict(model, loader(8))
    assert not vars(out[0])
    torch.save(out, tmp_path / "out.pt")
    torch.load(tmp_path / "out.pt", weights_only=True)


def test_validation_before_training_is_that_of_the_float_model(tmp_path):
    seen = []

    class Watch(Lit):
        def validation_step(self, batch, batch_idx):
            seen.append((self(batch[0]), {name: value.clone() for name, value in self.state_dict().items()}))

    model = seeded(Watch)
    runner = trainer(tmp_path, LSQQuantizerCallback(bits=2, export_to=""), max_epochs=1)
    runner.num_sanity_val_steps = 1
    runner.fit(model, loader(), loader(8, seed=3))
    plain = seeded().eval()
    assert torch.equal(seen[0][0], plain(images(8, seed=3)[0]))
    plain.load_state_dict(seen[-1][1])
    assert not torch.equal(seen[-1][0], plain(images(8, seed=3)[0]))


def test_the_random_state_is_that_of_a_run_without_the_callback(tmp_path):
    states = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            states.append((torch.get_rng_state(), batch[0].clone()))

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()), batch_size=8, shuffle=True)
    for callbacks in ([Look()], [LSQQuantizerCallback(export_to="", calibration_batches=3), Look()]):
        model = seeded()
        trainer(tmp_path, *callbacks, max_epochs=1).fit(model, data)
    half = len(states) // 2
    assert all(torch.equal(a[1], b[1]) for a, b in zip(states[:half], states[half:]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(states[:half], states[half:]))


# -- ways to train


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Late(Lit):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Small()


class Rebuilding(Lit):
    def configure_model(self):
        self.net = Small()


class FromModule(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


class Dicts(Lit):
    def forward(self, image, label=None):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class DictData(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, y = images(16)
        return {"label": y[index], "image": x[index]}


def moved(callback):
    start = LSQQuantizer(seeded(), bits=callback.quantizer.bits.weight).scale_parameters()
    return not any(torch.equal(a, b) for a, b in zip(start, callback.quantizer.scale_parameters()))


@pytest.mark.parametrize("options", [
    {"accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"precision": "bf16-mixed"},
    {"precision": "16-mixed"},
    {"precision": "bf16-true"},
    {"precision": "64-true"},
    {"limit_train_batches": 2, "max_steps": 3},
], ids=lambda options: "-".join(map(str, options.values())))
def test_trainer_options(options, tmp_path):
    model, callback = fit(tmp_path, max_epochs=2, **options) if "max_steps" not in options else fit(tmp_path, **options)
    assert moved(callback)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if "64" not in str(options):
        assert all(p.dtype is torch.float32 for p in callback.quantizer.scale_parameters())
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("kind", [Manual, Late, StepOnly], ids=lambda kind: kind.__name__)
def test_kinds_of_modules(kind, tmp_path):
    model, callback = fit(tmp_path, model=seeded(kind), max_epochs=1)
    assert moved(callback)
    assert callback.export(str(tmp_path / "out")).onnx


def test_manual_equals_automatic(tmp_path):
    manual = fit(tmp_path, model=seeded(Manual), max_epochs=1)
    automatic = fit(tmp_path, max_epochs=1)
    assert same(values(*manual), values(*automatic))


def test_data_module(tmp_path, uninterrupted):
    assert same(values(*fit(tmp_path, data=FromModule(), max_epochs=3)), uninterrupted)


def test_batches_that_are_dicts(tmp_path):
    data = torch.utils.data.DataLoader(DictData(), batch_size=8)
    model, callback = fit(tmp_path, model=seeded(Dicts), data=data, max_epochs=1)
    assert moved(callback)
    callback.export(str(tmp_path / "out"))


def test_workers_that_persist(tmp_path, uninterrupted):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()), batch_size=8, num_workers=1,
                                       persistent_workers=True)
    assert same(values(*fit(tmp_path, data=data, max_epochs=3)), uninterrupted)


def test_learning_rate_finder(tmp_path):
    from pytorch_lightning.tuner import Tuner

    model, callback = seeded(), LSQQuantizerCallback(bits=4, export_to="")
    runner = trainer(tmp_path, callback, max_epochs=1)
    Tuner(runner).lr_find(model, loader(), num_training=5, attr_name="rate")
    runner.fit(model, loader())
    assert moved(callback)


def test_several_calibration_batches(tmp_path):
    class Stop(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.scales = [p.detach().clone() for p in trainer.callbacks[0].quantizer.scale_parameters()]

    stop = Stop()
    fit(tmp_path, stop, max_epochs=1, callback={"calibration_batches": 3})
    wanted = LSQQuantizer(seeded(), bits=4)
    wanted.calibrate([x for x, _ in loader()][:3])
    assert all(torch.equal(a, b) for a, b in zip(stop.scales, wanted.scale_parameters()))


def test_files_at_the_end_of_fit(tmp_path):
    model, callback = seeded(), LSQQuantizerCallback(bits=4)
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader())
    assert {"Lit.onnx", "Lit.compress_params.bin", "Lit.mnn"} <= set(os.listdir(tmp_path))
    assert callback.deployed.sqnr_db >= 100 and callback.deployed.coverage.fraction == 1.0


def test_a_file_that_computes_something_else_is_called_so(tmp_path, monkeypatch, caplog):
    callback = LSQQuantizerCallback(export_to=str(tmp_path / "out"))
    monkeypatch.setattr(callback, "deploy", lambda stem: Deployed(stem + ".mnn", Coverage(()), 21.5, 100))
    with caplog.at_level(logging.WARNING, "slimtrain"):
        trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1).fit(seeded(), loader())
    assert "agrees with what was trained to 21.5 dB only" in caplog.text


def test_files_hold_the_weights_that_averaging_leaves(tmp_path):
    import onnx
    from pytorch_lightning.callbacks import StochasticWeightAveraging

    model, callback = seeded(), LSQQuantizerCallback(export_to=str(tmp_path / "out"))
    trainer(tmp_path, callback, StochasticWeightAveraging(1e-2, swa_epoch_start=1), max_epochs=3).fit(model, loader())
    layers = {layer.name: layer for layer in callback.quantizer.deployed_layers()}
    found = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer]
    wanted = layers["net.inner"].weight
    assert any(value.shape == wanted.shape and (value == wanted).all() for value in found)


# -- what is refused


def test_averaging_before_the_callback_is_refused(tmp_path):
    from pytorch_lightning.callbacks import WeightAveraging

    callback = LSQQuantizerCallback(export_to="")
    with pytest.raises(RuntimeError, match="put LSQQuantizerCallback before it"):
        trainer(tmp_path, WeightAveraging(), callback).fit(seeded(), loader())
    trainer(tmp_path, callback, WeightAveraging(), max_epochs=1).fit(seeded(), loader())


def test_compiled_model_is_refused(tmp_path):
    model = torch.compile(seeded(), backend="eager")
    with pytest.raises(RuntimeError, match="uncompiled model"):
        trainer(tmp_path, LSQQuantizerCallback(export_to="")).fit(model, loader())


def test_compiled_submodule_is_refused(tmp_path):
    model = seeded()
    model.net.compile(backend="eager")
    with pytest.raises(RuntimeError, match="uncompiled model"):
        trainer(tmp_path, LSQQuantizerCallback(export_to="")).fit(model, loader())


def test_sharded_strategy_is_refused(tmp_path, monkeypatch):
    runner = trainer(tmp_path, LSQQuantizerCallback(export_to=""))

    class FSDPStrategy(type(runner.strategy)):
        pass

    runner.strategy.__class__ = FSDPStrategy
    with pytest.raises(RuntimeError, match="does not work with FSDPStrategy"):
        runner.fit(seeded(), loader())


def test_rebuilt_layers_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="configure_model"):
        fit(tmp_path, model=seeded(Rebuilding), max_epochs=1)


@pytest.mark.parametrize("arguments, message", [
    ({"bits": 1}, "2 to 8"), ({"bits": 9}, "2 to 8"), ({"weight_bits": 0}, "2 to 8"),
    ({"activation_bits": 16}, "2 to 8"),
    ({"mode": "sometimes"}, "'online', 'offline'"), ({"scale_lr_ratio": 0}, "positive"),
    ({"calibration_batches": 0}, "at least 1"),
])
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSQQuantizerCallback(**arguments)


@pytest.mark.parametrize("options, message", [
    ({"module": "nothing"}, "no submodule 'nothing'.*net"),
    ({"skip_quant_layers": ["net.headd"]}, "net.headd"),
    ({"skip_quant_layers": ["*"]}, "nothing to quantize"),
])
def test_bad_names_are_refused_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, callback=options)


def test_no_forward_and_two_parts_are_refused(tmp_path):
    class Two(StepOnly):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="module='net' or 'more'"):
        fit(tmp_path, model=seeded(Two))


def test_failing_step_leaves_nothing(tmp_path):
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            self(batch[0])
            raise ValueError("user")

    with pytest.raises(ValueError, match="user"):
        fit(tmp_path, model=seeded(Failing))
    assert not _get_current_function_mode_stack()


# -- two callbacks, command line, packages


def test_two_callbacks_on_two_submodules(tmp_path):
    class Pair(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            return self.second(self.net(x))

    saver = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(folder, *more, **options):
        one = LSQQuantizerCallback(bits=8, module="net", export_to="")
        two = LSQQuantizerCallback(bits=4, module="second", export_to="")
        model = seeded(Pair)
        ckpt_path = options.pop("ckpt_path", None)
        trainer(folder, one, two, *more, max_epochs=2, **options).fit(model, Resumable(), ckpt_path=ckpt_path)
        return {**values(model, one), **{"two " + k: v for k, v in values(model, two).items()}}

    whole = run(tmp_path)
    run(tmp_path, saver, max_steps=5)
    assert same(run(tmp_path, ckpt_path=str(tmp_path / "step=5.ckpt")), whole)
    second = LSQQuantizer.from_checkpoint(Pair(), tmp_path / "step=5.ckpt", module="second")
    assert second.bits.weight == 4 and list(second.layers) == ["0", "2"]


def test_command_line_builds_the_callback(tmp_path, monkeypatch):
    from pytorch_lightning.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text("""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: %s
  callbacks:
    - class_path: slimtrain.callbacks.LSQQuantizerCallback
      init_args:
        skip_quant_layers: [net.stem]
        weight_bits: 4
        export_to: ""
""" % tmp_path)
    cli = LightningCLI(Lit, FromModule, args=["fit", "--config", str(config)], save_config_callback=None)
    callback = cli.trainer.callbacks[0]
    assert isinstance(callback, LSQQuantizerCallback)
    assert callback.quantizer.bits == (4, 8)
    assert callback.quantizer.coverage().missing[0].name == "net.stem"


FAKED = """
import sys, types
sys.modules.pop("pytorch_lightning", None)
both = sys.argv[1] == "both"
import pytorch_lightning
other = types.ModuleType("lightning"); other.__path__ = []
inner = types.ModuleType("lightning.pytorch"); inner.__path__ = []
inner.Callback = type("Callback", (), {})
inner.utilities = types.ModuleType("lightning.pytorch.utilities")
inner.utilities.CombinedLoader = pytorch_lightning.utilities.CombinedLoader
other.pytorch = inner
sys.modules.update({"lightning": other, "lightning.pytorch": inner, "lightning.pytorch.utilities": inner.utilities})
if not both:
    for name in [n for n in sys.modules if n.partition(".")[0] == "pytorch_lightning"]:
        del sys.modules[name]
from slimtrain.callbacks.lightning_bases import Callback
assert issubclass(Callback, inner.Callback)
assert issubclass(Callback, pytorch_lightning.Callback) == both
"""


@pytest.mark.parametrize("which", ["one", "both"])
def test_base_class_is_that_of_the_imported_package(which):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAKED, which], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "slimtrain")
    fit(tmp_path, max_epochs=1, callback={"debug_info": True})
    assert "set the scales of 4 layers" in caplog.text and "net.inner: weight scales" in caplog.text
