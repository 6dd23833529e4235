"""Scales of a layer whose weights are rounded by what the layer computes."""
from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor

from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.core import RoundedWeight

# both levels next to a position are less than 1 away from it, but for the rounding of float32
_NEIGHBOURS = 1.001


class RoundedScales(LayerScales):
    """Scales beside integer levels that were chosen once, and a correction of the bias.

    Both belong to the weights as they were then: a weight that was trained since has its nearest level again.
    """

    chosen: Optional[Tensor]      #: int8, like the weight; None for the nearest levels
    correction: Optional[Tensor]  #: float64 [O]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("chosen", None, persistent=False)
        self.register_buffer("correction", None, persistent=False)

    def choose(self, rounded: Optional[RoundedWeight]) -> None:
        """Take over levels and correction; None for nearest levels and none."""
        self.chosen = self.correction = None
        if rounded is None:
            return
        device = self.weight.device
        self.chosen = torch.from_numpy(rounded.levels).to(device, torch.int8)
        if rounded.correction is not None:
            self.correction = torch.from_numpy(rounded.correction).to(device)

    def rounded(self, nearest: Tensor, weight: Tensor) -> Tensor:
        if self.chosen is None:
            return nearest
        scale = self.weight_scale().reshape((-1,) + (1,) * (weight.dim() - 1))
        limits = self.weight_grid
        position = (weight.float() / scale).clamp(limits.lower, limits.upper)
        chosen = self.chosen.to(nearest.dtype)
        return torch.where((chosen - position).abs() < _NEIGHBOURS, chosen, nearest)

    def bias_correction(self) -> Optional[Tensor]:
        return self.correction

    def rounding_state(self) -> Dict[str, Tensor]:
        """What :meth:`choose` took over, for a checkpoint; empty for nothing."""
        found = {"chosen": self.chosen, "correction": self.correction}
        return {name: value.clone() for name, value in found.items() if value is not None}

    def load_rounding_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`rounding_state`."""
        device = self.weight.device
        self.chosen, self.correction = (
            state[name].to(device) if name in state else None for name in ("chosen", "correction"))
