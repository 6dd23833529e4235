"""A compression that a model is trained with and deployed by, inside a Lightning Trainer."""
from __future__ import annotations

import logging
import os
from typing import Any, Callable, Dict, Mapping, Optional, Protocol

from torch import nn

from slimtrain.callbacks.callback import example_from_batch
from slimtrain.callbacks.exporting import Deployed, Exported
from slimtrain.callbacks.exporting_callback import ExportingCallback
from slimtrain.callbacks.moments import step_at, training_steps
from slimtrain.core import Coverage, LayerState, Moment, check_window
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)

# operations that MNN approximates in float, such as an erf, stay above it
_SUSPICIOUS_DB = 40.0


class Deployable(Protocol):
    """The object behind such a callback: a simulation on a model, and the way to its files."""

    model: nn.Module

    def attach(self) -> None:
        """Make the model compute as it will be deployed."""

    def detach(self) -> None:
        """Give back the float model."""

    def open_step(self) -> None:
        """A training step begins: what it runs outside any module belongs to the model itself."""

    def close_step(self, finished: bool = True) -> None:
        """A training step has run its forward, or broke off; does nothing when none is open."""

    def coverage(self) -> Coverage:
        """Each parameterised layer and how it is deployed."""

    @property
    def export(self) -> Callable[..., Exported]:
        """Write the files, from a path without suffix and an example input."""

    @property
    def deploy(self) -> Callable[..., Deployed]:
        """Write, convert and compare, from a path without suffix and an example input."""

    def state_dict(self) -> Dict[str, Any]:
        """State as plain tensors, numbers and strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class DeployingCallback(ExportingCallback):
    """Base of the callbacks that simulate the deployed model in training and write it at the end.

    Args:
        module: see :class:`CompressionCallback`.
        export_to: path without suffix of what is written at the end of ``fit``; None for the LightningModule's name
            in the Trainer's log folder, "" for no export.
        export_checkpoints: also export beside every checkpoint.
        begin: until this moment the model is trained in float.
    """

    def __init__(self, module: str = "", export_to: Optional[str] = None, export_checkpoints: bool = False,
                 begin: Moment = 0.0) -> None:
        super().__init__(module, export_to)
        check_window(begin, 1.0)
        self.export_checkpoints = export_checkpoints
        self.begin = begin
        self._begin_step: Optional[float] = None  #: of ``begin``, once the length of the training is known
        self._waits = False  #: whether the model is being trained in float
        self.deployed: Optional[Deployed] = None
        self._quantizer: Any = None

    def make_quantizer(self, model: nn.Module) -> Deployable:
        """The object that this callback drives."""
        raise NotImplementedError

    @property
    def quantizer(self) -> Any:
        """The quantizer of the model.

        Raises:
            RuntimeError: the callback has not been set up yet.
        """
        if self._quantizer is None:
            raise RuntimeError("the callback has no model yet: run trainer.fit, validate or test first")
        return self._quantizer

    def is_ready(self) -> bool:
        """Whether the model computes as it will be deployed, so that it can be written."""
        return not self._waits

    # -- state

    def attach(self, model: nn.Module) -> None:
        if self._quantizer is not None:
            self._quantizer.detach()
        self._quantizer = self.make_quantizer(model)
        self._quantizer.attach()
        self.restart()

    def compression_state(self) -> Dict[str, Any]:
        return {**self.quantizer.state_dict(), "begin_step": self._begin_step, "waits": self._waits}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        self.quantizer.load_state_dict(state)
        self._begin_step, self._waits = state["begin_step"], bool(state["waits"])

    def restart(self) -> None:
        self._begin_step, self._waits = None, False

    # -- what a report says

    def layer_notes(self) -> Dict[str, LayerNote]:
        return {row.name: LayerNote(0.0, row.reason) for row in self.quantizer.coverage().layers}

    # -- when: in float until ``begin``

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._begin_step is None:
            self._begin_step = step_at(trainer, self.begin)
            self._waits = self._begin_step > 0
            total = training_steps(trainer)
            if self._waits and self._begin_step >= total:
                raise ValueError("begin=%r is optimizer step %d, and training ends with step %d: quantization would "
                                 "never begin" % (self.begin, self._begin_step, total))
        self._stay_float()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self._stay_float()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_test_start(trainer, pl_module)
        self._stay_float()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        self._stay_float()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._waits:
            self.quantizer.attach()

    def _stay_float(self) -> None:
        if self._waits:
            self.quantizer.detach()

    def advance(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        """Do what is due before a step of training."""
        if self._waits and trainer.global_step >= (self._begin_step or 0):
            logger.info("the model is quantized from optimizer step %d on", trainer.global_step)
            self.start(trainer, pl_module, batch)

    def start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        """The moment ``begin`` has come, with a batch that the model has not seen yet."""
        self._waits = False
        self.quantizer.attach()

    # -- steps: operations that a step runs outside any module belong to the LightningModule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.remember(example_from_batch(self.quantizer.model, batch))
        self.advance(trainer, pl_module, batch)
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
            self._close(pl_module, finished=False)

    def _open(self, pl_module: Any) -> None:
        self._close(pl_module)
        if self.quantizer.model is pl_module and not self._waits:
            self.quantizer.open_step()

    def _close(self, pl_module: Any, finished: bool = True) -> None:
        if self.quantizer.model is pl_module:
            self.quantizer.close_step(finished)

    # -- files

    export_rank = 2

    def example_model(self) -> nn.Module:
        model: nn.Module = self.quantizer.model
        return model

    def export(self, stem: str, example_input: Any = None, **options: Any) -> Exported:
        """Write ``stem.onnx`` and ``stem.compress_params.bin``; see the quantizer's method.

        Args:
            stem: path without suffix.
            example_input: the model's ``example_input_array`` or first training batch when None.
        """
        return self.quantizer.export(stem, self.example(example_input), **options)

    def deploy(self, stem: str, example_input: Any = None, **options: Any) -> Deployed:
        """Export, convert with MNN and compare with the simulation; see the quantizer's method."""
        return self.quantizer.deploy(stem, self.example(example_input), **options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.is_ready() and self.export_to != "" and trainer.is_global_zero:
            logger.warning("training ended before quantization began (begin=%r): nothing is quantized", self.begin)
        if not self.exports(trainer) or not self.write(trainer, pl_module):
            return
        assert self.deployed is not None
        logger.info("wrote %s: %d bytes, %.0f %% of the weights quantized, %.0f dB against the simulation",
                    self.deployed.mnn, self.deployed.bytes, 100 * _share(self.quantizer.coverage()),
                    self.deployed.sqnr_db)
        if self.deployed.sqnr_db < _SUSPICIOUS_DB:
            logger.warning("what MNN computes from %s agrees with what was trained to %.1f dB only: do not deploy it "
                           "before you know which layer differs; skip_quant_layers keeps layers in float",
                           self.deployed.mnn, self.deployed.sqnr_db)

    def checkpoint_saved(self, trainer: Any, path: str) -> None:
        if self.export_checkpoints and trainer.is_global_zero and self.is_ready():
            self.export(os.path.splitext(path)[0])


def _share(coverage: Coverage) -> float:
    return 1.0 - coverage.share(LayerState.FLOAT)
