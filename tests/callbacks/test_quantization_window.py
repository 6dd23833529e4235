"""Quantization that begins in the middle of a training, and scales that stay as they are from its end on."""
from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

import slimtrain.callbacks
from nets import Lit, Resumable, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, LSQQuantizerCallback, SNIPLevelPrunerCallback, WeightQuantizerCallback
from slimtrain.core import LayerState

BATCHES = list(loader())
KINDS = ["LSQQuantizer", "EMAQuantizer", "OAQQuantizer", "WAQQuantizer", "WeightQuantizer"]


def make(kind, **options):
    if kind == "WeightQuantizer":
        options.pop("end", None)
    return getattr(slimtrain.callbacks, kind + "Callback")(bits=4, **{"export_to": "", **options})


class Watch(pl.Callback):
    """Keeps weights, scales and the loss of every step, as they are after it."""

    def __init__(self, quantizing=None) -> None:
        self.quantizing, self.weights, self.scales = quantizing, [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})
        quantizer = getattr(self.quantizing, "_quantizer", None)
        scales = quantizer.scale_parameters() if hasattr(quantizer, "scale_parameters") else []
        self.scales.append([scale.detach().clone() for scale in scales])


class Adam(Lit):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01, weight_decay=0.01)


def fit(folder, quantizing, *callbacks, kind=Lit, ckpt_path=None, **options):
    torch.manual_seed(7)
    model, watch = kind(), Watch(quantizing)
    trainer(folder, *filter(None, [quantizing]), *callbacks, watch, **{"max_epochs": 2, **options}).fit(
        model, Resumable(), ckpt_path=ckpt_path)
    return model, watch


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_trained_in_float_until_then(kind, tmp_path):
    _, plain = fit(tmp_path, None)
    model, watch = fit(tmp_path, make(kind, begin=3))
    assert [same(mine, other) for mine, other in zip(watch.weights, plain.weights)] == [True] * 3 + [False] * 5
    assert not any(name.startswith("slimtrain") for name in model.state_dict())


def test_scales_start_from_the_weights_and_the_batch_of_that_moment(tmp_path):
    quantizing = make("LSQQuantizer", begin=3)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                self.scales = [scale.detach().clone() for scale in quantizing.quantizer.scale_parameters()]

    look = Look()
    _, watch = fit(tmp_path, quantizing, look)
    fresh = Lit()
    fresh.load_state_dict(watch.weights[2])
    wanted = LSQQuantizer(fresh, bits=4)
    wanted.calibrate([BATCHES[3][0]])
    assert all(torch.equal(a, b) for a, b in zip(look.scales, wanted.scale_parameters()))


@pytest.mark.parametrize("optimizer", [Lit, Adam])
@pytest.mark.parametrize("kind", ["LSQQuantizer", "EMAQuantizer", "OAQQuantizer", "WAQQuantizer"])
def test_scales_stay_from_the_end_on_and_weights_do_not(kind, optimizer, tmp_path):
    _, watch = fit(tmp_path, make(kind, begin=0.25, end="1 epoch"), kind=optimizer)  # steps 2 and 4 of 8
    learned = slice(1, None, 2) if kind == "EMAQuantizer" else slice(None)  # the ranges of weights follow the weights
    scales = [step[learned] for step in watch.scales]
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(scales, scales[1:])]
    assert moved[3:] == [False] * 4 and all(moved[1:3])
    assert not any(same(*pair) for pair in zip(watch.weights[3:], watch.weights[4:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3, 4, 6])  # in float; just before it begins; quantized; with fixed scales
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, step, tmp_path):
    window = {"begin": 3, "end": 5}
    whole, watched = fit(tmp_path, make(kind, **window), kind=Adam)
    saver = ModelCheckpoint(str(tmp_path), "part", every_n_train_steps=1, enable_version_counter=False)
    fit(tmp_path, make(kind, **window), saver, Stopping(step), kind=Adam)
    resumed, rest = fit(tmp_path, make(kind, **window), kind=Adam, ckpt_path=str(tmp_path / "part.ckpt"))
    assert same(whole.state_dict(), resumed.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(watched.scales[-1], rest.scales[-1]))


def test_the_progress_bar_says_how_the_model_is_trained(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append((trainer.progress_bar_metrics["bits"], trainer.logged_metrics["scales_move"].item()))

    fit(tmp_path, make("LSQQuantizer", begin=2, end=4), Look())
    assert seen == [(32.0, 0.0)] * 2 + [(4.0, 1.0)] * 2 + [(4.0, 0.0)] * 4


@pytest.mark.parametrize("kind", ["LSQQuantizer", "WeightQuantizer"])
def test_what_was_trained_is_deployed(kind, tmp_path):
    pruner = SNIPLevelPrunerCallback(0.5, 2, sensitivity_steps=1, begin=0, end=2, export_to="")
    quantizing = make(kind, begin=0.5, end=0.75, export_to=str(tmp_path / "model"))
    model, _ = fit(tmp_path, quantizing, pruner)
    assert quantizing.deployed.sqnr_db >= 100 and quantizing.deployed.coverage.share(LayerState.FLOAT) == 0.0
    assert sum(int((module.weight == 0).sum()) for module in model.modules() if isinstance(module, nn.Conv2d)) > 100


@pytest.mark.parametrize("kind", ["LSQQuantizer", "WeightQuantizer"])
def test_a_checkpoint_of_the_float_part_is_evaluated_in_float(kind, tmp_path, caplog):
    saver = ModelCheckpoint(str(tmp_path), "float", every_n_train_steps=1, enable_version_counter=False)
    model, _ = fit(tmp_path, make(kind, begin=3), saver, Stopping(2))
    with caplog.at_level(logging.WARNING):
        runner = trainer(tmp_path, make(kind, begin=3))
        (scores,) = runner.predict(Lit(), loader(8), ckpt_path=str(tmp_path / "float.ckpt"))
    assert torch.equal(scores, model.eval()(images(8)[0])) and "evaluation mode" not in caplog.text


def test_the_other_one_writes_what_was_never_quantized(tmp_path, caplog):
    pruner = SNIPLevelPrunerCallback(0.5, 2, sensitivity_steps=1, begin=0, end=2, export_to=str(tmp_path / "pruned"))
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, make("LSQQuantizer", begin=6, export_to=str(tmp_path / "quantized")), pruner,
            Stopping(3))
    assert "training ended before quantization began (begin=6)" in caplog.text
    assert pruner.deployed is not None and (tmp_path / "pruned.mnn").exists()
    assert not (tmp_path / "quantized.onnx").exists()


class Stopping(pl.Callback):
    def __init__(self, step) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("options, message", [
    ({"begin": 0.5, "end": 0.25}, "end must not lie before begin: 0.25 is before 0.5"),
    ({"begin": 1.0}, "begin must lie before the end of the training, got 1.0"),
    ({"begin": "two epochs"}, "begin must be a step .* got 'two epochs'"),
    ({"end": -1}, "end must be a step .* got -1")])
def test_windows_that_cannot_be_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        LSQQuantizerCallback(**options)


def test_a_begin_behind_the_training_is_refused_before_it(tmp_path):
    with pytest.raises(ValueError, match="begin=8 is optimizer step 8, and training ends with step 8"):
        fit(tmp_path, make("LSQQuantizer", begin=8))
    with pytest.raises(ValueError, match="does not know how long it will train"):
        fit(tmp_path, WeightQuantizerCallback(begin=0.5, export_to=""), max_epochs=-1)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield BATCHES[0]


def test_endless_data_take_steps_and_no_parts(tmp_path):
    def run(**options):
        quantizing = make("LSQQuantizer", **options)
        data = torch.utils.data.DataLoader(Endless(), batch_size=None)
        trainer(tmp_path, quantizing, Stopping(4), max_epochs=1).fit(Lit(), data)
        return quantizing.quantizer

    assert run(begin=1, end=3).frozen and not run().frozen
    with pytest.raises(ValueError, match="does not know how long it will train"):
        run(begin=0.5)


def test_scales_of_a_plain_loop_are_frozen_by_hand():
    torch.manual_seed(0)
    model = Lit().net
    quantizer = LSQQuantizer(model, bits=4)
    with pytest.raises(RuntimeError, match="nothing is known of the activations yet"):
        quantizer.freeze_scales()
    quantizer.convert()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = []
    for step in range(4):
        if step == 2:
            quantizer.freeze_scales()
            before = [scale.detach().clone() for scale in quantizer.scale_parameters()]
        optimizer.zero_grad()
        model(images(4)[0]).square().sum().backward()
        weight = model.inner.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(weight, model.inner.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.scale_parameters()))
    quantizer.strip_qat_ops()
    assert LSQQuantizer.from_state(model, quantizer.state_dict()).frozen


class TwoNets(Lit):
    """Two submodules, each with a callback of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.second(super().forward(x))


def test_two_callbacks_on_two_submodules_say_nothing_untrue(tmp_path, caplog):
    first, second = (LSQQuantizerCallback(module=name, export_to="") for name in ("net", "second"))
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, first, second, max_epochs=1).fit(TwoNets(), loader())
    assert "evaluation mode" not in caplog.text
    assert first.quantizer.plan is not None and second.quantizer.plan is not None
