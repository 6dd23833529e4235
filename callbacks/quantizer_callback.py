"""Quantization-aware training inside a Lightning Trainer."""
from __future__ import annotations

import logging
from typing import Any, Dict, Iterable, List, Optional

from torch import nn

from slimtrain.callbacks.callback import example_from_batch, has_forward
from slimtrain.callbacks.deploying_callback import DeployingCallback
from slimtrain.callbacks.first_batches import first_batches
from slimtrain.callbacks.model_view import passed_inputs
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.quantizer import Batch, arguments
from slimtrain.proto.conversion_report import LayerNote

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

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        present = {id(module) for module in pl_module.modules()}
        gone = [name for name, layer in self.quantizer.layers.items() if id(layer) not in present]
        if gone:
            raise RuntimeError("layers were replaced after the callback was set up (%s): configure_model must make "
                               "them only once (if self.net is None: ...)" % ", ".join(gone))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.quantizer.plan is None:
            examples = [self.remember(example) for example in self._examples(trainer, pl_module)]
            count = self.quantizer.calibrate(examples)
            logger.info("set the scales of %d layers from %d inputs", len(self.quantizer.layers), count)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._quantizer is not None:
            self._quantizer.restore_optimizers()

    def progress(self) -> Dict[str, float]:
        """The scale of each layer's input and output."""
        if self._quantizer is None or self._quantizer.plan is None:
            return {}
        owners = dict.fromkeys(owner for call in self._quantizer.plan.calls for owner in (call.input, call.output))
        return {"scale: %s of %s" % (owner.role.value, owner.layer):
                self._quantizer.scales[owner.layer].activation_scale(owner.role).item() for owner in owners}

    def layer_notes(self) -> Dict[str, LayerNote]:
        bits = self.quantizer.bits
        narrow = "trained on %d-bit weights, %d-bit activations" % (bits.weight, bits.activation)
        return {name: note if note.note else note._replace(note=narrow) for name, note in super().layer_notes().items()}

    def new_parameters(self) -> List[nn.Parameter]:
        return list(self.quantizer.scale_parameters())

    def restart(self) -> None:
        self.quantizer.forget()

    def _examples(self, trainer: Any, pl_module: Any) -> List[Any]:
        """Inputs of the quantized model, from the first training batches."""
        return model_inputs(self.quantizer, pl_module, first_batches(trainer, pl_module, self.calibration_batches))


def model_inputs(quantizer: QATQuantizer, pl_module: Any, batches: Iterable[Any]) -> List[Any]:
    """What the quantized model is given for batches of its LightningModule."""
    model = quantizer.model
    if model is pl_module or not has_forward(pl_module):
        return [example_from_batch(model, batch) for batch in batches]
    quantizer.detach()
    examples = [Batch(*inputs) for batch in batches
                for inputs in passed_inputs(pl_module, model, *arguments(example_from_batch(pl_module, batch)))]
    quantizer.attach()
    return examples
