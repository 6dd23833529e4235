"""Winograd-aware quantization: LSQ for convolutions that the device computes by Winograd's transforms in int8.

Fernandez-Marques et al., arXiv 2002.10711: what the transforms do to quantized numbers is part of training.
"""
from __future__ import annotations

import logging
from typing import Any, Collection, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.deployment import DeployedLayer, IntegerLayer
from slimtrain.callbacks.handling import Call
from slimtrain.callbacks.layer_scales import LayerScales, scales_of
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.winograd import WinogradLayerScales, possible_forms, winograd_conv, winograd_on_device
from slimtrain.callbacks.winograd_trial import WinogradTrial, geometry_of
from slimtrain.core import Grid, WinogradForm, WinogradScales
from slimtrain.core import Quantizer as Owner
from slimtrain.core.winograd_choice import WinogradChoice, check_sqnr
from slimtrain.proto import QuantMethod

logger = logging.getLogger(__name__)


class WAQQuantizer(LSQQuantizer):
    """LSQ that also trains the scales of transformed inputs and weights, one per position of a tile.

    When the first scales are chosen, every dense convolution of stride 1 is tried as F(4, k) and F(2, k): it takes the
    first of them whose output is near enough to that of plain int8, or stays plain int8. ``choices`` says what became
    of each. Transformed numbers have 8 bits, whatever ``bits`` says.

    Args:
        model: a float model, best a trained one.
        skip_quant_layers: names or patterns (``features.*``) of layers that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales as they start.
        retain_sparsity: weights that are zero now stay zero.
        min_sqnr_db: how near the output of a transformed layer must be to that of plain int8 before training, in dB.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative an unsigned range.
        scale_lr_ratio: learning rate of the scales over that of their parameter group.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: bits outside 2..8, an unknown layer name, nothing to quantize, ``min_sqnr_db`` no number.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, min_sqnr_db: float = 25.0,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, scale_lr_ratio: float = 1.0) -> None:
        check_sqnr(min_sqnr_db)
        super().__init__(model, skip_quant_layers, bits, debug_info, retain_sparsity=retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, scale_lr_ratio=scale_lr_ratio)
        self.min_sqnr_db = min_sqnr_db
        self.choices: Tuple[WinogradChoice, ...] = ()  #: of each candidate, once scales have been chosen

    @property
    def forms(self) -> Dict[str, WinogradForm]:
        """The layers that are computed by Winograd's transforms."""
        return {choice.layer: choice.form for choice in self.choices if choice.form is not None}

    def make_scales(self, layer: nn.Module) -> LayerScales:
        forms = possible_forms(layer)
        if not forms:
            return super().make_scales(layer)
        return WinogradLayerScales(layer, self.bits, self._retain_sparsity, forms)

    def scale_sizes(self) -> Dict[int, float]:
        """Also of the scales by position, most of which are of transformed weights."""
        positions = {id(scales.positions): scales.sizes.weight for scales in self._candidates().values()}
        return {**super().scale_sizes(), **positions}

    def make_simulation(self) -> Simulation:
        return WinogradSimulation(self.modules(), self.known_plan())

    def calibrate(self, batches: Iterable[Any]) -> int:
        """Find a start for all scales, and the form of each layer by the last batch; see the base class."""
        latest: List[Any] = []
        count = super().calibrate(_remembering(batches, latest))
        trial = WinogradTrial(self.modules(), self.known_plan(), self._candidates())
        self.run_quietly(latest[0], trial)
        self.choices = tuple(trial.choose(self.min_sqnr_db))
        for choice in self.choices:
            tried = ", ".join("%s %.1f dB" % item for item in choice.sqnr_db.items())
            logger.info("%s: %s (%s)", choice.layer, choice.form or "plain int8, because of " + choice.reason, tried)
        return count

    def deployed_layers(self) -> List[DeployedLayer]:
        """Every use of a quantized layer; those that are computed by Winograd's transforms say how."""
        return [self._with_form(layer) for layer in super().deployed_layers()]

    def _with_form(self, layer: DeployedLayer) -> DeployedLayer:
        own = self.scales[layer.name]
        if not isinstance(own, WinogradLayerScales) or own.form is None:
            return layer
        owner = layer.call.input
        ratios = own.ratios(own.form, self.scales[owner.layer].activation_scale(owner.role), own.weight_scale())
        array = ratios.double().cpu().numpy()
        return layer._replace(method=QuantMethod.WINOGRAD_AWARE,
                              winograd=WinogradScales(own.form, array[:, 0], array[:, 1:]))

    # -- state

    def configuration(self) -> Dict[str, Any]:
        configuration = super().configuration()
        del configuration["mode"]
        return {**configuration, "min_sqnr_db": self.min_sqnr_db}

    def state_dict(self) -> Dict[str, Any]:
        positions = {name: torch.stack([scales.positions.detach(), scales.units])
                     for name, scales in self._candidates().items()}
        choices = [[choice.layer, list(choice.form or ()),
                    [[list(form), value] for form, value in choice.sqnr_db.items()], choice.reason]
                   for choice in self.choices]
        return {**super().state_dict(), "winograd_positions": positions, "winograd_choices": choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.choices = tuple(
            WinogradChoice(layer, WinogradForm(*form) if form else None,
                           {WinogradForm(*each): value for each, value in tried}, reason)
            for layer, form, tried, reason in state["winograd_choices"])
        with torch.no_grad():
            for name, scales in self._candidates().items():
                scales.positions.copy_(state["winograd_positions"][name][0])
                scales.units.copy_(state["winograd_positions"][name][1])
                scales.form = self.forms.get(name)

    def _candidates(self) -> Dict[str, WinogradLayerScales]:
        return {name: scales for name, scales in self.scales.items() if isinstance(scales, WinogradLayerScales)}


class WinogradSimulation(Simulation):
    """A simulation in which layers with a form are computed by it."""

    def compute(self, call: Call, owner: Owner, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        scales = scales_of(self._modules[call.layer])
        if not isinstance(scales, WinogradLayerScales):
            return super().compute(call, owner, x, weight, bias)
        if scales.form is None:
            # DDP waits for a gradient of every parameter that it knows
            return super().compute(call, owner, x, weight, bias) + 0 * scales.positions.sum()
        where = geometry_of(call, scales.form)
        return winograd_conv(x, weight, bias, scales, scales.form, self._scale(owner), where)

    def compute_integers(self, call: Call, owner: Owner, integer: IntegerLayer, x: Tensor,
                         grids: Tuple[Grid, Grid, Grid]) -> Tensor:
        scales = scales_of(self._modules[call.layer])
        if not isinstance(scales, WinogradLayerScales) or scales.form is None:
            return super().compute_integers(call, owner, integer, x, grids)
        ratios = scales.ratios(scales.form, integer.input_scale, scales.weight_scale())
        return winograd_on_device(integer, x, ratios, scales.form, geometry_of(call, scales.form), grids[2])


def _remembering(batches: Iterable[Any], latest: List[Any]) -> Iterator[Any]:
    for batch in batches:
        latest[:] = [batch]
        yield batch
