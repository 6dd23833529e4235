"""Offline quantization of a PyTorch model: scales from data that flow through it, without training."""
from __future__ import annotations

import logging
from typing import Any, Collection, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import numpy as np
from torch import nn

from slimtrain.callbacks.batches import Batch, arguments
from slimtrain.callbacks.equalization import ChainRecorder, equalize
from slimtrain.callbacks.layer_scales import LayerScales, average_activation_scales
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.observing import (
    FloatObserving,
    Observations,
    observations_of,
    observations_state,
    observed_batches,
)
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.receptive_moments import MomentObserving, averaged_over_ranks
from slimtrain.callbacks.rounded_scales import RoundedScales
from slimtrain.core import (
    ActivationMethod,
    Grid,
    WeightMethod,
    activation_grid,
    calibrated_scale,
    method_of,
    round_weight,
    weight_grid,
    weight_scales,
)
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)


class OfflineQuantizer(QATQuantizer):
    """Quantizes a trained model from data: ``calibrate(batches)``, then ``simulate``, ``export`` or ``deploy``.

    The model runs in evaluation mode, in float, and each tensor that will carry a scale is observed: its range
    exactly, its distribution as a histogram, in memory that does not grow with the number of batches.

    Args:
        model: a trained float model; its weights stay as they are, but see ``equalize``.
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales when they are chosen.
        method: how activations find their scale: "ema", "kl", "admm", "mse" or "max_abs".
        weight_method: how weights find theirs: "max_abs", "admm" or "mse".
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        equalize: first let layers in a row trade the ranges of their channels (Nagel et al., ICCV 2019). This scales
            weights and batch norms of the model in place; it computes what it did, but for float rounding.
        correct_bias: give the outputs of quantized layers the mean back that rounding takes (the same, section 4.2).
        adaptive_rounding: round weights by what the layers compute, not to the nearest level (objective of AdaRound,
            Nagel et al., ICML 2020); for few bits.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, an unknown method or layer name, nothing to quantize.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str] = (), bits: int = 8,
                 debug_info: bool = False, *, method: Union[str, ActivationMethod] = ActivationMethod.MSE,
                 weight_method: Union[str, WeightMethod] = WeightMethod.MSE, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True, equalize: bool = False,
                 correct_bias: bool = False, adaptive_rounding: bool = False) -> None:
        self._equalize, self._correct_bias, self._adaptive_rounding = equalize, correct_bias, adaptive_rounding
        self.method, self.weight_method = self.check(bits, weight_bits, activation_bits, method, weight_method)
        super().__init__(model, skip_quant_layers, bits if weight_bits is None else weight_bits,
                         bits if activation_bits is None else activation_bits,
                         unsigned_activations=unsigned_activations, debug_info=debug_info)
        self._observations: Observations = {}
        self._observer: Optional[FloatObserving] = None
        for scale in self.scale_parameters():
            scale.requires_grad_(False)

    @staticmethod
    def check(bits: int, weight_bits: Optional[int], activation_bits: Optional[int],
              method: Union[str, ActivationMethod],
              weight_method: Union[str, WeightMethod]) -> Tuple[ActivationMethod, WeightMethod]:
        """Check arguments before there is a model; returns the methods.

        Raises:
            ValueError: bits outside 2..8, an unknown method.
        """
        weight_grid(bits if weight_bits is None else weight_bits)
        activation_grid(bits if activation_bits is None else activation_bits)
        return method_of(ActivationMethod, method), method_of(WeightMethod, weight_method)

    # -- observing

    def calibrate(self, batches: Iterable[Any]) -> int:
        """Observe the model on batches, in evaluation mode, and choose all scales; starts from nothing each time.

        Args:
            batches: inputs of the model; a tuple is several positional arguments, a dict keyword arguments.

        Returns:
            how many batches were seen. Modes, buffers and the random state of the model are left as they were.

        Raises:
            ValueError: there was no batch, or none reached some tensor; values are not finite.
        """
        self.attach()
        count, before = 0, self._tracker.handler
        try:
            with unnoticed(self.model), evaluation(self.model), self._calibrating():
                for batch in with_progress(batches, "calibrating"):
                    inputs = arguments(batch)
                    if not count:
                        self.start_observing(inputs)
                    self.model(*inputs.args, **inputs.kwargs)
                    count += 1
                if not count:
                    raise ValueError("calibration needs at least one batch, got none")
                self.finish_observing()
        except BaseException:
            self._tracker.handler = before  # what it was, the float model or the scales of an earlier calibration
            raise
        return count

    def start_observing(self, inputs: Batch) -> None:
        """Record where the model is quantized; every run from now on is observed, until :meth:`finish_observing`."""
        if self._equalize:
            self._equalize_chains(inputs)
        plan = self.record(inputs.args, inputs.kwargs)
        kind = MomentObserving if self._correct_bias or self._adaptive_rounding else FloatObserving
        self._observer = kind(self.modules(), plan, self.method, lambda: not self.model.training)
        self._tracker.handler = self._observer

    def finish_observing(self) -> None:
        """Choose all scales from what was seen; from now on the model computes as it will be deployed.

        Raises:
            RuntimeError: nothing is being observed.
            ValueError: no batch reached some tensor.
        """
        if self._observer is None:
            raise RuntimeError("nothing is being observed: call calibrate(batches), or start_observing first")
        observer, self._observer = self._observer, None
        seen = observer.counted()
        owners = set(self.known_plan().owners.values())
        missing = sorted("%s of %r" % (owner.role.value, owner.layer) for owner in owners - set(seen))
        if missing:
            self.forget()
            raise ValueError("no batch reached %s" % ", ".join(missing))
        self._observations = seen
        self.restart_weight_scales()
        self._round_weights(observer)
        for owner, state in seen.items():
            scales = self.scales[owner.layer]
            scales.set_activation_scale(owner.role, calibrated_scale(state, scales.grid(owner.role), self.method))
        average_activation_scales(list(self.scales.values()))
        self.simulate_from_now()
        counts = sorted(set(self.batches_seen().values()))
        logger.info("chose %d scales by %s from %s batches", len(seen), self.method.value, "/".join(map(str, counts)))

    def batches_seen(self) -> Dict[Tuple[str, str], int]:
        """How many batches each observer saw, by layer and role ("input" or "output"); empty before calibration."""
        return observed_batches(self._observations)

    def _equalize_chains(self, inputs: Batch) -> None:
        recorder = ChainRecorder(self.modules())
        self.run_quietly(inputs, recorder)
        equalize(self.modules(), recorder.chains())

    def _round_weights(self, observer: FloatObserving) -> None:
        """Choose the levels of weights and the corrections of biases from what the layers read."""
        moments = averaged_over_ranks(observer.moments) if isinstance(observer, MomentObserving) else {}
        for name, scales in self.scales.items():
            if name not in moments or not isinstance(scales, RoundedScales):
                continue
            weight = self.layers[name].get_parameter("weight").detach().float().cpu().numpy()
            steps = scales.weight_scale().detach().cpu().numpy()
            scales.choose(round_weight(weight, steps, scales.weight_grid, moments[name],
                                       adaptive=self._adaptive_rounding, correct_bias=self._correct_bias))

    # -- what the base asks for

    def make_scales(self, layer: nn.Module) -> LayerScales:
        return RoundedScales(layer, self.bits)

    def choose_weight_scale(self, weight: np.ndarray, grid: Grid) -> np.ndarray:
        return weight_scales(weight, grid, self.weight_method)

    def starts_now(self) -> bool:
        return False

    def configuration(self) -> Dict[str, Any]:
        configuration = super().configuration()
        for name in ("scale_lr_ratio", "retain_sparsity"):
            del configuration[name]
        return {**configuration, "method": self.method.value, "weight_method": self.weight_method.value,
                "equalize": self._equalize, "correct_bias": self._correct_bias,
                "adaptive_rounding": self._adaptive_rounding}

    def state_dict(self) -> Dict[str, Any]:
        rounding = {name: scales.rounding_state() for name, scales in self.scales.items()
                    if isinstance(scales, RoundedScales)}
        return {**super().state_dict(), "seen": observations_state(self._observations), "rounding": rounding}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries: List[Dict[str, Any]] = state["seen"]
        self._observations = observations_of(entries)
        for name, rounding in state["rounding"].items():
            scales = self.scales.get(name)
            if isinstance(scales, RoundedScales):  # the base says what is wrong with other layers
                scales.load_rounding_state(rounding)
        super().load_state_dict(state)
