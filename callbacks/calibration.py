"""Choosing activation scales from the tensors that flow through a model."""
from __future__ import annotations

from typing import Callable, Dict, Mapping, Tuple

from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import Grid, Quantizer

Seen = Tuple[int, float]  # runs, mean of their scales


class Calibration(Simulation):
    """A simulation that first sets the scale of each tensor it quantizes.

    A scale is the mean over runs of the largest that any of its tensors asks for in a run.

    Args:
        modules, plan: see :class:`Simulation`.
        choose: from a tensor and its integer grid to a scale.
    """

    runs_activations = False

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan, choose: Callable[[Tensor, Grid], float]) -> None:
        super().__init__(modules, plan)
        self._choose = choose
        self._seen: Dict[Quantizer, Seen] = {}   #: before the present run
        self._now: Dict[Quantizer, float] = {}

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        self._seen, self._now = self.counted(), {}
        self._exact = False

    def counted(self) -> Dict[Quantizer, Seen]:
        """What has been seen, the latest run included."""
        seen = dict(self._seen)
        for owner, scale in self._now.items():
            count, mean = seen.get(owner, (0, 0.0))
            seen[owner] = (count + 1, mean + (scale - mean) / (count + 1))
        return seen

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        self._now[owner] = max(self._now.get(owner, 0.0), self._choose(value, scales.grid(owner.role)))
        count, mean = self._seen.get(owner, (0, 0.0))
        scales.set_activation_scale(owner.role, mean + (self._now[owner] - mean) / (count + 1))
        return super().quantize(value, owner, scales)
