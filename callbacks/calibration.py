"""Choosing activation scales from the tensors that flow through a model."""
from __future__ import annotations

from typing import Callable, Dict, Mapping, Tuple

from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import Grid, Quantizer


class Calibration(Simulation):
    """A simulation that first sets the scale of each tensor it quantizes.

    A scale is the mean over runs of the largest that any of its tensors asks for in a run.

    Args:
        modules, plan: see :class:`Simulation`.
        choose: from a tensor and its integer grid to a scale.
        observing: tells whether the present run counts; the others only simulate.
    """

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan, choose: Callable[[Tensor, Grid], float],
                 observing: Callable[[], bool] = lambda: True) -> None:
        super().__init__(modules, plan)
        self._choose = choose
        self._observing = observing
        self._counts = False
        self.seen: Dict[Quantizer, Tuple[int, float]] = {}   #: runs before this one, mean of their scales
        self._now: Dict[Quantizer, float] = {}

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        for owner, scale in self._now.items():
            count, mean = self.seen.get(owner, (0, 0.0))
            self.seen[owner] = (count + 1, mean + (scale - mean) / (count + 1))
        self._now = {}
        self._counts = self._observing()
        self._exact = self._exact and not self._counts

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        if self._counts:
            self._now[owner] = max(self._now.get(owner, 0.0), self._choose(value, scales.grid(owner.role)))
            count, mean = self.seen.get(owner, (0, 0.0))
            scales.set_activation_scale(owner.role, mean + (self._now[owner] - mean) / (count + 1))
        return super().quantize(value, owner, scales)
