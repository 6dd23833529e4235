"""Quantization-aware training inside a Lightning Trainer."""
from __future__ import annotations

import contextlib
import logging
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

import torch
from torch import nn

from slimtrain.callbacks.batches import Batch, arguments
from slimtrain.callbacks.callback import compressions, example_from_batch, has_forward
from slimtrain.callbacks.deploying_callback import DeployingCallback
from slimtrain.callbacks.first_batches import first_batches
from slimtrain.callbacks.model_view import passed_inputs
from slimtrain.callbacks.moments import step_at
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.ranks import are_several
from slimtrain.core import Moment, check_window
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)

_FLOAT_BITS = 32


class QuantizerCallback(DeployingCallback):
    """Base of the quantizer callbacks: calibrates before training, simulates during it, exports after it.

    Args:
        module: see :class:`CompressionCallback`.
        calibration_batches: training batches that set the start of the activation scales.
        export_to, export_checkpoints: see :class:`DeployingCallback`.
        begin: until this moment the model is trained in float; then its scales start, from the batch of that moment.
        end: from this moment on scales stay as they are, while weights go on learning.
    """

    def __init__(self, module: str = "", calibration_batches: int = 1, export_to: Optional[str] = None,
                 export_checkpoints: bool = False, begin: Moment = 0.0, end: Moment = 1.0) -> None:
        super().__init__(module, export_to, export_checkpoints, begin)
        check_window(begin, end)
        self.end = end
        self._end_step: Optional[float] = None  #: of ``end``, once the length of the training is known
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

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        present = {id(module) for module in pl_module.modules()}
        gone = [name for name, layer in self.quantizer.layers.items() if id(layer) not in present]
        if gone:
            raise RuntimeError("layers were replaced after the callback was set up (%s): configure_model must make "
                               "them only once (if self.net is None: ...)" % ", ".join(gone))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self._end_step is None:
            self._end_step = step_at(trainer, self.end)
        if self.quantizer.plan is None and not self._waits:
            self._calibrate(trainer, pl_module, first_batches(trainer, pl_module, self.calibration_batches))

    def start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        super().start(trainer, pl_module, batch)
        for optimizer in trainer.optimizers:  # as if the scales were new: under DDP they had gradients of zero
            for scale in self.new_parameters():
                optimizer.state.pop(scale, None)
        more = self.calibration_batches - 1
        self._calibrate(trainer, pl_module, [batch, *(first_batches(trainer, pl_module, more) if more else [])])

    def advance(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        super().advance(trainer, pl_module, batch)
        if self._end_step is not None and trainer.global_step >= self._end_step and not self._waits:
            self.quantizer.freeze_scales()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        learned = [scale for scale in self.new_parameters() if scale.requires_grad]
        if self._waits and learned and are_several():
            # DDP waits for a gradient of every parameter that it knows
            torch.stack([scale.sum() * 0 for scale in learned]).sum().backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.quantizer.frozen:  # whoever clips gradients by their norm shall not count these
            for scale in self.new_parameters():
                scale.grad = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # in the progress bar and the logger: how the weights are computed with now, and whether scales still move
        for name, value in (("bits", _FLOAT_BITS if self._waits else self.quantizer.bits.weight),
                            ("scales_move", not (self._waits or self.quantizer.frozen))):
            pl_module.log(name + (" of " + self.module if self.module else ""), float(value), prog_bar=name == "bits",
                          on_step=True, on_epoch=False, batch_size=1)

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

    def compression_state(self) -> Dict[str, Any]:
        return {**super().compression_state(), "end_step": self._end_step}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        super().load_compression_state(state)
        self._end_step = state["end_step"]

    def restart(self) -> None:
        super().restart()
        self._end_step = None
        self.quantizer.forget()

    def _calibrate(self, trainer: Any, pl_module: Any, batches: List[Any]) -> None:
        """Choose the scales from what the quantized model is given for some batches."""
        with _others_in_float(trainer, self):
            examples = [self.remember(example) for example in model_inputs(self.quantizer, pl_module, batches)]
        count = self.quantizer.calibrate(examples)
        logger.info("set the scales of %d layers from %d inputs", len(self.quantizer.layers), count)


@contextlib.contextmanager
def _others_in_float(trainer: Any, mine: QuantizerCallback) -> Iterator[None]:
    """Quantizers of other submodules that have no scales yet do not watch a run that only looks for inputs."""
    found = [other.quantizer for other in compressions(trainer)
             if isinstance(other, QuantizerCallback) and other is not mine and other.quantizer.plan is None
             and other.quantizer.is_attached]
    for quantizer in found:
        quantizer.detach()
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.attach()


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
