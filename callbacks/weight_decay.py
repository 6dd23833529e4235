"""Weight decay never acts on scales, whatever optimizer and parameter groups the user has.

For the moment of each ``optimizer.step`` the scales stand in a parameter group of their own, a copy of the group they
came in with ``weight_decay = 0``. Optimizer state belongs to the parameter and not to the group, so nothing else
changes, and neither schedulers nor checkpoints ever see the additional group.
"""
from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Scales = Callable[[], List[nn.Parameter]]


class ScaleGroups:
    """Splits the scales off the groups of any optimizer that holds them, while it steps.

    Args:
        owner: an object whose ``scale_parameters()`` are the scales; not kept alive by this one.
        learning_rate_ratio: learning rate of the scales over that of their group.
    """

    def __init__(self, owner: Any, learning_rate_ratio: float = 1.0) -> None:
        self._owner = weakref.ref(owner)
        self._ratio = learning_rate_ratio
        self._split: List[Tuple[Dict[str, Any], List[nn.Parameter]]] = []
        self._handles = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]
        weakref.finalize(owner, self.remove)

    def remove(self) -> None:
        """Stop watching optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        owner = self._owner()
        scales = {id(parameter) for parameter in owner.scale_parameters()} if owner is not None else set()
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in scales]
            if not mine or (self._ratio == 1.0 and not group.get("weight_decay")):
                continue
            self._split.append((group, group["params"]))
            optimizer.param_groups.append({**group, **self._changes(group), "params": mine})
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]

    def _changes(self, group: Dict[str, Any]) -> Dict[str, Any]:
        changes = {"lr": group["lr"] * self._ratio}
        if "weight_decay" in group:
            changes["weight_decay"] = 0.0
        return changes

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._split and any(group is self._split[0][0] for group in optimizer.param_groups):
            del optimizer.param_groups[-len(self._split):]
            for group, parameters in self._split:
                group["params"] = parameters
            self._split = []
