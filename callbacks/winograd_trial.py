"""Which layers bear Winograd's transforms in int8: one run that computes each of them in every form it could take."""
from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.operations import argument
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Call, Tracker
from slimtrain.callbacks.winograd import (
    Geometry,
    WinogradLayerScales,
    geometry,
    transform_input,
    transform_weight,
    winograd_conv,
)
from slimtrain.core import Grid, WinogradForm, mse_scale, sqnr_db
from slimtrain.core import Quantizer as Owner
from slimtrain.core.winograd import LARGEST_TRANSFORMED

_GRID = Grid(8, -LARGEST_TRANSFORMED, LARGEST_TRANSFORMED)
_MOST_VALUES = 1 << 14  # of one position, for the search of its scale


class WinogradChoice(NamedTuple):
    """What was decided about one layer."""

    layer: str
    form: Optional[WinogradForm]          #: None for plain int8
    sqnr_db: Dict[WinogradForm, float]    #: of the layer's output against that of plain int8, by form that was tried
    reason: str                           #: why it is plain int8; "" when it is not


class _Tried(NamedTuple):
    scales: Tensor      #: float32 [positions, 1 + O], see ``WinogradLayerScales.start``
    sqnr_db: float


def uses_plain_strides(call: Call) -> bool:
    """Whether a call is one that a Winograd form can compute, whatever its module says."""
    wanted = {(3, "stride"), (5, "dilation"), (6, "groups")}
    values = [argument(call.args, call.kwargs, position, name, 1) for position, name in wanted]
    return all(value == 1 or (isinstance(value, (tuple, list)) and set(value) == {1}) for value in values)


def geometry_of(call: Call, form: WinogradForm) -> Geometry:
    """The padding of a call of ``torch.conv2d``."""
    return geometry(argument(call.args, call.kwargs, 4, "padding", 0), form.kernel)


class WinogradTrial(Simulation):
    """A run in plain int8 that computes every candidate in each of its forms beside it."""

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan,
                 candidates: Mapping[str, WinogradLayerScales]) -> None:
        super().__init__(modules, plan)
        self._candidates = candidates
        self._tried: Dict[str, Dict[WinogradForm, List[_Tried]]] = {}
        self._impossible: Dict[str, str] = {}

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        self._exact = False

    def compute(self, call: Call, owner: Owner, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        plain = super().compute(call, owner, x, weight, bias)
        scales = self._candidates.get(call.layer)
        if scales is not None:
            if uses_plain_strides(call):
                forms = self._tried.setdefault(call.layer, {form: [] for form in scales.forms})
                for form, tried in forms.items():
                    tried.append(self._try(call, form, scales, owner, (x.float(), weight.float(), bias, plain.float())))
            else:
                self._impossible[call.layer] = "the model calls it with a stride, a dilation or groups"
        return plain

    def choose(self, smallest_sqnr_db: float) -> List[WinogradChoice]:
        """Give each candidate the first of its forms that is near enough to plain int8; equal on all ranks."""
        choices = []
        for name, scales in self._candidates.items():
            tried = {} if name in self._impossible else self._tried.get(name, {})
            results = {form: self._over_ranks(runs) for form, runs in tried.items()}
            form = next((form for form in results if results[form].sqnr_db >= smallest_sqnr_db), None)
            reason = self._impossible.get(name, "" if tried else "the model's forward does not use it")
            if tried and form is None:
                reason = "its sensitivity: no form is within %g dB of plain int8" % smallest_sqnr_db
            scales.form = form
            if form is not None:
                scales.start(results[form].scales, self._scale(self._inputs[name]))
            choices.append(WinogradChoice(name, form, {each: run.sqnr_db for each, run in results.items()}, reason))
        return choices

    def _try(self, call: Call, form: WinogradForm, scales: WinogradLayerScales, owner: Owner,
             operands: Tuple[Tensor, Tensor, Optional[Tensor], Tensor]) -> _Tried:
        x, weight, bias, plain = operands
        where = geometry_of(call, form)
        inputs = _best_scales(_sampled(transform_input(x, form, where).flatten(1)))
        weights = _best_scales(transform_weight(weight, form).flatten(0, 1)).reshape(form.positions, -1)
        found = torch.cat([inputs[:, None], weights], dim=1)
        scales.start(found, self._scale(owner))
        result = winograd_conv(x, weight, bias, scales, form, self._scale(owner), where)
        return _Tried(found, sqnr_db(plain.cpu().numpy(), result.cpu().numpy()))

    @staticmethod
    def _over_ranks(runs: List[_Tried]) -> _Tried:
        """The mean of the scales, and the worst result, over the layer's uses and over ranks."""
        scales = torch.stack([run.scales for run in runs]).mean(dim=0)
        worst = torch.tensor(min(run.sqnr_db for run in runs), device=scales.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(scales)
            scales /= torch.distributed.get_world_size()
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MIN)
        return _Tried(scales, worst.item())


def _sampled(rows: Tensor) -> Tensor:
    return rows[:, ::max(1, rows.shape[1] // _MOST_VALUES)]


def _best_scales(rows: Tensor) -> Tensor:
    """The scale with the least squared error of every row."""
    found = mse_scale(rows.detach().cpu().numpy(), _GRID, axis=0)
    return torch.from_numpy(np.asarray(found, dtype=np.float32)).to(rows.device)
