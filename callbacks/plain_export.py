"""From a float model to files: ONNX, an empty parameter file, and a float .mnn checked against the model."""
from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import nn

from slimtrain.callbacks.callback import CompressionCallback, example_from_batch
from slimtrain.callbacks.exporting import Exported, named_inputs
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.callbacks.operations import map_tensors, tensors_in
from slimtrain.callbacks.quantizer import arguments
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


class PlainCallback(CompressionCallback):
    """Base of the callbacks whose result is a float model: writes it at the end of ``fit``.

    Args:
        module: see :class:`CompressionCallback`.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
    """

    def __init__(self, module: str = "", export_to: Optional[str] = None) -> None:
        super().__init__(module)
        self.export_to = export_to
        self.deployed: Optional[PlainFile] = None  #: what the end of ``fit`` wrote, where MNN is installed
        self._example: Any = None

    def deployed_model(self) -> nn.Module:
        """The float model to write, of the same outputs as the trained one in evaluation mode.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._target is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._target

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._example is None and self._target is not None:
            self._example = map_tensors(lambda value: value.detach().cpu(), example_from_batch(self._target, batch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.export_to == "" or not trainer.is_global_zero or _another_exports(trainer, self):
            return
        stem = self.export_to or os.path.join(trainer.log_dir or trainer.default_root_dir, type(pl_module).__name__)
        if importlib.util.find_spec("MNN") is None:
            files = self.export(stem)
            logger.info("wrote %s and %s (MNN is not installed: not converted)", files.onnx, files.params)
            return
        self.deployed = self.deploy(stem)
        logger.info("wrote %s: %d bytes, %.0f dB against the model", *self.deployed)

    def export(self, stem: PathLike, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; see :func:`export_plain`.

        Args:
            stem: path without suffix.
            example_input: the model's ``example_input_array`` or first training batch when None.
        """
        return export_plain(self.deployed_model(), stem, self._example_or(example_input), **options)

    def deploy(self, stem: PathLike, example_input: Any = None, **options: Any) -> PlainFile:
        """Export, convert with MNN and compare with the model; see :func:`deploy_plain`."""
        return deploy_plain(self.deployed_model(), stem, self._example_or(example_input), **options)

    def _example_or(self, given: Any) -> Any:
        model = self.deployed_model()
        array = getattr(model, "example_input_array", None)
        found = next((value for value in (given, array, self._example) if value is not None), None)
        if found is None:
            raise RuntimeError("no example input is known before training: pass example_input, or set "
                               "example_input_array on the model")
        device = next(model.parameters()).device
        return map_tensors(lambda value: torch.as_tensor(value).to(device), found)


def _another_exports(trainer: Any, callback: CompressionCallback) -> bool:
    """Whether a quantizer or pruner writes the model: one file of one model is enough."""
    return any(isinstance(other, CompressionCallback) and not isinstance(other, PlainCallback)
               and getattr(other, "export_to", "") != "" for other in trainer.callbacks)
