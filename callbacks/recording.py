"""The plan of a quantized model: recorded from one run, applied in every other.

One run of the model in evaluation mode shows each operation as it will be deployed. ``slimtrain.core.place`` decides
which tensors are quantized; the plan keeps that decision under the tensors' names, which later runs give again.
"""
from __future__ import annotations

import logging
from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Set, Tuple

from torch import Tensor

from slimtrain.callbacks.handling import Call, Handler
from slimtrain.callbacks.marks import Mark
from slimtrain.callbacks.operations import argument, tensors_in
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import Op, OpKind, Placement, PlannedCall, Quantizer, Role, place

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """Which tensors are quantized, by name."""

    owners: Mapping[str, Quantizer]      #: tensor name -> owner of its scale
    fused: FrozenSet[str]                #: tensors inside and at the end of a fused layer
    calls: Tuple[PlannedCall, ...]
    non_negative: FrozenSet[Quantizer]   #: owners whose tensors are never below zero

    def to_json(self) -> Dict[str, Any]:
        """Plain lists, dicts and strings, for a checkpoint."""
        return {
            "owners": {name: _owner_text(owner) for name, owner in sorted(self.owners.items())},
            "fused": sorted(self.fused),
            "calls": [[call.layer, _owner_text(call.input), _owner_text(call.output), call.batch_norm,
                       call.activation] for call in self.calls],
            "non_negative": sorted(_owner_text(owner) for owner in self.non_negative),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        return cls(
            {name: _owner(text) for name, text in values["owners"].items()},
            frozenset(values["fused"]),
            tuple(PlannedCall(layer, _owner(source), _owner(target), batch_norm, activation)
                  for layer, source, target, batch_norm, activation in values["calls"]),
            frozenset(_owner(text) for text in values["non_negative"]),
        )


def _owner_text(owner: Quantizer) -> str:
    return "%s:%s" % (owner.role.value, owner.layer)


def _owner(text: str) -> Quantizer:
    role, _, layer = text.partition(":")
    return Quantizer(layer, Role(role))


class Recorder(Handler):
    """Writes down the operations of one run; the run itself stays the user's float model."""

    def __init__(self, batch_norms: Mapping[int, str]) -> None:
        self._batch_norms = batch_norms  #: id of a running mean -> name of its module
        self._ops: List[Op] = []
        self._names: Dict[str, List[str]] = {}     #: tensor -> its own name, then those it has as an argument
        self._outputs: List[str] = []
        self._folded: Dict[str, str] = {}          #: tensor -> batch norm that made it
        self._sources: Set[str] = set()            #: inputs of the network
        self._non_negative_sources: Set[str] = set()

    def enter(self, name: str, value: Tensor, tracker: Tracker) -> Tensor:
        if not value.is_floating_point():
            return value
        mark = tracker.mark_of(value) or self._source(tracker.mark(value, name), value)
        self._names[_key(mark)].append(name)
        return value

    def execute(self, call: Call, tracker: Tracker) -> Any:
        if call.layer and call.marks[0] is None:
            mark = tracker.mark(call.inputs[0], "%s/input" % call.layer)
            call = call._replace(marks=(self._source(mark, call.inputs[0]),))
        self._running = call
        return call.run()

    def produced(self, call: Call, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        assert mark is not None
        sources = tuple(_key(source) for source in self._running.marks if source is not None)
        self._ops.append(Op(_key(mark), call.kind, sources, call.layer))
        self._names[_key(mark)] = [mark.name]
        if call.kind is OpKind.BATCH_NORM:
            running_mean = argument(call.args, call.kwargs, 1, "running_mean")
            self._folded[_key(mark)] = self._batch_norms.get(id(running_mean), "")
        return value

    def finish(self, outputs: Any, tracker: Tracker) -> Plan:
        """The plan, from everything seen; ``outputs`` is what the model returned."""
        for value in tensors_in(outputs):
            mark = tracker.mark_of(value)
            if mark is not None:
                self._outputs.append(_key(mark))
        placement = place(self._ops, self._outputs)
        producer = {op.output: op for op in self._ops}
        owners = self._owners(placement)
        fused: Set[str] = set()
        calls = []
        for call in placement.calls:
            chain = self._chain(call.fused, call.tensor, producer)
            fused.update(name for tensor in chain for name in self._names[tensor])
            calls.append(PlannedCall(
                call.layer, call.input, call.output,
                next((self._folded[tensor] for tensor in chain if tensor in self._folded), ""),
                next((producer[tensor].kind.value for tensor in chain if producer[tensor].kind in _ACTIVATIONS), "")))
        return Plan(owners, frozenset(fused), tuple(calls), self._non_negative(placement))

    def _owners(self, placement: Placement) -> Dict[str, Quantizer]:
        """Owners by name. A name of tensors on different grids (of a module used twice) is left to their readers."""
        by_name: Dict[str, Set[Quantizer]] = {}
        passed: Dict[str, Set[Quantizer]] = {}
        for tensor, owner in placement.on_grid.items():
            made, *arguments = self._names[tensor]
            by_name.setdefault(made, set()).add(owner)
            for name in arguments:
                (by_name if tensor in self._sources else passed).setdefault(name, set()).add(owner)
        for name in sorted(name for name, owners in by_name.items() if len(owners) > 1):
            logger.warning("tensor %r is on another grid each time its module runs; it is quantized where a layer "
                           "reads it, and not for other readers", name)
        # a tensor made inside is quantized when it is passed on; its names as an argument serve calls from outside
        return {name: next(iter(owners)) for name, owners in {**passed, **by_name}.items() if len(owners) == 1}

    def _non_negative(self, placement: Placement) -> FrozenSet[Quantizer]:
        """Owners that are never below zero; for inputs of the network the recorded data speak (an image in [0, 1])."""
        by_owner: Dict[Quantizer, Set[str]] = {}
        for tensor, owner in placement.quantizers.items():
            by_owner.setdefault(owner, set()).add(tensor)
        observed = {owner for owner, tensors in by_owner.items() if tensors <= self._non_negative_sources}
        return frozenset(placement.non_negative) | observed

    def _source(self, mark: Mark, value: Tensor) -> Mark:
        self._sources.add(_key(mark))
        self._names[_key(mark)] = [mark.name]
        if bool((value >= 0).all()):
            self._non_negative_sources.add(_key(mark))
        return mark

    @staticmethod
    def _chain(end: str, start: str, producer: Mapping[str, Op]) -> List[str]:
        chain = [end]
        while chain[-1] != start:
            chain.append(producer[chain[-1]].inputs[0])
        return chain


_ACTIVATIONS = (OpKind.RELU, OpKind.RELU6)


def _key(mark: Mark) -> str:
    return str(mark.serial)
