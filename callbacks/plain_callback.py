"""The callbacks whose result is a float model."""
from __future__ import annotations

import logging
from typing import Any

from torch import nn

from slimtrain.callbacks.callback import example_from_batch
from slimtrain.callbacks.exporting import Exported
from slimtrain.callbacks.exporting_callback import ExportingCallback, PathLike
from slimtrain.callbacks.plain_export import PlainFile, deploy_plain, export_plain

logger = logging.getLogger(__name__)


class PlainCallback(ExportingCallback):
    """Base of the callbacks whose result is a float model: writes it at the end of ``fit``.

    Args:
        module: see :class:`CompressionCallback`.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
    """

    def deployed_model(self) -> nn.Module:
        """The float model to write, of the same outputs as the trained one in evaluation mode.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._target is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._target

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._target is not None:
            self.remember(example_from_batch(self._target, batch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.exports(trainer) and self.write(trainer, pl_module):
            logger.info("wrote %s: %d bytes, %.0f dB against the model", *self.deployed)

    def example_model(self) -> nn.Module:
        return self.deployed_model()

    def export(self, stem: PathLike, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; see :func:`export_plain`.

        Args:
            stem: path without suffix.
            example_input: the model's ``example_input_array`` or first training batch when None.
        """
        return export_plain(self.deployed_model(), stem, self.example(example_input), **options)

    def deploy(self, stem: PathLike, example_input: Any = None, **options: Any) -> PlainFile:
        """Export, convert with MNN and compare with the model; see :func:`deploy_plain`."""
        return deploy_plain(self.deployed_model(), stem, self.example(example_input), **options)
