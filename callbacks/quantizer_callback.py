"""Quantization-aware training inside a Lightning Trainer."""
from __future__ import annotations

import itertools
import logging
from typing import Any, Optional

from torch import nn

from slimtrain.callbacks.callback import example_from_batch
from slimtrain.callbacks.deploying_callback import DeployingCallback
from slimtrain.callbacks.qat_quantizer import QATQuantizer

logger = logging.getLogger(__name__)


class QuantizerCallback(DeployingCallback):
    """Base of the quantizer callbacks: calibrates before training, simulates during it, exports after it.

    Args:
        module: see :class:`CompressionCallback`.
        calibration_batches: training batches that set the start of the activation scales.
        export_to, export_checkpoints: see :class:`DeployingCallback`.
    """

    def __init__(self, module: str = "", calibration_batches: int = 1, export_to: Optional[str] = None,
                 export_checkpoints: bool = False) -> None:
        super().__init__(module, export_to, export_checkpoints)
        if calibration_batches < 1:
            raise ValueError("calibration_batches must be at least 1, got %r" % calibration_batches)
        self.calibration_batches = calibration_batches

    def make_quantizer(self, model: nn.Module) -> QATQuantizer:
        raise NotImplementedError

    def is_ready(self) -> bool:
        return self.quantizer.plan is not None

    # -- the float model in the sanity check, calibration before the first step

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        if self.quantizer.plan is None:
            self.quantizer.detach()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self.quantizer.attach()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.quantizer.plan is None:
            batches = itertools.islice(iter(trainer.train_dataloader), self.calibration_batches)
            examples = (self.remember(self._on_device(trainer, pl_module, batch)) for batch in batches)
            count = self.quantizer.calibrate(examples)
            logger.info("set the scales of %d layers from %d training batches", len(self.quantizer.layers), count)

    def _on_device(self, trainer: Any, pl_module: Any, batch: Any) -> Any:
        return example_from_batch(self.quantizer.model, trainer.strategy.batch_to_device(batch, pl_module.device))
