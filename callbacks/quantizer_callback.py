"""Quantization-aware training inside a Lightning Trainer."""
from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from typing import Any, Dict, Mapping, Optional

from torch import nn

from slimtrain.callbacks.callback import CompressionCallback, example_from_batch
from slimtrain.callbacks.exporting import Deployed, Exported
from slimtrain.callbacks.operations import map_tensors
from slimtrain.callbacks.qat_quantizer import QATQuantizer

logger = logging.getLogger(__name__)


class QuantizerCallback(CompressionCallback):
    """Base of the quantizer callbacks: calibrates before training, simulates during it, exports after it.

    Args:
        module: see :class:`CompressionCallback`.
        calibration_batches: training batches that set the start of the activation scales.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
        export_checkpoints: also export beside every checkpoint.
    """

    def __init__(self, module: str = "", calibration_batches: int = 1, export_to: Optional[str] = None,
                 export_checkpoints: bool = False) -> None:
        super().__init__(module)
        if calibration_batches < 1:
            raise ValueError("calibration_batches must be at least 1, got %r" % calibration_batches)
        self.calibration_batches = calibration_batches
        self.export_to = export_to
        self.export_checkpoints = export_checkpoints
        self.deployed: Optional[Deployed] = None   #: what the end of ``fit`` wrote, where MNN is installed
        self._quantizer: Optional[QATQuantizer] = None
        self._example: Any = None

    def make_quantizer(self, model: nn.Module) -> QATQuantizer:
        """The object that this callback drives."""
        raise NotImplementedError

    @property
    def quantizer(self) -> QATQuantizer:
        """The quantizer of the model.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._quantizer is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._quantizer

    # -- state

    def attach(self, model: nn.Module) -> None:
        if self._quantizer is not None:
            self._quantizer.detach()
        self._quantizer = self.make_quantizer(model)
        self._quantizer.convert()

    def compression_state(self) -> Dict[str, Any]:
        return self.quantizer.state_dict()

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        self.quantizer.load_state_dict(state)

    # -- the float model in the sanity check, calibration before the first step

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        if self.quantizer.plan is None:
            self.quantizer.detach()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self.quantizer.attach()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.quantizer.plan is None:
            batches = itertools.islice(iter(trainer.train_dataloader), self.calibration_batches)
            examples = (self._remember(self._on_device(trainer, pl_module, batch)) for batch in batches)
            count = self.quantizer.calibrate(examples)
            logger.info("set the scales of %d layers from %d training batches", len(self.quantizer.layers), count)

    def _on_device(self, trainer: Any, pl_module: Any, batch: Any) -> Any:
        return example_from_batch(self.quantizer.model, trainer.strategy.batch_to_device(batch, pl_module.device))

    def _remember(self, example: Any) -> Any:
        if self._example is None:
            self._example = map_tensors(lambda value: value.detach().cpu(), example)
        return example

    # -- steps: operations that a step runs outside any module belong to the LightningModule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._remember(example_from_batch(self.quantizer.model, batch))
        self._open(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._close(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close(pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int,
                                  dataloader_idx: int = 0) -> None:
        self._open(pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:
        self._close(pl_module)

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int,
                            dataloader_idx: int = 0) -> None:
        self._open(pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                          dataloader_idx: int = 0) -> None:
        self._close(pl_module)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int,
                               dataloader_idx: int = 0) -> None:
        self._open(pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                             dataloader_idx: int = 0) -> None:
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._quantizer is not None:
            self._close(pl_module)

    def _open(self, pl_module: Any) -> None:
        self._close(pl_module)
        if self.quantizer.model is pl_module:
            self.quantizer.open_step()

    def _close(self, pl_module: Any) -> None:
        if self.quantizer.model is pl_module:
            self.quantizer.close_step()

    # -- files

    def export(self, stem: str, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; see :meth:`LSQQuantizer.export`.

        Args:
            stem: path without suffix.
            example_input: the model's ``example_input_array`` or first training batch when None.
        """
        return self.quantizer.export(stem, self._example_or(example_input), **options)

    def deploy(self, stem: str, example_input: Any = None, **options: Any) -> Deployed:
        """Export, convert with MNN and compare with the simulation; see :meth:`LSQQuantizer.deploy`."""
        return self.quantizer.deploy(stem, self._example_or(example_input), **options)

    def _example_or(self, given: Any) -> Any:
        array = getattr(self.quantizer.model, "example_input_array", None)
        found = next((value for value in (given, array, self._example) if value is not None), None)
        if found is None:
            raise RuntimeError("no example input is known before training: pass example_input, or set "
                               "example_input_array on the model")
        device = next(self.quantizer.model.parameters()).device
        return map_tensors(lambda value: value.to(device), found)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.export_to == "" or not trainer.is_global_zero:
            return
        stem = self.export_to or os.path.join(trainer.log_dir or trainer.default_root_dir, type(pl_module).__name__)
        if importlib.util.find_spec("MNN") is None:
            files = self.export(stem)
            logger.info("wrote %s and %s (MNN is not installed: not converted)", files.onnx, files.params)
            return
        self.deployed = self.deploy(stem)
        logger.info("wrote %s: %d bytes, %.0f %% of the weights in int8, %.0f dB against the simulation",
                    self.deployed.mnn, self.deployed.bytes, 100 * self.deployed.coverage.fraction,
                    self.deployed.sqnr_db)

    def checkpoint_saved(self, trainer: Any, path: str) -> None:
        if self.export_checkpoints and trainer.is_global_zero and self.quantizer.plan is not None:
            self.export(os.path.splitext(path)[0])
