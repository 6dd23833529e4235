"""What a training framework hands over per layer, checked at construction.

Only what deploys exactly can be expressed: one scale per activation tensor, one per output channel of the weights,
and ranges narrower than 8 bits as narrower grids. Levels count from the real number 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional, Tuple, Union

import numpy as np

from slimtrain.core import Grid, WinogradScales
from slimtrain.proto.checks import check_clamps, check_levels, check_scales, check_weight_only
from slimtrain.proto.schema import LayerQuantizeParams
from slimtrain.proto.winograd import check_winograd


class QuantMethod(Enum):
    """How the runtime is told that the layer was trained; on x86 all of them compute the same."""

    QAT = LayerQuantizeParams.QAT
    OVERFLOW_AWARE = LayerQuantizeParams.OverflowAware
    WINOGRAD_AWARE = LayerQuantizeParams.WinogradAware


@dataclass(frozen=True, eq=False)
class LayerParams:
    """Full int8 of one convolution, or of one linear layer that is deployed as a convolution.

    A layer that is called twice is two of these, each with a name of its own; so is every group of a grouped
    convolution (``conv2[group 1]``), because the converter makes one operator of each.

    Attributes:
        name: what people call the layer, unique in a model; the converter never compares it.
        output_names: every spelling under which the converter may know the output tensor; unmatched ones are
            harmless.
        input_scale: float32 step of the tensor before the layer.
        output_scale: float32 step of the tensor after the layer and the activation fused into it.
        weight_scales: float32 steps of the weights, shape [output channels].
        input_grid, output_grid: at most 256 levels; those that do not fit int8 (0..255) have a zero point in the
            file, which MNN computes exactly in convolutions, but not in every other operation.
        weight_grid: integer levels, inside int8.
        method: see ``QuantMethod``.
        op_name: name of the operator in the converted model, if known; helps to explain a layer that is not
            found.
        winograd: how the transformed input and weights of a ``WINOGRAD_AWARE`` layer are quantized.

    Raises:
        ValueError: an empty name; a scale that is no finite, positive, normal float32; scales that are not
            1-D; a grid that is empty or not inside int8; ``winograd`` without its method or ill-shaped.
        TypeError: names, a grid or a method of another kind.
    """

    name: str
    output_names: Tuple[str, ...]
    input_scale: float
    output_scale: float
    weight_scales: np.ndarray
    input_grid: Grid
    output_grid: Grid
    weight_grid: Grid
    method: QuantMethod = QuantMethod.QAT
    op_name: str = ""
    winograd: Optional[WinogradScales] = None

    def __post_init__(self) -> None:
        _require_name(self.name)
        object.__setattr__(self, "output_names", _names(self.name, self.output_names))
        object.__setattr__(self, "weight_scales", _channel_scales(self.name, self.weight_scales))
        for field in ("input_scale", "output_scale"):
            object.__setattr__(self, field, _tensor_scale(self.name, field, getattr(self, field)))
        for side in ("input", "output", "weight"):
            grid = getattr(self, side + "_grid")
            if not isinstance(grid, Grid):
                raise TypeError(f"layer {self.name!r}: {side}_grid must be a Grid, got {grid!r}")
            if side == "weight":
                check_clamps(self.name, side, grid.lower, grid.upper)
            else:
                check_levels(self.name, side, grid)
        if not isinstance(self.method, QuantMethod):
            raise TypeError(f"layer {self.name!r}: method must be a QuantMethod, got {self.method!r}")
        if self.winograd is not None:
            if self.method is not QuantMethod.WINOGRAD_AWARE:
                raise ValueError(f"layer {self.name!r}: Winograd scales need method WINOGRAD_AWARE, got {self.method}")
            check_winograd(self.name, self.winograd, len(self.weight_scales))


@dataclass(frozen=True)
class WeightOnlyParams:
    """Weight-only quantization of one operator: stored in few bits, computed in float.

    Attributes:
        name: what people call the layer.
        op_name: the operator as the converter names it.
        bits: 2..8.
        asymmetric: a minimum and a scale per channel instead of a scale alone.
        block_size: input channels that share a scale, a multiple of 16; 0 for one scale per output channel.

    Raises:
        ValueError: an empty name, bits outside 2..8, a block size the converter does not take.
    """

    name: str
    op_name: str
    bits: int
    asymmetric: bool = False
    block_size: int = 0

    def __post_init__(self) -> None:
        _require_name(self.name)
        if not self.op_name:
            raise ValueError(f"layer {self.name!r}: a weight-only entry is found by op_name, which is empty")
        check_weight_only(self.name, self.bits, self.block_size)


AnyLayer = Union[LayerParams, WeightOnlyParams]


def _require_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a layer's name must be a string, got {name!r}")
    if not name:
        raise ValueError("a layer needs a name, got an empty one")


def _names(layer: str, names: Tuple[str, ...]) -> Tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"layer {layer!r}: output_names must be a tuple of strings, got {names!r}")
    if not names or not all(names):
        raise ValueError(f"layer {layer!r}: output_names needs a name and no empty one, got {names!r}")
    return tuple(dict.fromkeys(names))


def _tensor_scale(layer: str, field: str, scale: float) -> float:
    value = np.asarray(scale)
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise TypeError(f"layer {layer!r}: {field} must be one number, got {scale!r}")
    check_scales(layer, field[: -len("_scale")], value)
    return float(value.reshape(()))


def _channel_scales(layer: str, scales: np.ndarray) -> np.ndarray:
    values = np.array(scales, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"layer {layer!r}: weight_scales must be 1-D, one per output channel, got shape {values.shape}"
        )
    check_scales(layer, "weight", values)
    stored = values.astype(np.float32)
    stored.setflags(write=False)
    return stored
