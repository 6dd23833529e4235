"""A model whose layers are watched while it runs, in place: hooks that come and go, and who handles what they see."""
from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List

from torch import nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.handling import Handler
from slimtrain.callbacks.layers import LayerChoice, layer_kind, weight_count
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import Coverage, LayerCoverage, LayerState


class TrackedModel:
    """The presence of a quantizer on a model.

    Args:
        model: the model, which stays the object it is.
        choice: its layers, those to be watched and those left float.
        handler: what happens to the tensors of a run.
    """

    state = LayerState.INT8  #: of the layers that are watched

    def __init__(self, model: nn.Module, choice: LayerChoice, handler: Handler) -> None:
        self.model = model
        self._choice = choice
        self._tracker = Tracker(model, choice.quantized, handler)
        self._handles: List[Any] = []

    @property
    def layers(self) -> Dict[str, nn.Module]:
        """The quantized layers by name, in the order of the model."""
        return self._choice.quantized

    def modules(self) -> Dict[str, nn.Module]:
        """All modules of the model by name."""
        return dict(self.model.named_modules())

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put hooks on the model; does nothing when they are there."""
        if not self.is_attached:
            self._handles = self._tracker.attach()

    def detach(self) -> None:
        """Take the hooks off the model; it computes as the float model it is. Nothing is forgotten."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """With the hooks on the model, and afterwards as it was."""
        before = self.is_attached
        self.attach()
        try:
            yield
        finally:
            if not before:
                self.detach()

    @contextlib.contextmanager
    def handling(self, handler: Handler) -> Iterator[None]:
        """With another handler."""
        before, self._tracker.handler = self._tracker.handler, handler
        try:
            yield
        finally:
            self._tracker.handler = before

    def run_quietly(self, batch: Any, handler: Handler) -> None:
        """Run the model once in evaluation mode, for what a handler sees; the model is left as it was."""
        args, kwargs = arguments(batch)
        with unnoticed(self.model), evaluation(self.model), self.handling(handler):
            self.model(*args, **kwargs)

    def open_step(self) -> None:
        """A training step begins: what it runs outside any module belongs to the model itself."""
        self._tracker.open()

    def close_step(self, finished: bool = True) -> None:
        """A training step has run its forward, or broke off; does nothing when none is open."""
        if self._tracker.close() and finished:
            self._tracker.handler.end(self._tracker)

    def why_left(self, name: str) -> str:
        """Why a parameterised layer is not quantized; "" if it is."""
        return self._choice.left_float.get(name, "")

    def coverage(self) -> Coverage:
        """Each parameterised layer, its share of the weights, and why it is left float if it is."""
        rows = []
        for name, module in self.model.named_modules():
            reason = self.why_left(name)
            if reason or name in self.layers:
                state = LayerState.FLOAT if reason else self.state
                rows.append(LayerCoverage(name, layer_kind(module), weight_count(module), state, reason))
        return Coverage(tuple(rows))
