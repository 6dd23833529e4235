"""A compression callback that writes files at the end of ``fit``: from which input, to which place, and who does it."""
from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any, Optional, Union

import torch
from torch import nn

from slimtrain.callbacks.callback import CompressionCallback, compressions
from slimtrain.callbacks.exporting import Exported
from slimtrain.callbacks.operations import map_tensors

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class ExportingCallback(CompressionCallback):
    """Base of the callbacks that export.

    Where several callbacks of a Trainer could write one model, the one with the highest :attr:`export_rank` does: what
    is quantized holds what was pruned, and what is pruned what was decomposed.

    Args:
        module: see :class:`CompressionCallback`.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
    """

    export_rank = 0

    def __init__(self, module: str = "", export_to: Optional[str] = None) -> None:
        super().__init__(module)
        self.export_to = export_to
        self.deployed: Any = None  #: what the end of ``fit`` wrote, where MNN is installed
        self._example: Any = None

    def example_model(self) -> nn.Module:
        """The model that an example is an input of."""
        raise NotImplementedError

    def export(self, stem: str, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``."""
        raise NotImplementedError

    def deploy(self, stem: str, example_input: Any = None, **options: Any) -> Any:
        """Export, convert with MNN, run and compare."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Whether there is a compressed model to write."""
        return True

    def exports(self, trainer: Any) -> bool:
        """Whether this callback writes the model at the end of ``fit``."""
        if self.export_to == "" or not trainer.is_global_zero or not self.is_ready():
            return False
        others = [other for other in compressions(trainer) if isinstance(other, ExportingCallback)]
        return not any(other.export_to != "" and other.is_ready() and other.export_rank > self.export_rank
                       for other in others)

    def stem(self, trainer: Any, pl_module: Any) -> str:
        """Path without suffix of the files."""
        return self.export_to or os.path.join(trainer.log_dir or trainer.default_root_dir, type(pl_module).__name__)

    def write(self, trainer: Any, pl_module: Any) -> bool:
        """Write the files, and the ``.mnn`` where MNN is installed; returns whether it is there."""
        stem = self.stem(trainer, pl_module)
        if importlib.util.find_spec("MNN") is None:
            files = self.export(stem)
            logger.info("wrote %s and %s (MNN is not installed: not converted)", files.onnx, files.params)
            return False
        self.deployed = self.deploy(stem)
        return True

    def remember(self, example: Any) -> Any:
        """Keep the first example that comes, for the export; returns it."""
        if self._example is None:
            self._example = map_tensors(lambda value: value.detach().cpu(), example)
        return example

    def example(self, given: Any = None) -> Any:
        """An input of the model, on its device: the given one, its ``example_input_array``, or a remembered one.

        Raises:
            RuntimeError: none is known before training.
        """
        model = self.example_model()
        array = getattr(model, "example_input_array", None)
        found = next((value for value in (given, array, self._example) if value is not None), None)
        if found is None:
            raise RuntimeError("no example input is known before training: pass example_input, or set "
                               "example_input_array on the model")
        device = next(model.parameters()).device
        return map_tensors(lambda value: torch.as_tensor(value).to(device), found)
