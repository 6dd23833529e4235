"""Which layers bear Winograd's transforms in int8: one run that computes each of them in every form it could take."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.handling import Call
from slimtrain.callbacks.layer_scales import scales_of
from slimtrain.callbacks.operations import argument
from slimtrain.callbacks.ranks import average_over_ranks, least_over_ranks
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracking import Tracker
from slimtrain.callbacks.winograd import Geometry, WinogradLayerScales, geometry
from slimtrain.core import Quantizer as Owner
from slimtrain.core import WinogradForm
from slimtrain.core.winograd_choice import FormTrial, WinogradChoice, choose_form, try_form

_MOST_IMAGES = 16


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
        self._tried: Dict[str, Dict[WinogradForm, List[FormTrial]]] = {}
        self._impossible: Dict[str, str] = {}

    def begin(self, tracker: Tracker) -> None:
        super().begin(tracker)
        self._exact = False

    def compute(self, call: Call, owner: Owner, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        scales = self._candidates.get(call.layer)
        if scales is not None and uses_plain_strides(call):
            images = _array(x[:_MOST_IMAGES])
            steps = self._scale(owner).item(), _array(scales_of(self._modules[call.layer]).weight_scale())
            forms = self._tried.setdefault(call.layer, {form: [] for form in scales.forms})
            for form, tried in forms.items():
                where = geometry_of(call, form)
                tried.append(try_form(images, _array(weight), form, *steps, (where.rows, where.columns)))
        elif scales is not None:
            self._impossible[call.layer] = "the model calls it with a stride, a dilation or groups"
        return super().compute(call, owner, x, weight, bias)

    def choose(self, smallest_sqnr_db: float) -> List[WinogradChoice]:
        """Give each candidate the first of its forms that is near enough to plain int8; equal on all ranks."""
        choices = []
        for name, scales in self._candidates.items():
            impossible = self._impossible.get(name, "")
            if name not in self._tried and not impossible:
                impossible = "the model's forward does not use it"
            tried = {} if impossible else self._tried[name]
            results = {form: _over_ranks(runs, scales.weight.device) for form, runs in tried.items()}
            sqnr_db = {form: result[1] for form, result in results.items()}
            choice = choose_form(name, sqnr_db, smallest_sqnr_db, impossible)
            scales.form = choice.form
            if choice.form is not None:
                scales.start(results[choice.form][0], self._scale(self._inputs[name]))
            choices.append(choice)
        return choices


def _over_ranks(runs: List[FormTrial], device: torch.device) -> Tuple[Tensor, float]:
    """The mean of the scales, and the worst result, over the layer's uses and over ranks."""
    scales = torch.stack([torch.from_numpy(run.scales) for run in runs]).mean(dim=0).to(device)
    worst = torch.tensor(min(run.sqnr_db for run in runs), device=device)
    average_over_ranks(scales)
    least_over_ranks(worst)
    return scales, worst.item()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().double().cpu().numpy()
