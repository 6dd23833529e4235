"""Which of several callbacks writes the model: one does, and it is the one that holds what the others did."""
from __future__ import annotations

import pytest

from nets import trainer
from slimtrain.callbacks import CompressionReportCallback, LSQQuantizerCallback, from_config

KINDS = {"low": "low_rank:tucker", "prune": "prune:snip", "quantize": "quantize:lsq", "weight": "quantize:weight",
         "lop": "over_parameterize:lop,expand_rate=2"}


def made(*names, **options):
    return [from_config(KINDS[name], report=False, **options)[0] for name in names]


@pytest.mark.parametrize("names, writer", [
    (["low"], 0), (["lop"], 0), (["prune"], 0), (["quantize"], 0), (["low", "prune"], 1), (["prune", "low"], 0),
    (["low", "prune", "quantize"], 2), (["quantize", "prune", "low"], 0),
    (["prune", "weight"], 1), (["low", "weight"], 1)])
def test_one_callback_writes(names, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(LSQQuantizerCallback, "is_ready", lambda callback: True)  # as after a training
    callbacks = made(*names)
    run = trainer(tmp_path, CompressionReportCallback(), *callbacks)
    assert [callback.exports(run) for callback in callbacks] == [index == writer for index in range(len(names))]


def test_a_quantizer_that_never_began_leaves_it_to_the_next(tmp_path, monkeypatch):
    quantizer, pruner = made("quantize", "prune")
    run = trainer(tmp_path, quantizer, pruner)
    monkeypatch.setattr(LSQQuantizerCallback, "is_ready", lambda callback: False)
    assert not quantizer.exports(run)
    assert pruner.exports(run)


def test_one_that_shall_not_write_leaves_it_to_the_next(tmp_path):
    quantizer, pruner = made("quantize", "prune", export_to=str(tmp_path / "m"))
    quantizer.export_to = ""
    run = trainer(tmp_path, quantizer, pruner)
    assert not quantizer.exports(run) and pruner.exports(run)
    assert pruner.stem(run, None) == str(tmp_path / "m")


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    (callback,) = made("quantize")
    run = trainer(tmp_path, callback)
    monkeypatch.setattr(type(run), "is_global_zero", False)
    assert not callback.exports(run)
