"""Offline quantization as a Lightning callback: ``Trainer.validate`` is the calibration."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Optional, Union

from torch import nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.deploying_callback import DeployingCallback
from slimtrain.callbacks.offline_quantizer import OfflineQuantizer
from slimtrain.callbacks.quantizer_callback import model_inputs
from slimtrain.core import ActivationMethod, WeightMethod

logger = logging.getLogger(__name__)


class OfflineQuantizerCallback(DeployingCallback):
    """Quantizes the Trainer's model from the batches of its first ``Trainer.validate``, without training.

    That run computes as the float model, and its metrics are the float model's. At its end the scales are chosen and
    the files are written; every later validation, test or prediction is in simulated int8.

    Args:
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales when they are chosen.
        method: how activations find their scale: "ema", "kl", "admm", "mse" or "max_abs".
        weight_method: how weights find theirs: "max_abs", "admm" or "mse".
        weight_bits: instead of ``bits``.
        activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        equalize: first let layers in a row trade the ranges of their channels, in place.
        correct_bias: give the outputs of quantized layers the mean back that rounding takes.
        adaptive_rounding: round weights by what the layers compute, not to the nearest level.
        module: dotted path of the submodule to compress; "" for the whole model.
        export_to: path without suffix of what is written after calibration; None for the model's name in the
            Trainer's log folder, "" for no export.
    """

    def __init__(self, skip_quant_layers: Optional[List[str]] = None, bits: int = 8, debug_info: bool = False, *,
                 method: Union[str, ActivationMethod] = ActivationMethod.MSE,
                 weight_method: Union[str, WeightMethod] = WeightMethod.MSE, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True, equalize: bool = False,
                 correct_bias: bool = False, adaptive_rounding: bool = False, module: str = "",
                 export_to: Optional[str] = None) -> None:
        super().__init__(module, export_to)
        OfflineQuantizer.check(bits, weight_bits, activation_bits, method, weight_method)
        self._arguments: Dict[str, Any] = {
            "skip_quant_layers": tuple(skip_quant_layers or ()), "bits": bits, "debug_info": debug_info,
            "method": method, "weight_method": weight_method, "weight_bits": weight_bits,
            "activation_bits": activation_bits, "unsigned_activations": unsigned_activations,
            "equalize": equalize, "correct_bias": correct_bias, "adaptive_rounding": adaptive_rounding}
        self._observing = False

    def make_quantizer(self, model: nn.Module) -> OfflineQuantizer:
        return OfflineQuantizer(model, **self._arguments)

    def is_ready(self) -> bool:
        return self.quantizer.plan is not None and not self._observing

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int,
                                  dataloader_idx: int = 0) -> None:
        if self.quantizer.plan is None and trainer.state.fn == "validate":
            inputs = next(iter(model_inputs(self.quantizer, pl_module, [batch])))
            self.quantizer.start_observing(arguments(self.remember(inputs)))
            self._observing = True
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._observing:
            self._observing = False
            self.quantizer.finish_observing()
            super().on_train_end(trainer, pl_module)  # where the base writes the files

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.is_ready():
            super().on_train_end(trainer, pl_module)
        else:
            logger.warning("the model was trained in float and nothing was written: call trainer.validate to calibrate")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._observing:
            self._observing = False
            self.quantizer.forget()
