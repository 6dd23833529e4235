"""Observing the tensors of a model, in bounded memory, and setting scales from everything seen of them."""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.handling import Call
from slimtrain.callbacks.layer_scales import LayerScales
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import (
    ActivationMethod,
    Observation,
    Quantizer,
    Role,
    calibrated_scale,
    observe_sample,
    sample_stride,
)

Observations = Dict[Quantizer, Observation]


class _Batch(NamedTuple):
    """What the present run has shown of the tensors that share a scale."""

    lowest: float
    highest: float
    parts: List[np.ndarray]


class Observing(Simulation):
    """A simulation that sets the scale of each tensor from all runs up to the present one.

    Args:
        modules, plan: see :class:`Simulation`.
        method: from what was seen to a scale.
        observing: tells whether the present run counts; the others only simulate.
        seen: what was seen before.
    """

    runs_activations = False

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan, method: ActivationMethod,
                 observing: Callable[[], bool] = lambda: True, seen: Optional[Mapping[Quantizer, Observation]] = None
                 ) -> None:
        super().__init__(modules, plan)
        self._method = method
        self._observing = observing
        self._counts = False
        self._seen: Observations = dict(seen or {})   #: before the present run
        self._now: Dict[Quantizer, _Batch] = {}

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        self._seen, self._now = self.counted(), {}
        self._counts = self._observing()
        self._exact = self._exact and not self._counts

    def counted(self) -> Observations:
        """What has been seen, the latest run included."""
        return {**self._seen, **{owner: self._including(owner) for owner in self._now}}

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        if self._counts:
            self._take(value, owner)
            scale = calibrated_scale(self._including(owner), scales.grid(owner.role), self._method)
            scales.set_activation_scale(owner.role, scale)
        return super().quantize(value, owner, scales)

    def _take(self, value: Tensor, owner: Quantizer) -> None:
        flat = value.detach().reshape(-1)
        # two numbers and a small part cross from the device to the host
        lowest, highest = torch.stack(torch.aminmax(flat)).tolist()
        part = flat[::sample_stride(flat.numel())].float().cpu().numpy()
        known = self._now.get(owner)
        if known is None:
            self._now[owner] = _Batch(lowest, highest, [part])
        else:
            self._now[owner] = _Batch(min(lowest, known.lowest), max(highest, known.highest), [*known.parts, part])

    def _including(self, owner: Quantizer) -> Observation:
        lowest, highest, parts = self._now[owner]
        try:
            return observe_sample(self._seen.get(owner, Observation()), lowest, highest, np.concatenate(parts))
        except ValueError as error:
            raise ValueError("%s of layer %r: %s" % (owner.role.value, owner.layer, error)) from error


class FloatObserving(Observing):
    """Observes the tensors of the float model, which goes on computing as it is."""

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        self._exact = False

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        if self._counts:
            self._take(value, owner)
        return value

    def _run_layer(self, call: Call, tracker: Tracker) -> Tensor:
        self._layer_input(call, tracker)
        return call.run()


def observations_state(seen: Mapping[Quantizer, Observation]) -> List[Dict[str, Any]]:
    """Observations as plain numbers, strings and tensors, for a checkpoint."""
    return [{"layer": owner.layer, "role": owner.role.value, **state._asdict(),
             "counts": torch.from_numpy(np.array(state.counts))} for owner, state in seen.items()]


def observations_of(state: List[Dict[str, Any]]) -> Observations:
    """The inverse of :func:`observations_state`."""
    found = {}
    for entry in state:
        fields = {name: value for name, value in entry.items() if name not in ("layer", "role")}
        fields["counts"] = entry["counts"].cpu().numpy()
        found[Quantizer(entry["layer"], Role(entry["role"]))] = Observation(**fields)
    return found


def observed_batches(seen: Mapping[Quantizer, Observation]) -> Dict[Tuple[str, str], int]:
    """How many batches each observer saw, by layer and role ("input" or "output")."""
    return {(owner.layer, owner.role.value): state.batches for owner, state in seen.items()}
