"""Overflow-aware quantization: LSQ whose levels narrow, layer by layer, until sums of products fit 16 bits.

Xie et al., arXiv 2005.13297: on devices whose 8-bit products are summed in 16 bits, twice as many are summed at once.
"""
from __future__ import annotations

import logging
from typing import Any, Collection, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import scales_of
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.ranks import largest_over_ranks
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import Grid
from slimtrain.core import Quantizer as Owner
from slimtrain.core.overflow import LARGEST_SUM, Clamp, narrowed_clamp
from slimtrain.proto import QuantMethod
from slimtrain.proto.deployed import DeployedLayer

logger = logging.getLogger(__name__)

# sums of inputs that training has not shown are larger than its largest; 1.2 times were seen in tests
_HEADROOM = 1.25


class OAQQuantizer(LSQQuantizer):
    """LSQ with a clamp per layer, shared by its weights and its input, that narrows while 16-bit sums overflow.

    A narrower clamp widens the scale by the same factor, so that the range stays and learning goes on from there.
    The overflow test reads the layer's own output in training. A layer that would need a clamp below
    ``min_clamp_value`` is quantized plainly, with sums of 32 bits.

    Args:
        model: a float model, best a trained one.
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        min_clamp_value: the smallest clamp, for instance 31 for levels of at least 6 bits.
        debug_info: log the scales as they start.
        retain_sparsity: weights that are zero now stay zero.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative an unsigned range.
        scale_lr_ratio: learning rate of the scales over that of their parameter group.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, a clamp outside 0..127, an unknown layer name, nothing to quantize.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str] = (), bits: int = 8,
                 min_clamp_value: int = 0, debug_info: bool = False, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, scale_lr_ratio: float = 1.0) -> None:
        self.check_clamp(min_clamp_value)
        super().__init__(model, skip_quant_layers, bits, debug_info, retain_sparsity=retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, scale_lr_ratio=scale_lr_ratio)
        self.min_clamp_value = min_clamp_value
        self._largest = next(iter(self.scales.values())).weight_grid.upper
        self.clamps = dict.fromkeys(self.layers, Clamp(self._largest, True))  #: by layer
        self._apply_weight_clamps()

    @staticmethod
    def check_clamp(min_clamp_value: int) -> None:
        """Check the argument before there is a model.

        Raises:
            ValueError: not an integer from 0 to 127.
        """
        if not isinstance(min_clamp_value, int) or not 0 <= min_clamp_value <= 127:
            raise ValueError("min_clamp_value must be an integer from 0 to 127, got %r" % (min_clamp_value,))

    def make_simulation(self) -> Simulation:
        return OverflowWatch(self)

    def deployed_layers(self) -> List[DeployedLayer]:
        """Every use of a quantized layer; those whose sums fit 16 bits say so."""
        handler = self._tracker.handler
        if isinstance(handler, OverflowWatch):
            handler.narrow()
        return [layer._replace(method=QuantMethod.OVERFLOW_AWARE) if self.clamps[layer.name].fits_int16 else layer
                for layer in super().deployed_layers()]

    def narrow(self, peaks: Mapping[str, float]) -> None:
        """Narrow the clamps of layers whose sums did not fit.

        Args:
            peaks: by layer, the largest magnitude of an integer sum.
        """
        for name, peak in peaks.items():
            before = self.clamps[name]
            after = narrowed_clamp(before, peak * _HEADROOM, self.min_clamp_value, self._largest)
            if after == before:
                continue
            if self.frozen:  # a narrower clamp would change the scales
                after = Clamp(before.level, False)
            logger.info("%s: sums of %.0f are too close to %d, its clamp %d becomes %d%s", name, peak, LARGEST_SUM,
                        before.level, after.level, "" if after.fits_int16 else " with sums of 32 bits")
            self.clamps[name] = after
            with torch.no_grad():
                self.scales[name].weight.mul_(before.level / after.level)
        self._apply_weight_clamps()
        self._apply_input_clamps(rescale=True)

    # -- state

    def configuration(self) -> Dict[str, Any]:
        configuration = super().configuration()
        del configuration["mode"]
        return {**configuration, "min_clamp_value": self.min_clamp_value}

    def state_dict(self) -> Dict[str, Any]:
        clamps = {name: [clamp.level, clamp.fits_int16] for name, clamp in self.clamps.items()}
        return {**super().state_dict(), "clamps": clamps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clamps = {name: Clamp(*clamp) for name, clamp in state["clamps"].items()}
        super().load_state_dict(state)
        self._apply_weight_clamps()

    # -- inside

    def _choose_ranges(self) -> None:
        super()._choose_ranges()
        self._apply_input_clamps(rescale=False)

    def _apply_weight_clamps(self) -> None:
        for name, clamp in self.clamps.items():
            self.scales[name].set_weight_grid(Grid(self.bits.weight, -clamp.level, clamp.level))

    def _apply_input_clamps(self, rescale: bool) -> None:
        """Give each input the narrowest clamp of its readers; symmetric where signed, as a clamp has one magnitude."""
        for owner, readers in _readers(self.known_plan()).items():
            own, level = self.scales[owner.layer], min(self.clamps[name].level for name in readers)
            before = own.grid(owner.role)
            # an unsigned range keeps its ratio to the signed one: 15 of 4 bits where the signed clamp is 7
            lower, upper = (-level, level) if before.signed else (0, 2 * level + 1)
            after = before._replace(lower=lower, upper=upper)
            if rescale and after.upper != before.upper:
                with torch.no_grad():
                    own.set_activation_scale(owner.role, own.activation_scale(owner.role) * before.upper / after.upper)
            own.set_grid(owner.role, after)


class OverflowWatch(Simulation):
    """A simulation that remembers the largest integer sum of every layer until the next run in training begins."""

    def __init__(self, quantizer: OAQQuantizer) -> None:
        super().__init__(quantizer.modules(), quantizer.known_plan())
        self._quantizer = quantizer
        self._watches = False
        self._peaks: Dict[str, Tensor] = {}

    def begin(self, tracker: Tracker) -> None:
        self._watches = tracker.root.training
        if self._watches:
            self.narrow()
        super().begin(tracker)

    def computed(self, layer: str, owner: Owner, result: Tensor, bias: Optional[Tensor]) -> None:
        if self._watches and self._quantizer.clamps[layer].fits_int16:
            peak = self._peak(self._modules[layer], owner, result.detach(), bias)
            self._peaks[layer] = torch.maximum(peak, self._peaks.get(layer, peak))

    def narrow(self) -> None:
        """Act on what has been seen; waits for the device once."""
        if not self._peaks:
            return
        names = sorted(self._peaks)
        peaks = torch.stack([self._peaks[name] for name in names])
        largest_over_ranks(peaks)
        self._peaks = {}
        self._quantizer.narrow(dict(zip(names, peaks.tolist())))

    def _peak(self, layer: nn.Module, owner: Owner, result: Tensor, bias: Optional[Tensor]) -> Tensor:
        """The largest magnitude of an integer sum, told from the real result; -32768 counts as 32767 does."""
        channel = result.dim() - 1 if isinstance(layer, nn.Linear) else 1
        channels = result.movedim(channel, 0).flatten(1)
        step = (self._scale(owner) * scales_of(layer).weight_scale()).detach()
        shift = 0.0 if bias is None else bias.detach().float()
        highest = (channels.amax(dim=1).float() - shift) / step
        lowest = (channels.amin(dim=1).float() - shift) / step
        return torch.maximum(highest, -1.0 - lowest).amax()


def _readers(plan: Plan) -> Dict[Owner, List[str]]:
    """The layers that read what each owner quantizes."""
    readers: Dict[Owner, List[str]] = {}
    for call in plan.calls:
        readers.setdefault(call.input, []).append(call.layer)
    return readers
