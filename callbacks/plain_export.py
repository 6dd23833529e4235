"""From a float model to files: ONNX, an empty parameter file, and a float .mnn checked against the model."""
from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from torch import nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.exporting import Exported, named_inputs
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.callbacks.operations import tensors_in
from slimtrain.core import sqnr_db, write_whole
from slimtrain.proto import convert, run_model, save_parameterless

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class PlainFile(NamedTuple):
    """A converted float model and what was measured on it."""

    mnn: str
    bytes: int
    sqnr_db: float  #: MNN's outputs against the model in evaluation mode, on the example input


def export_plain(model: nn.Module, stem: PathLike, example_input: Any, *, append: bool = False,
                 opset: Optional[int] = None, dynamo: Optional[bool] = None) -> Exported:
    """Write ``stem.onnx`` and ``stem.compress_params.bin``; the model is not touched.

    Args:
        model: the float model.
        stem: path without suffix; its folder is made.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments.
        append: keep the parameter file, of an earlier algorithm, as it is.
        opset, dynamo: see :meth:`LSQQuantizer.export`.

    Raises:
        ConversionError: the model cannot be exported.
        ParameterFileError: there is nothing to append to.
    """
    args, kwargs = arguments(example_input)
    files = Exported("%s.onnx" % os.fspath(stem), "%s.compress_params.bin" % os.fspath(stem))
    os.makedirs(os.path.dirname(os.path.abspath(files.onnx)), exist_ok=True)
    exported = export_float(model, args, kwargs, opset=opset, dynamo=dynamo)
    save_parameterless(files.params, append)
    write_whole(files.onnx, exported.SerializeToString(deterministic=True))
    return files


def deploy_plain(model: nn.Module, stem: PathLike, example_input: Any, **options: Any) -> PlainFile:
    """Export, convert with MNN, run, and compare with the model.

    Raises:
        ConversionError: as :func:`export_plain`; MNN is not installed or failed.
    """
    files = export_plain(model, stem, example_input, **options)
    target = os.path.splitext(files.onnx)[0] + ".mnn"
    conversion = convert(files.onnx, target, files.params)
    args, kwargs = arguments(example_input)
    with unnoticed(model), evaluation(model):
        wanted = [tensor.double().cpu().numpy().ravel() for tensor in tensors_in(model(*args, **kwargs))]
    found = [value.astype(np.float64).ravel() for value in run_model(target, named_inputs(files.onnx, args,
                                                                                          kwargs)).values()]
    return PlainFile(target, conversion.bytes, sqnr_db(np.concatenate(wanted), np.concatenate(found)))
