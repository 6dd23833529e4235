"""The learned scales of one layer, beside its weights but outside the model's ``state_dict``."""
from __future__ import annotations

import math
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.fake_quant import NO_BOUNDS, Bounds, Range
from slimtrain.callbacks.ranks import are_several, average_over_ranks
from slimtrain.core import SMALLEST_SCALE, Grid, Role, activation_grid, mse_scale, weight_grid

#: the attribute of a layer under which its scales hang
SCALES = "slimtrain_scales"


class Bits(NamedTuple):
    """Bit widths of one layer, 2 to 8."""

    weight: int
    activation: int


class ScaleSizes(NamedTuple):
    """The size of a layer's scales when training of them began: powers of two, so that many layers share one."""

    weight: float
    activation: float


class LayerScales(nn.Module):
    """Scales and integer ranges of one layer.

    The scales are parameters, so that any optimizer trains them and DDP averages their gradients, but nothing of
    this module appears in a ``state_dict``: a checkpoint of the model stays that of the float model.
    The two activation scales share one parameter, so that the one a network does not use still has a gradient (zero)
    and DDP has no unused parameters.

    Args:
        layer: a convolution or linear layer; its weight gives the shape, device and start of the weight scales.
        bits: bit widths.
        keep_zeros: weights that are zero now stay zero.
    """

    weight: nn.Parameter      #: float32 [out_channels]
    activation: nn.Parameter  #: float32 [2]: input, output
    keep: Optional[Tensor]    #: bool, like the weight: False stays zero

    def __init__(self, layer: nn.Module, bits: Bits, keep_zeros: bool = False) -> None:
        super().__init__()
        weight = layer.weight
        if not isinstance(weight, Tensor):
            raise TypeError("a quantized layer needs a weight tensor, %s has %r" % (type(layer).__name__, weight))
        self.bits = bits
        self.weight_grid = weight_grid(bits.weight)
        self._grids = {role: activation_grid(bits.activation) for role in Role}
        start = mse_scale(weight.detach().float().cpu().numpy(), self.weight_grid, axis=0)
        self.weight = nn.Parameter(torch.from_numpy(np.array(start, dtype=np.float32)).to(weight.device))
        self.activation = nn.Parameter(torch.ones(2, device=weight.device))
        self.sizes = ScaleSizes(1.0, 1.0)
        self.compiles_all = False  #: see :class:`Range`
        self._ranges: Dict[Tuple[int, Bounds], Range] = {}  #: by row of the levels
        self.register_buffer("keep", weight.detach() != 0 if keep_zeros else None, persistent=False)

    def grid(self, role: Role) -> Grid:
        """Integer levels of the layer's input or output."""
        return self._grids[role]

    def set_grid(self, role: Role, grid: Grid) -> None:
        """Choose the integer levels of the layer's input or output."""
        self._grids[role] = grid
        self._ranges = {}

    def set_weight_grid(self, grid: Grid) -> None:
        """Choose the integer levels of the weights."""
        self.weight_grid = grid
        self._ranges = {}

    def measure_sizes(self, roles: Collection[Role]) -> None:
        """Take the scales as they are for their size; of the activations, those of ``roles``, which are in use."""
        used = [self.activation[_POSITION[role]] for role in roles]
        self.sizes = ScaleSizes(_power_of_two(self.weight), _power_of_two(torch.stack(used)) if used else 1.0)

    def weight_scale(self) -> Tensor:
        """Positive scales, [out_channels], differentiable."""
        return positive(self.weight)

    def activation_scale(self, role: Role) -> Tensor:
        """A positive scalar scale, differentiable."""
        return positive(self.learned_activation(role))

    def learned_activation(self, role: Role) -> Tensor:
        """The learned scalar of which :meth:`activation_scale` is the magnitude."""
        return self.activation[_POSITION[role]]

    def weight_range(self) -> Range:
        """Integer range of the weights."""
        return self._range(0)

    def activation_range(self, role: Role, bounds: Bounds = NO_BOUNDS) -> Range:
        """Integer range of the input or output, behind an activation with these bounds."""
        return self._range(1 + _POSITION[role], bounds)

    def rounded(self, nearest: Tensor, weight: Tensor) -> Tensor:
        """The integer levels of a weight that go to the device, given the nearest ones."""
        return nearest

    def bias_correction(self) -> Optional[Tensor]:
        """What the bias of the deployed layer makes up for, float64 [O] before a batch norm; None for nothing."""
        return None

    def set_activation_scale(self, role: Role, scale: Union[float, Tensor]) -> None:
        """Overwrite one activation scale."""
        with torch.no_grad():
            self.activation[_POSITION[role]] = scale

    def _range(self, row: int, bounds: Bounds = NO_BOUNDS) -> Range:
        known = self._ranges.get((row, bounds))
        if known is None:
            grid = self._all_grids()[row]
            with torch.inference_mode(False):  # kept for training, whoever asks first
                known = Range.of(grid.lower, grid.upper, SMALLEST_SCALE, bounds, self.compiles_all, self.weight.device)
            self._ranges[(row, bounds)] = known
        return known

    def _all_grids(self) -> List[Grid]:
        return [self.weight_grid, self._grids[Role.INPUT], self._grids[Role.OUTPUT]]

    # nothing of this module belongs to the user's state_dict

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        pass

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._ranges = {}  # they lie on the device of the scales
        # ``module.half()`` moves scales between devices, but does not narrow them: a bfloat16 scale has 8 bits left
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)


_POSITION = {Role.INPUT: 0, Role.OUTPUT: 1}


def _power_of_two(scales: Tensor) -> float:
    """The power of two next to the geometric mean of some scales."""
    size = float(scales.detach().abs().clamp_min(SMALLEST_SCALE).log2().mean())
    return math.ldexp(1.0, round(size))


def positive(scale: Tensor) -> Tensor:
    """The scale that is used for a learned value, which an optimizer step may take below zero."""
    return scale.abs().clamp_min(SMALLEST_SCALE)


def scales_of(layer: nn.Module) -> LayerScales:
    """The scales of a quantized layer."""
    scales: Optional[Any] = getattr(layer, SCALES, None)
    if not isinstance(scales, LayerScales):
        raise RuntimeError("layer %s has no scales: call convert() first" % type(layer).__name__)
    return scales


def average_activation_scales(scales: Sequence[LayerScales]) -> None:
    """Every rank has seen other data: all go on with the mean, in one collective operation."""
    if not are_several():
        return
    stacked = torch.stack([own.activation.detach() for own in scales])
    average_over_ranks(stacked)
    with torch.no_grad():
        for own, mean in zip(scales, stacked):
            own.activation.copy_(mean)


def scales_state(scales: Mapping[str, LayerScales]) -> Dict[str, Any]:
    """All that is learned or was found out of the scales of some layers, by layer: plain tensors and numbers."""
    return {
        "weight": {name: own.weight.detach().clone() for name, own in scales.items()},
        "activation": {name: own.activation.detach().clone() for name, own in scales.items()},
        "sizes": {name: list(own.sizes) for name, own in scales.items()},
        "keep": {name: own.keep.clone() for name, own in scales.items() if own.keep is not None},
    }


def load_scales(scales: Mapping[str, LayerScales], state: Mapping[str, Any]) -> None:
    """Restore what :func:`scales_state` gave.

    Raises:
        ValueError: the state is that of other layers.
    """
    differing = sorted(set(state["weight"]) ^ set(scales))
    if differing:
        raise ValueError("the saved scales are of other layers than this model quantizes: %s" % ", ".join(differing))
    with torch.no_grad():
        for name, own in scales.items():
            own.weight.copy_(state["weight"][name])
            own.activation.copy_(state["activation"][name])
            own.sizes = ScaleSizes(*state["sizes"][name])
            if own.keep is not None and name in state["keep"]:
                own.keep.copy_(state["keep"][name])
