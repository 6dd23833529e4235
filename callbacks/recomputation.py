"""Activation checkpointing: the parts of a model that ``backward`` runs a second time.

``torch.utils.checkpoint`` calls a module again inside ``backward``, alone, with tensors of which nothing is known. What
was known of them when the module was entered in the forward pass is kept here, so that the repetition does the same.
"""
from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Dict, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from slimtrain.callbacks.marks import Mark

_PASSED = ("torch.nn.modules.module", "slimtrain.callbacks.tracking", __name__)
_REPEATERS = ("recompute_fn", "backward")  # the functions of torch.utils.checkpoint that repeat what they were given


class Known(NamedTuple):
    """What was known of a tensor when it was passed into a module."""

    scale_owner: Any
    open_layer: str


Passed = Tuple[Optional[Known], ...]


class Entrances:
    """Remembers how each module was entered."""

    def __init__(self) -> None:
        self.repeating = False             #: the present run repeats a part of an earlier one
        self._run = 0
        self._outermost: Set[str] = set()  #: modules with which a run began
        self._passed: Dict[str, Tuple[int, Set[Passed]]] = {}

    def begin(self, path: str) -> None:
        """A run begins with the module at ``path``.

        Raises:
            RuntimeError: it repeats something that cannot be told apart from its surroundings.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        self.repeating = in_backward and path not in self._outermost
        if not in_backward:
            self._run += 1
            self._outermost.add(path)
        elif self.repeating and not (path in self._passed and _repeated_by_itself()):
            raise RuntimeError("quantization cannot follow what torch.utils.checkpoint repeats here (%r): pass it a "
                               "module with submodules, not a function around modules, a single layer, or a sequence "
                               "cut by checkpoint_sequential" % path)

    def enter(self, path: str, marks: Sequence[Optional[Mark]]) -> None:
        """A module is entered inside a run, with tensors of these marks."""
        if self.repeating:
            return
        run, states = self._passed.get(path, (0, set()))
        if run != self._run:
            states = set()
        states.add(tuple(None if mark is None else Known(mark.scale_owner, mark.open_layer) for mark in marks))
        self._passed[path] = (self._run, states)

    def repeated(self, path: str) -> Passed:
        """What was known of the tensors passed into the module that is repeated.

        Raises:
            RuntimeError: the module was used several times, on tensors of different scales.
        """
        states = self._passed[path][1]
        if len(states) > 1:
            raise RuntimeError("module %r is used several times on tensors that are quantized differently, and "
                               "torch.utils.checkpoint does not tell which use it repeats" % path)
        return next(iter(states))


def _repeated_by_itself() -> bool:
    """Whether torch.utils.checkpoint calls the module directly."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _PASSED:
        frame = frame.f_back
    return (frame is not None and frame.f_globals.get("__name__") == "torch.utils.checkpoint"
            and frame.f_code.co_name in _REPEATERS)
