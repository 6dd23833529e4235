"""Weight decay never acts on scales, and no optimizer moves them by more than their size is worth.

An optimizer that divides gradients by their own size (Adam and all its kin) moves every parameter by about its learning
rate: nothing for a weight of 0.1, and the whole of a scale of 0.001. So under these the learning rate of a scale is in
units of the scale as it started; under SGD the gradient of LSQ has the right size already.

For the moment of each ``optimizer.step`` the scales stand in a parameter group of their own, a copy of the group they
came in with other numbers. Optimizer state belongs to the parameter and not to the group, so nothing else
changes, and neither schedulers nor checkpoints ever see the additional group.
"""
from __future__ import annotations

import functools
import weakref
from typing import Any, Dict, List, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# under this attribute an optimizer remembers its own groups while it steps; several quantizers may have split them
_SPLIT = "_slimtrain_split"

# these move a parameter in proportion to its gradient; LBFGS also takes no second group
_PLAIN = (torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS)


class _Split(NamedTuple):
    groups: List[Dict[str, Any]]               #: the user's groups
    parameters: List[List[nn.Parameter]]       #: what they held


class ScaleGroups:
    """Splits the scales off the groups of any optimizer that holds them, while it steps.

    Args:
        owner: an object whose ``scale_parameters()`` are the scales, whose ``scale_sizes()`` are their sizes by the
            ``id`` of the parameter, and whose ``frozen`` says that no optimizer moves them; not kept alive by this one.
        learning_rate_ratio: learning rate of the scales over that of their group.
    """

    def __init__(self, owner: Any, learning_rate_ratio: float = 1.0) -> None:
        self._owner = weakref.ref(owner)
        self._ratio = learning_rate_ratio
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        _ALIVE.add(self)
        _watch_optimizers()

    def __deepcopy__(self, memo: Dict[int, Any]) -> ScaleGroups:
        owner = self._owner()
        # the copied model's quantizer watches its own scales
        return ScaleGroups(memo.get(id(owner), owner), self._ratio)

    def restore(self) -> None:
        """Give the optimizers their own groups back, after a step that was broken off by an exception."""
        for optimizer in list(self._optimizers):
            _unite(optimizer)

    def split(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""
        if optimizer in self._optimizers:  # the step before this one was broken off
            _unite(optimizer)
            self._optimizers.discard(optimizer)
        owner = self._owner()
        scales = {id(parameter) for parameter in owner.scale_parameters()} if owner is not None else set()
        plain, frozen = isinstance(optimizer, _PLAIN), owner is not None and owner.frozen
        units = {} if owner is None or plain else owner.scale_sizes()
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in scales]
            if not mine or (plain and not frozen and self._ratio == 1.0 and not group.get("weight_decay")):
                continue
            if not hasattr(optimizer, _SPLIT):
                groups = list(optimizer.param_groups)
                setattr(optimizer, _SPLIT, _Split(groups, [each["params"] for each in groups]))
            self._optimizers.add(optimizer)
            moved = () if frozen else dict.fromkeys(units.get(id(parameter), 1.0) for parameter in mine)
            for unit in moved:
                alike = [parameter for parameter in mine if units.get(id(parameter), 1.0) == unit]
                optimizer.param_groups.append({**group, **self._changes(group, unit), "params": alike})
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]

    def _changes(self, group: Dict[str, Any], unit: float) -> Dict[str, Any]:
        changes = {"lr": group["lr"] * (self._ratio * unit)}
        if "weight_decay" in group:
            changes["weight_decay"] = 0.0
        return changes

    def unite(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""
        if optimizer in self._optimizers:
            self._optimizers.discard(optimizer)
            _unite(optimizer)


def _unite(optimizer: torch.optim.Optimizer) -> None:
    split = getattr(optimizer, _SPLIT, None)
    if split is None:
        return  # another quantizer has done it
    for group, parameters in zip(split.groups, split.parameters):
        group["params"] = parameters
    optimizer.param_groups[:] = split.groups
    delattr(optimizer, _SPLIT)


# One pair of hooks serves all, and stays: torch goes through its hooks while a step runs, and one that were removed
# in between, because a quantizer happened to be collected then, would break the step.
_ALIVE: weakref.WeakSet[ScaleGroups] = weakref.WeakSet()


@functools.lru_cache(maxsize=None)
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for groups in list(_ALIVE):
        groups.split(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for groups in list(_ALIVE):
        groups.unite(optimizer)


def admit(parameters: List[nn.Parameter], optimizer: torch.optim.Optimizer, saved: Dict[str, Any]) -> None:
    """Make room in an optimizer's saved state, in place, for parameters that did not exist when it was saved.

    Args:
        parameters: the new ones; they begin without state.
        optimizer: holds old and new ones.
        saved: a ``state_dict`` of an equal optimizer over the old ones.
    """
    new = {id(parameter) for parameter in parameters}
    free = 1 + max((index for group in saved["param_groups"] for index in group["params"]), default=-1)
    for group, held in zip(optimizer.param_groups, saved["param_groups"]):
        old = iter(held["params"])
        indices = []
        for parameter in group["params"]:
            index = free if id(parameter) in new else next(old, None)
            free += id(parameter) in new
            indices.append(index)
        if None in indices or next(old, None) is not None:
            return  # another model's: the optimizer says so itself when it loads this
        held["params"] = indices
