"""Running a model with its weights as they will be stored."""
from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Set

from slimtrain.callbacks.handling import Call, Handler
from slimtrain.callbacks.operations import argument
from slimtrain.callbacks.tracking import Tracker
from slimtrain.callbacks.weight_fake_quant import store_weight
from slimtrain.core import OpKind, WeightMode


class Storage(NamedTuple):
    """How the weights of one layer are stored."""

    bits: int
    mode: WeightMode
    block_size: int  #: 0 for a scale per output channel


class WeightSimulation(Handler):
    """Gives every layer its stored weight, wherever in the user's code it is used."""

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self._storages = storages
        self.used: Set[str] = set()  #: layers that a run has reached

    def execute(self, call: Call, tracker: Tracker) -> Any:
        if call.kind is not OpKind.LAYER:
            return call.run()
        self.used.add(call.layer)
        stored = store_weight(argument(call.args, call.kwargs, 1, "weight"), *self._storages[call.layer])
        bias = argument(call.args, call.kwargs, 2, "bias")
        rest = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}
        return call.function(call.inputs[0], stored, bias, *call.args[3:], **rest)

