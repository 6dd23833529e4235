"""Learned step size quantization (Esser et al., arXiv 1902.08153) of PyTorch models."""
from __future__ import annotations

from enum import Enum
from typing import Any, Collection, Dict, Iterable, Mapping, Optional, Union

from torch import nn

from slimtrain.callbacks.batches import Batch
from slimtrain.callbacks.observing import Observing, observations_of, observations_state
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.recording import Plan
from slimtrain.core import ActivationMethod, activation_grid, weight_grid


class Mode(Enum):
    """How scales are found."""

    ONLINE = "online"    #: learned by gradient
    OFFLINE = "offline"  #: chosen from the data that flow through the model


class LSQQuantizer(QATQuantizer):
    """Trains a model in simulated int8 (or narrower), learning the scale of every tensor by gradient.

    ``quant_model = LSQQuantizer(model).convert()`` returns the same model object, ready for an ordinary training loop;
    make the optimizer from its parameters afterwards.

    Args:
        model: a float model, best a trained one.
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales as they start.
        mode: ``"online"`` learns scales in training; ``"offline"`` takes them from the data that flow through the
            model (leave ``optimizer.step()`` out), in training mode, or in evaluation mode if nothing else came.
        retain_sparsity: weights that are zero now stay zero.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        scale_lr_ratio: learning rate of the scales over that of their parameter group.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, an unknown mode or layer name, nothing to quantize.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str] = (), bits: int = 8,
                 debug_info: bool = False, mode: Union[str, Mode] = Mode.ONLINE, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, scale_lr_ratio: float = 1.0) -> None:
        self.check(bits, weight_bits, activation_bits, mode, scale_lr_ratio)
        self.mode = _mode(mode)
        super().__init__(model, skip_quant_layers, bits if weight_bits is None else weight_bits,
                         bits if activation_bits is None else activation_bits,
                         unsigned_activations=unsigned_activations, retain_sparsity=retain_sparsity,
                         scale_lr_ratio=scale_lr_ratio, debug_info=debug_info)
        self._trained = False
        if self.mode is Mode.OFFLINE:
            for scale in self.scale_parameters():
                scale.requires_grad_(False)

    @staticmethod
    def check(bits: int, weight_bits: Optional[int], activation_bits: Optional[int], mode: Union[str, Mode],
              scale_lr_ratio: float) -> None:
        """Check arguments before there is a model.

        Raises:
            ValueError: as the constructor.
        """
        weight_grid(bits if weight_bits is None else weight_bits)
        activation_grid(bits if activation_bits is None else activation_bits)
        _mode(mode)
        if scale_lr_ratio <= 0:
            raise ValueError("scale_lr_ratio must be positive, got %r" % scale_lr_ratio)

    def configuration(self) -> Dict[str, Any]:
        return {**super().configuration(), "mode": self.mode.value}

    def starts_now(self) -> bool:
        return self.mode is Mode.OFFLINE or super().starts_now()

    def calibrate(self, batches: Iterable[Any]) -> int:
        count = super().calibrate(batches)
        self._trained = True
        return count

    def make_calibration(self, plan: Plan) -> Any:
        if self.mode is Mode.ONLINE:
            return super().make_calibration(plan)
        return Observing(self.modules(), plan, ActivationMethod.MSE)

    def start_from(self, batch: Batch) -> None:
        """Choose all scales from one batch; offline, the run that it is given to counts it again, and not this one."""
        trained = self._trained
        super().start_from(batch)
        self._trained, self.seen = trained, {}
        self.simulate_from_now()

    def simulate_from_now(self) -> None:
        """From the next run on, the model computes as it will be deployed; offline it goes on choosing scales, too."""
        super().simulate_from_now()
        if self.mode is Mode.OFFLINE:
            self._tracker.handler = Observing(self.modules(), self.known_plan(), ActivationMethod.MSE,
                                              self._observes, self.seen)

    def _observes(self) -> bool:
        self._trained = self._trained or self.model.training
        return not self.frozen and (self.model.training or not self._trained)

    def state_dict(self) -> Dict[str, Any]:
        handler = self._tracker.handler
        seen = handler.counted() if isinstance(handler, Observing) else {}
        return {**super().state_dict(), "seen": observations_state(seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = observations_of(state["seen"])
        self._trained = bool(state["plan"])
        super().load_state_dict(state)


def _mode(value: Union[str, Mode]) -> Mode:
    try:
        return Mode(value)
    except ValueError as error:
        known = ", ".join(repr(mode.value) for mode in Mode)
        raise ValueError("mode must be one of %s, got %r" % (known, value)) from error
