"""Quantization by range tracking: activations keep a moving average of their range, weights their present one."""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, List, Mapping, Optional

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import LayerScales, average_activation_scales, scales_of
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import SMALLEST_SCALE, Grid, activation_grid, max_abs_scale, weight_grid
from slimtrain.core import Quantizer as Owner
from slimtrain.proto.deployed import DeployedLayer

#: share of the past in the moving average of a range
_DECAY = 0.99


class EMAQuantizer(QATQuantizer):
    """Scales from ranges: the largest weight of each output channel, and a moving average of the largest activation.

    Ranges move in training mode and rest in evaluation mode.

    Args:
        model: a float model, best a trained one.
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales as they start.
        retain_sparsity: weights that are zero now stay zero.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, an unknown layer name, nothing to quantize.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True) -> None:
        self.check(bits, weight_bits, activation_bits)
        super().__init__(model, skip_quant_layers, bits if weight_bits is None else weight_bits,
                         bits if activation_bits is None else activation_bits,
                         unsigned_activations=unsigned_activations, retain_sparsity=retain_sparsity,
                         debug_info=debug_info)
        for scale in self.scale_parameters():
            scale.requires_grad_(False)

    @staticmethod
    def check(bits: int, weight_bits: Optional[int], activation_bits: Optional[int]) -> None:
        """Check arguments before there is a model.

        Raises:
            ValueError: bits outside 2..8.
        """
        weight_grid(bits if weight_bits is None else weight_bits)
        activation_grid(bits if activation_bits is None else activation_bits)

    def configuration(self) -> Dict[str, Any]:
        configuration = super().configuration()
        del configuration["scale_lr_ratio"]
        return configuration

    def choose_weight_scale(self, weight: np.ndarray, grid: Grid) -> np.ndarray:
        return max_abs_scale(weight, grid, axis=0)

    def choose_activation_scale(self, value: Tensor, grid: Grid) -> float:
        return float(_range_scale(value, grid))

    def make_simulation(self) -> Simulation:
        return RangeTracking(self.modules(), self.layers, self.known_plan(), lambda: not self.frozen)

    def deployed_layers(self) -> List[DeployedLayer]:
        follow_weights(self.layers, self.scales)
        return super().deployed_layers()


class RangeTracking(Simulation):
    """A simulation whose scales follow ranges, on the device of the tensors and without waiting for it.

    Args:
        modules, plan: see :class:`Simulation`.
        layers: the quantized layers by name.
        moving: tells whether the ranges of activations still move.
    """

    runs_activations = False

    def __init__(self, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], plan: Plan,
                 moving: Callable[[], bool]) -> None:
        super().__init__(modules, plan)
        self._layers = layers
        self._moving = moving
        self._tracks = False
        self._before: Dict[Owner, Tensor] = {}  #: the scale with which the present run began
        self._now: Dict[Owner, Tensor] = {}     #: the largest scale that a tensor of it asked for

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        scales = {name: scales_of(layer) for name, layer in self._layers.items()}
        follow_weights(self._layers, scales)
        self._tracks = tracker.root.training and self._moving()
        self._before, self._now = {}, {}

    def end(self, tracker: Tracker) -> None:
        if self._tracks:
            self._tracks = False
            average_activation_scales([scales_of(layer) for layer in self._layers.values()])

    def quantize(self, value: Tensor, owner: Owner, scales: LayerScales) -> Tensor:
        if self._tracks:
            asked = _range_scale(value, scales.grid(owner.role))
            before = self._before.setdefault(owner, scales.activation_scale(owner.role).clone())
            self._now[owner] = torch.maximum(asked, self._now.get(owner, asked))
            scales.set_activation_scale(owner.role, _DECAY * before + (1 - _DECAY) * self._now[owner])
        return super().quantize(value, owner, scales)


def follow_weights(layers: Mapping[str, nn.Module], scales: Mapping[str, LayerScales]) -> None:
    """Set every weight scale from the largest weight of its output channel."""
    with torch.no_grad():
        for name, layer in layers.items():
            own = scales[name]
            weight = layer.get_parameter("weight")
            largest = (weight if own.keep is None else weight * own.keep).float().abs().flatten(1).amax(dim=1)
            own.weight.copy_((largest / own.weight_grid.upper).clamp_min(SMALLEST_SCALE))


def _range_scale(value: Tensor, grid: Grid) -> Tensor:
    values = value.detach()
    largest = values.abs().amax() if grid.signed else values.amax().clamp_min(0)
    return (largest.float() / grid.upper).clamp_min(SMALLEST_SCALE)
