"""Callbacks from a pipeline: one file, or one line for a flag, in the place of constructors."""
from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any, Dict, List, Optional, Type, Union

from slimtrain.callbacks.callback import CompressionCallback
from slimtrain.callbacks.ema_callback import EMAQuantizerCallback
from slimtrain.callbacks.lightning_bases import Callback
from slimtrain.callbacks.lop_callback import LOPCallback
from slimtrain.callbacks.low_rank_callback import LowRankDecompositionCallback
from slimtrain.callbacks.lsq_callback import LSQQuantizerCallback
from slimtrain.callbacks.oaq_callback import OAQQuantizerCallback
from slimtrain.callbacks.report_callback import CompressionReportCallback
from slimtrain.callbacks.simd_oc_callback import SIMDOCPrunerCallback
from slimtrain.callbacks.snip_callback import SNIPLevelPrunerCallback
from slimtrain.callbacks.taylor_fo_callback import TaylorFOChannelPrunerCallback
from slimtrain.callbacks.waq_callback import WAQQuantizerCallback
from slimtrain.callbacks.weight_quantizer_callback import WeightQuantizerCallback
from slimtrain.core import Kind, Pipeline, PipelineError, Stage, load_pipeline

_CALLBACKS: Dict[str, Type[CompressionCallback]] = {
    "EMAQuantizer": EMAQuantizerCallback,
    "LOP": LOPCallback,
    "LSQQuantizer": LSQQuantizerCallback,
    "LowRankDecomposition": LowRankDecompositionCallback,
    "OAQQuantizer": OAQQuantizerCallback,
    "SIMDOCPruner": SIMDOCPrunerCallback,
    "SNIPLevelPruner": SNIPLevelPrunerCallback,
    "TaylorFOChannelPruner": TaylorFOChannelPrunerCallback,
    "WAQQuantizer": WAQQuantizerCallback,
    "WeightQuantizer": WeightQuantizerCallback,
}

_DRAWING = ("jinja2", "matplotlib")

#: the stages whose callbacks write files beside checkpoints
_WITH_CHECKPOINTS = (Kind.QUANTIZE,)


def from_config(path_or_text: Union[str, os.PathLike[str], Pipeline], *, module: str = "",
                export_to: Optional[str] = None, report: bool = True) -> List[Callback]:
    """The callbacks of a pipeline, for ``Trainer(callbacks=[...])``.

    Args:
        path_or_text: a pipeline file, its text, its one-line form, or the pipeline itself; see
            :func:`slimtrain.core.load_pipeline`. ``slimtrain.hooks.from_config`` takes the same.
        module: dotted path of the submodule to compress; "" for the whole LightningModule.
        export_to: path without suffix of the files, instead of the pipeline's own.
        report: add a :class:`CompressionReportCallback`, with a page where the extra ``report`` is installed.

    Raises:
        PipelineError: the pipeline cannot work; one line that names the place and the mend.
    """
    pipeline = (path_or_text if isinstance(path_or_text, Pipeline) else load_pipeline(path_or_text)).one_run()
    if pipeline.export.checkpoints and pipeline.last.KIND not in _WITH_CHECKPOINTS:
        raise PipelineError("export: checkpoints=true needs a quantize stage: its callback exports beside checkpoints")
    if export_to is not None:
        pipeline = dataclasses.replace(pipeline, export=dataclasses.replace(pipeline.export, to=export_to))
    callbacks: List[Callback] = [_CALLBACKS[stage.OBJECT](**_arguments(stage, pipeline), module=module)
                                 for stage in pipeline.stages]
    if report:
        callbacks.append(CompressionReportCallback(html=all(importlib.util.find_spec(name) for name in _DRAWING)))
    return callbacks


def _arguments(stage: Stage, pipeline: Pipeline) -> Dict[str, Any]:
    # callbacks agree among themselves on the one that writes the files
    arguments = {**stage.arguments(), "export_to": pipeline.export.to or None}
    if stage.KIND in _WITH_CHECKPOINTS:
        arguments["export_checkpoints"] = pipeline.export.checkpoints
    return arguments
