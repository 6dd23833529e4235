"""From a pruned model to files: ONNX, parameters, and a .mnn whose zeros take no room."""
from __future__ import annotations

import os
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import onnx

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.exporting import Exported, named_inputs
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.callbacks.pruner import Pruner
from slimtrain.callbacks.shrinking import save_channel_plan
from slimtrain.callbacks.taylor_fo_pruner import TaylorFOChannelPruner
from slimtrain.core import sqnr_db, write_whole
from slimtrain.proto import ConvertOptions, convert, run_model
from slimtrain.proto.onnx_check import run_onnx

PathLike = Union[str, "os.PathLike[str]"]


class PrunedFile(NamedTuple):
    """A converted pruned model and what was measured on it."""

    mnn: str
    bytes: int
    sparsity: float   #: share of the prunable weights that is zero, or gone
    sqnr_db: float    #: MNN's outputs against the float ONNX model; what storing weights in few bits costs


def export_pruned(pruner: Pruner, stem: PathLike, example_input: Any, *, append: bool = False,
                  opset: Optional[int] = None, dynamo: Optional[bool] = None) -> Exported:
    """Write ``stem.onnx`` and ``stem.compress_params.bin``; the training model is not touched.

    Channel pruning exports the model without its pruned channels, and ``stem.channels.json``, from which
    :func:`slimtrain.callbacks.load_shrunk` rebuilds it.

    Args:
        pruner: after its last event.
        stem: path without suffix; its folder is made.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments.
        append: keep the other algorithms that the parameter file holds already.
        opset, dynamo: see :meth:`LSQQuantizer.export`.

    Raises:
        RuntimeError: nothing has been pruned yet.
        ConversionError: the model cannot be exported.
    """
    args, kwargs = arguments(example_input)
    exported = Exported("%s.onnx" % os.fspath(stem), "%s.compress_params.bin" % os.fspath(stem))
    os.makedirs(os.path.dirname(os.path.abspath(exported.onnx)), exist_ok=True)
    pruner.apply()
    deployed = pruner.shrink() if isinstance(pruner, TaylorFOChannelPruner) else pruner.model
    model = export_float(deployed, args, kwargs, opset=opset, dynamo=dynamo)
    pruner.save_compress_params(exported.params, append)
    if isinstance(pruner, TaylorFOChannelPruner):
        save_channel_plan("%s.channels.json" % os.fspath(stem), pruner.plan())
    write_whole(exported.onnx, model.SerializeToString(deterministic=True))
    return exported


def deploy_pruned(pruner: Pruner, stem: PathLike, example_input: Any, *, weight_bits: int = 8,
                  **options: Any) -> PrunedFile:
    """Export, convert with MNN without storing zeros, run, and compare with the exported model.

    Args:
        pruner, stem, example_input, options: as :func:`export_pruned`.
        weight_bits: store weights in so many bits (symmetric, so that zeros stay zero); 0 for floats.

    Raises:
        ConversionError: as :func:`export_pruned`; MNN is not installed or failed.
    """
    exported = export_pruned(pruner, stem, example_input, **options)
    target = os.path.splitext(exported.onnx)[0] + ".mnn"
    conversion = convert(exported.onnx, target, exported.params, ConvertOptions(weight_bits=weight_bits, sparse=True))
    args, kwargs = arguments(example_input)
    inputs = named_inputs(exported.onnx, args, kwargs)
    wanted = run_onnx(onnx.load(exported.onnx), inputs)
    found = run_model(target, inputs)
    reference = np.concatenate([value.ravel() for value in wanted])
    actual = np.concatenate([value.ravel() for value in found.values()])
    return PrunedFile(target, conversion.bytes, pruner.sparsity, sqnr_db(reference, actual))
