"""Following channels through a model that runs its own Python code.

Beside every tensor of one run goes a shadow: an integer tensor of the same shape that says for each value which
channel it belongs to (-1: one that cannot be removed). Whatever moves values (reshape, transpose, concat, split, a
channel shuffle written by hand) is run on the shadow too, so no rule is needed for it; whatever computes with values
either keeps them in their places (activations, pools), joins channels (add, multiply), begins new ones (a layer), or
is unknown, and then what it reads stays.
"""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtrain.callbacks.channel_rules import (
    EQUAL_PARTS,
    JOINS,
    KEEPS_PLACES,
    MOVES,
    POOLS,
    REDUCES,
    pairs,
    spread,
    varies_with,
    varying,
)
from slimtrain.callbacks.handling import Call, Handler
from slimtrain.callbacks.model_view import evaluation, float_view, unnoticed
from slimtrain.callbacks.operations import argument, function_name, map_tensors, tensors_in
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import ChannelClasses, ChannelGraph, OpKind, select


def trace_channels(model: nn.Module, args: Tuple[Any, ...], kwargs: Mapping[str, Any],
                   skip: Collection[str] = ()) -> ChannelClasses:
    """Find out which channels of a model depend on each other, from one run in evaluation mode.

    Args:
        model: the model; it is left as it is, random state included.
        args, kwargs: an example input.
        skip: names or patterns of layers that keep all that they produce.

    Raises:
        ValueError: an entry of ``skip`` names no layer.
    """
    view = float_view(model)
    layers = {name: module for name, module in view.named_modules()
              if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    recorder = _ChannelRecorder(view, layers, frozenset(select(list(layers), skip)))
    tracker = Tracker(view, layers, recorder)
    handles = tracker.attach()
    try:
        with unnoticed(view), evaluation(view):
            recorder.leave_all(view(*args, **kwargs), tracker)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.finish()


class _Step(NamedTuple):
    """One operation of the run."""

    call: Call
    shadows: List[Tensor]   #: of the tensors it read
    results: List[Tensor]
    tracker: Tracker


class _ChannelRecorder(Handler):
    def __init__(self, model: nn.Module, layers: Mapping[str, Any], skip: Collection[str]) -> None:
        self._layers = layers
        self._skip = skip
        self._graph = ChannelGraph()
        self._shadows: Dict[int, Tensor] = {}    #: serial of a tensor's mark -> shadow
        self._pending: List[Tensor] = []         #: shadows of the results of the running operation
        self._per_channel = {id(value): name for name, module in model.named_modules() if name not in layers
                             for value in (*module.parameters(recurse=False), *module.buffers(recurse=False))
                             if value.dim() == 1}

    # -- what the tracker tells

    def enter(self, name: str, value: Tensor, tracker: Tracker) -> Tensor:
        if tracker.mark_of(value) is None and value.is_floating_point():
            self._shadows[tracker.mark(value, name).serial] = torch.full_like(value, -1, dtype=torch.long)
        return value

    def execute(self, call: Call, tracker: Tracker) -> Any:
        shadows = [self._shadow(tensor, tracker) for tensor in call.inputs]
        value = call.run()
        self._pending = self._follow(_Step(call, shadows, tensors_in(value), tracker))
        return value

    def produced(self, call: Call, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        assert mark is not None
        self._shadows[mark.serial] = self._pending.pop(0)
        return value

    def leave_all(self, outputs: Any, tracker: Tracker) -> None:
        """These tensors leave the network."""
        for value in tensors_in(outputs):
            if tracker.mark_of(value) is not None:
                self._fix(self._shadow(value, tracker), "its channels leave the network")

    def finish(self) -> ChannelClasses:
        return self._graph.finish()

    # -- one operation

    def _follow(self, step: _Step) -> List[Tensor]:
        """The shadows of an operation's results."""
        name = function_name(step.call.function)
        rule = self._rule(step.call, name)
        followed = rule(step) if rule is not None and step.shadows else None
        if followed and step.call.layer in self._skip:
            self._fix(followed[0], "named in skip_layers")
        if followed is not None and [shadow.shape for shadow in followed] == [value.shape for value in step.results]:
            return followed
        for shadow in step.shadows:
            self._fix(shadow, "its channels go through %s" % name)
        return [torch.full_like(value, -1, dtype=torch.long) for value in step.results]

    def _rule(self, call: Call, name: str) -> Optional[Callable[..., Optional[List[Tensor]]]]:
        if call.layer:
            return self._linear if isinstance(self._layers[call.layer], nn.Linear) else self._convolution
        if call.kind is OpKind.BATCH_NORM:
            return self._batch_norm
        for names, rule in ((KEEPS_PLACES, self._same), (POOLS, self._pool), (JOINS, self._join),
                            (MOVES, self._move), (REDUCES, self._reduce)):
            if name in names:
                return rule
        return {"pad": self._pad, "prelu": self._prelu, "channel_shuffle": self._shuffle}.get(name)

    def _linear(self, step: _Step) -> List[Tensor]:
        layer = self._layers[step.call.layer]
        rows = self._graph.new(len(layer.weight))
        self._graph.add_layer(step.call.layer, rows, self._along(step.shadows[0], step.shadows[0].dim() - 1), 1)
        return [torch.from_numpy(rows).expand(step.results[0].shape)]

    def _convolution(self, step: _Step) -> Optional[List[Tensor]]:
        weight, groups = self._layers[step.call.layer].weight, int(self._layers[step.call.layer].groups)
        if step.results[0].dim() != weight.dim():
            return None
        kernel, count = int(weight[0, 0].numel()), len(weight)
        columns = self._along(step.shadows[0], 1)
        if groups > 1 and weight.shape[1] == 1:
            rows = np.repeat(columns, count // groups)
            if (rows < 0).any():
                self._graph.fix(rows, "its layer also filters channels that stay")
                rows = self._graph.new(count)
                self._graph.fix(rows, "its layer filters channels that stay")
            self._graph.add_layer(step.call.layer, rows, np.array([-1]), kernel)
        else:
            rows = self._graph.new(count)
            if groups > 1:
                self._graph.couple(rows.reshape(groups, -1))
                self._graph.couple(columns.reshape(groups, -1))
            self._graph.add_layer(step.call.layer, rows, columns[:weight.shape[1]], kernel, groups > 1)
        return [spread(torch.from_numpy(rows), 1, step.results[0])]

    def _batch_norm(self, step: _Step) -> Optional[List[Tensor]]:
        vectors = [value for position, name in ((1, "running_mean"), (3, "weight"))
                   for value in [argument(step.call.args, step.call.kwargs, position, name)] if value is not None]
        owners = {self._per_channel.get(id(value), "") for value in vectors}
        if len(owners) != 1 or "" in owners:
            return None
        self._graph.add_vector(owners.pop(), self._along(step.shadows[0], 1))
        return step.shadows[:1]

    def _prelu(self, step: _Step) -> Optional[List[Tensor]]:
        weight = argument(step.call.args, step.call.kwargs, 1, "weight")
        if weight.numel() > 1:
            if id(weight) not in self._per_channel:
                return None
            self._graph.add_vector(self._per_channel[id(weight)], self._along(step.shadows[0], 1))
        return step.shadows[:1]

    def _same(self, step: _Step) -> List[Tensor]:
        return step.shadows[:1]

    def _pool(self, step: _Step) -> Optional[List[Tensor]]:
        source, result = step.shadows[0], step.results[0]
        if len(step.results) != 1 or source.dim() < 3 or source.shape[:2] != result.shape[:2]:
            return None
        return [spread(torch.from_numpy(self._along(source, 1)), 1, result)]

    def _join(self, step: _Step) -> Optional[List[Tensor]]:
        marked = {id(tensor) for tensor in step.call.inputs}
        for constant in tensors_in((step.call.args, dict(step.call.kwargs))):
            if id(constant) not in marked and varies_with(constant, step.shadows):
                return None
        wide = [shadow.expand(step.results[0].shape) for shadow in step.shadows]
        for other in wide[1:]:
            self._graph.join(*pairs(wide[0], other))
            self._graph.fix(torch.maximum(wide[0], other)[(wide[0] < 0) != (other < 0)].numpy(),
                            "it is combined with channels that stay")
        return [torch.stack(wide).amax(0)] if len(wide) > 1 else wide

    def _move(self, step: _Step) -> List[Tensor]:
        args, kwargs = (self._shadowed(values, step.tracker) for values in (step.call.args, dict(step.call.kwargs)))
        moved = tensors_in(step.call.function(*args, **kwargs))
        name = function_name(step.call.function)
        if len(step.shadows) == 1 and len(moved) > 1 and name in EQUAL_PARTS:
            self._couple_parts(step.shadows[0], moved)
        for part in moved:
            self._couple_split(part)
        self._fix_cut(step.shadows, moved)
        return moved

    def _reduce(self, step: _Step) -> Optional[List[Tensor]]:
        dims = argument(step.call.args, step.call.kwargs, 1, "dim")
        keep = bool(argument(step.call.args, step.call.kwargs, 2, "keepdim", False))
        if dims is None:
            return None
        axes = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
        low, high = step.shadows[0].amin(axes, keep), step.shadows[0].amax(axes, keep)
        return [low] if bool((low == high).all()) else None

    def _pad(self, step: _Step) -> Optional[List[Tensor]]:
        mode = argument(step.call.args, step.call.kwargs, 2, "mode", "constant")
        pads = argument(step.call.args, step.call.kwargs, 1, "pad")
        if mode != "constant" or len(pads) > 2 * (step.shadows[0].dim() - 2):
            return None
        return self._pool(step)

    def _shuffle(self, step: _Step) -> List[Tensor]:
        groups = int(argument(step.call.args, step.call.kwargs, 1, "groups"))
        self._graph.couple(self._along(step.shadows[0], 1).reshape(groups, -1))
        return [F.channel_shuffle(step.shadows[0].float(), groups).long()]  # torch shuffles no integers

    # -- shadows

    def _shadow(self, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        shadow = self._shadows.get(mark.serial) if mark is not None else None
        return shadow if shadow is not None else torch.full_like(value, -1, dtype=torch.long)

    def _shadowed(self, values: Any, tracker: Tracker) -> Any:
        """Call arguments with shadows for tensors; index tensors stay."""
        def shadowed(value: Tensor) -> Tensor:
            return self._shadow(value, tracker).contiguous() if value.is_floating_point() else value

        return map_tensors(shadowed, values)

    def _along(self, shadow: Tensor, dim: int) -> np.ndarray:
        """The channel at each position of a dimension; -1, and fixed, where it is not the same everywhere."""
        flat = shadow.movedim(dim, 0).reshape(shadow.shape[dim], -1)
        low, high = flat.amin(1), flat.amax(1)
        mixed = low != high
        if bool(mixed.any()):
            self._fix(flat[mixed], "its channels are spread over other dimensions")
        return torch.where(mixed, -1, low).numpy()

    def _fix(self, shadow: Tensor, reason: str) -> None:
        self._graph.fix(shadow.numpy(), reason)

    def _couple_parts(self, source: Tensor, parts: List[Tensor]) -> None:
        """A tensor is cut into equal parts: they must stay equal."""
        if any(part.shape != parts[0].shape for part in parts):
            self._fix(source, "its channels are cut into unequal parts")
            return
        if not bool((parts[0] == parts[1]).all()):  # else the cut is along another dimension
            self._graph.couple(np.stack([part.reshape(-1).numpy() for part in parts]))

    def _couple_split(self, moved: Tensor) -> None:
        """Channels that were split over two dimensions are removed along the longer one only."""
        dims = varying(moved)
        if len(dims) == 2:
            fixed, free = sorted(dims, key=lambda dim: moved.shape[dim])
            table = moved.movedim((fixed, free), (0, 1)).reshape(moved.shape[fixed], -1)
            if moved.shape[fixed] < moved.shape[free]:
                self._graph.couple(table.numpy())
                return
        if len(dims) >= 2:
            self._fix(moved, "its channels are split over several dimensions")

    def _fix_cut(self, shadows: List[Tensor], moved: List[Tensor]) -> None:
        """Channels that a slice leaves behind were cut at fixed positions."""
        before, after = (self._graph.roots(np.concatenate([part.reshape(-1).numpy() for part in parts]))
                         for parts in (shadows, moved))
        if before != after:
            for shadow in shadows:
                self._fix(shadow, "its channels are cut at fixed positions")
