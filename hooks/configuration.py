"""Hooks from a pipeline: one file, or one line for a flag, in the place of constructors."""
from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Sequence, Type, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import Kind, Pipeline, Stage, load_pipeline, step_of
from slimtrain.core.stages import OverParameterize, Quantize
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.lop_hook import LOPHook
from slimtrain.hooks.low_rank_hook import LowRankDecompositionHook
from slimtrain.hooks.pruner_hooks import SIMDOCPrunerHook, SNIPLevelPrunerHook, TaylorFOChannelPrunerHook
from slimtrain.hooks.quantizer_hooks import EMAQuantizerHook, LSQQuantizerHook, OAQQuantizerHook, WAQQuantizerHook
from slimtrain.hooks.report_hook import CompressionReportHook
from slimtrain.hooks.weight_quantizer_hook import WeightQuantizerHook

PathLike = Union[str, "os.PathLike[str]"]

_HOOKS: Dict[str, Type[ExportingHook]] = {
    "EMAQuantizer": EMAQuantizerHook,
    "LOP": LOPHook,
    "LSQQuantizer": LSQQuantizerHook,
    "LowRankDecomposition": LowRankDecompositionHook,
    "OAQQuantizer": OAQQuantizerHook,
    "SIMDOCPruner": SIMDOCPrunerHook,
    "SNIPLevelPruner": SNIPLevelPrunerHook,
    "TaylorFOChannelPruner": TaylorFOChannelPrunerHook,
    "WAQQuantizer": WAQQuantizerHook,
    "WeightQuantizer": WeightQuantizerHook,
}


def from_config(path_or_text: Union[PathLike, Pipeline], *, output_names: Sequence[str],
                export_to: Optional[str] = None, graph: Optional[tf.Graph] = None, train_steps: Optional[int] = None,
                epoch_steps: Optional[float] = None, init_checkpoint: Optional[str] = None,
                checkpoint_dir: Optional[str] = None, is_training: Optional[bool] = None,
                is_chief: bool = True, report: bool = False) -> List[tf.train.SessionRunHook]:
    """The hooks of a pipeline, for ``MonitoredTrainingSession(hooks=...)``.

    Call it after the model is built, and before the optimizer and the session.

    Args:
        path_or_text: a pipeline file, its text, its one-line form, or the pipeline itself; see
            :func:`slimtrain.core.load_pipeline`. ``slimtrain.callbacks.from_config`` takes the same.
        output_names: what leaves the network.
        export_to: path without suffix of the files, instead of the pipeline's own.
        graph: the forward graph; None for the default graph.
        train_steps: global steps of the whole training, where the pipeline speaks of parts of it.
        epoch_steps: global steps of an epoch, where it speaks of epochs.
        init_checkpoint: float weights that a fresh run starts from; a low-rank stage needs them.
        checkpoint_dir: the session's own folder, from which a low-rank stage resumes.
        is_training: None for a placeholder that hooks feed; see the quantizers.
        is_chief: whether this process exports and takes decisions, as given to the session.
        report: add a :class:`CompressionReportHook`, which converts the model when the session ends.

    Raises:
        PipelineError: the pipeline cannot work; one line that names the place and the mend.
        ValueError: ``train_steps`` or ``epoch_steps`` is missing; otherwise as the hooks.
    """
    pipeline = (path_or_text if isinstance(path_or_text, Pipeline) else load_pipeline(path_or_text)).one_run()
    folder, name = os.path.split(pipeline.export.to if export_to is None else export_to)
    common: Dict[str, Any] = {"graph": graph if graph is not None else tf.get_default_graph(), "is_chief": is_chief,
                              "output_names": output_names, "export_dir": folder or None}
    hooks = []
    for number, stage in enumerate(pipeline.stages):
        arguments = {**common, **stage.arguments(), **_start(stage, number == 0, init_checkpoint, checkpoint_dir)}
        if stage.KIND is Kind.PRUNE:
            arguments["prune_ratio_result_file"] = arguments.pop("result_file")  # the seed's name for TensorFlow
        if stage.KIND in (Kind.PRUNE, Kind.QUANTIZE):
            arguments.update(_moments(stage, train_steps, epoch_steps))
        if isinstance(stage, (Quantize, OverParameterize)):
            arguments["is_training"] = is_training
        hook = _HOOKS[stage.OBJECT](**arguments)
        hook.final_name = name or hook.final_name
        hooks.append(hook)
    return [*hooks, CompressionReportHook(hooks, is_chief=is_chief)] if report else list(hooks)


def _moments(stage: Stage, train_steps: Optional[int], epoch_steps: Optional[float]) -> Dict[str, Any]:
    """A hook knows global steps and parts of the training; epochs become steps here."""
    moments = {name: getattr(stage, name) for name in ("begin", "end") if hasattr(stage, name)}
    return {"train_steps": train_steps, **{
        name: step_of(moment, 0, epoch_steps) if isinstance(moment, str) else moment
        for name, moment in moments.items()}}


def _start(stage: Stage, is_first: bool, init_checkpoint: Optional[str],
           checkpoint_dir: Optional[str]) -> Dict[str, Any]:
    """Where the weights come from: the first hook restores them, and the others find them restored."""
    if stage.KIND is Kind.LOW_RANK:
        return {"weight_npy_file": init_checkpoint, "checkpoint_dir": checkpoint_dir}
    return {"init_checkpoint": init_checkpoint} if is_first and init_checkpoint is not None else {}
