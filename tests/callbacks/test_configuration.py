"""Callbacks from a pipeline: the same arguments under the same names, and a run that deploys what it trained."""
from __future__ import annotations

import dataclasses
import inspect
from enum import Enum

import pytest
import torch

from mnn_weights import decode
from nets import Lit, loader, trainer
from slimtrain.callbacks import (
    CompressionReportCallback,
    LSQQuantizerCallback,
    SIMDOCPrunerCallback,
    WeightQuantizerCallback,
    from_config,
)
from slimtrain.callbacks.configuration import _CALLBACKS
from slimtrain.core import Kind, PipelineError, load_pipeline
from slimtrain.core.stages import STAGES

STAGE_CLASSES = [stage for kind, known in STAGES.items() if kind is not Kind.EXPORT for stage in known.values()]


@pytest.mark.parametrize("stage", STAGE_CLASSES, ids=lambda stage: stage.__name__)
def test_a_stage_has_the_arguments_and_defaults_of_its_callback(stage):
    parameters = inspect.signature(_CALLBACKS[stage.OBJECT].__init__).parameters
    for field in dataclasses.fields(stage):
        assert field.name in parameters
        default = parameters[field.name].default
        default = default.value if isinstance(default, Enum) else default
        mine = field.default.value if isinstance(field.default, Enum) else field.default
        if field.name == "retain_sparsity":
            continue  # the pipeline decides
        assert (None if mine is dataclasses.MISSING or mine == () else mine) == (
            None if default is inspect.Parameter.empty or default == () else default)


@pytest.mark.parametrize("config, classes", [
    ("prune:simd_oc,sparsity=0.25;quantize:lsq", [SIMDOCPrunerCallback, LSQQuantizerCallback]),
    (load_pipeline("quantize:weight,bits=4"), [WeightQuantizerCallback])])
def test_stages_become_callbacks_in_their_order(config, classes):
    assert [type(callback) for callback in from_config(config)] == [*classes, CompressionReportCallback]
    assert [type(callback) for callback in from_config(config, report=False)] == classes


def test_checkpoints_are_exported_by_quantizers_only():
    assert from_config("quantize:lsq;export:out/m,checkpoints=true")[0].export_checkpoints
    with pytest.raises(PipelineError, match="checkpoints=true needs a quantize stage"):
        from_config("prune:snip;export:out/m,checkpoints=true")
    with pytest.raises(PipelineError, match="did you mean quantize"):
        from_config("quantise:lsq")
    with pytest.raises(PipelineError, match="has a training run of its own"):
        from_config("over_parameterize:lop,expand_rate=2;quantize:lsq")


def test_prune_then_quantize_from_one_file(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text("pipeline:\n- prune: simd_oc\n  sparsity: 0.5\n  total_pruning_iterations: 2\n"
                    "  sensitivity_steps: 1\n  end: 1 epoch\n- quantize: lsq\n- export: %s\n" % (tmp_path / "model"),
                    encoding="utf-8")
    torch.manual_seed(0)
    pruner, quantizer, report = from_config(path)
    trainer(tmp_path, pruner, quantizer, report, max_epochs=2).fit(Lit(), loader())
    assert pruner.pruner.schedule.last_step == 4  # of 8
    deployed = quantizer.deployed
    assert deployed.sqnr_db >= 100 and deployed.coverage.fraction == 1.0
    assert deployed.mnn == str(tmp_path / "model.mnn")
    assert {file.name for file in tmp_path.iterdir()} >= {
        "model.onnx", "model.compress_params.bin", "compression_report.json", "compression_report.html"}
    zeros = sum(int((layer.levels == 0).sum()) for layer in decode(deployed.mnn).values())
    pruned = sum(int((~keep).sum()) for keep in pruner.pruner._numpy_keeps().values())
    assert 0 < pruned <= zeros


def test_unknown_layers_are_refused_before_training(tmp_path):
    run = trainer(tmp_path, *from_config("prune:snip,skip_layers=hed;quantize:lsq"), max_epochs=1)
    with pytest.raises(ValueError, match="no layer matches 'hed'.*head"):
        run.fit(Lit(), loader())
    assert run.global_step == 0
