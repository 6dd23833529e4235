"""What a training framework hands over per layer, checked at construction, and the messages made of it.

Only what deploys exactly can be expressed: symmetric, per tensor for activations, per output channel for weights,
``bits`` always 8 on the wire with narrower ranges given by the clamps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Iterable, Sequence, Tuple, Union

import numpy as np
from google.protobuf.message import Message

from slimtrain.core import Grid
from slimtrain.proto.schema import CompressionAlgo, LayerQuantizeParams, PruneParams, QuantizeParams

WIRE_BITS = 8
# The converter divides by multiplying with 1 / scale in float32, and a smaller number has no finite reciprocal there.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class QuantMethod(Enum):
    """How the runtime is told that the layer was trained; on x86 all of them compute the same."""

    QAT = LayerQuantizeParams.QAT
    OVERFLOW_AWARE = LayerQuantizeParams.OverflowAware
    WINOGRAD_AWARE = LayerQuantizeParams.WinogradAware


class PruneType(Enum):
    """Shape of the zeros: single weights, blocks of output channels, whole filters."""

    RANDOM = PruneParams.RANDOM
    SIMD_OC = PruneParams.SIMD_OC
    FILTER = PruneParams.FILTER


@dataclass(frozen=True, eq=False)
class LayerParams:
    """Full int8 of one convolution, or of a linear layer written as one.

    Attributes:
        name: what people call the layer; appears in messages and tables, the converter never compares it.
        output_names: every spelling under which the converter may know the output tensor; unmatched ones are harmless.
        input_scale, output_scale: float32 steps of the tensors before and after the layer.
        weight_scales: float32 steps of the weights, shape [output channels].
        input_grid, output_grid, weight_grid: integer levels inside int8.
        method: see ``QuantMethod``.
        op_name: name of the operator, where it is known.

    Raises:
        ValueError: an empty name, a scale that is no positive normal float32, scales that are not 1-D, a grid outside
            int8 or empty.
        TypeError: a grid or method of another kind.
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

    def __post_init__(self) -> None:
        _require_name(self.name)
        if isinstance(self.output_names, str):
            raise TypeError("layer {!r}: output_names must be a tuple of strings, got a string".format(self.name))
        if not self.output_names or not all(self.output_names):
            raise ValueError("layer {!r}: output_names must hold at least one name and no empty one, got {!r}".format(
                self.name, self.output_names))
        scales = np.array(self.weight_scales, dtype=np.float32)
        if scales.ndim != 1 or not scales.size:
            raise ValueError("layer {!r}: weight_scales must be 1-D with one entry per output channel, got shape {}"
                             .format(self.name, scales.shape))
        scales.setflags(write=False)
        object.__setattr__(self, "weight_scales", scales)
        object.__setattr__(self, "output_names", tuple(self.output_names))
        for what, values in (("input", [self.input_scale]), ("output", [self.output_scale]), ("weight", scales)):
            check_scales(self.name, what, values)
        for what, grid in (("input", self.input_grid), ("output", self.output_grid), ("weight", self.weight_grid)):
            if not isinstance(grid, Grid):
                raise TypeError("layer {!r}: {}_grid must be a Grid, got {!r}".format(self.name, what, grid))
            check_clamps(self.name, what, grid.lower, grid.upper)
        if not isinstance(self.method, QuantMethod):
            raise TypeError("layer {!r}: method must be a QuantMethod, got {!r}".format(self.name, self.method))


@dataclass(frozen=True)
class WeightOnlyParams:
    """Weight-only quantization of one operator: stored in ``bits``, computed in float.

    Attributes:
        name: what people call the layer.
        op_name: the operator as the converter names it.
        bits: 2..8.
        asymmetric: scale and minimum per channel instead of a scale alone.
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
            raise ValueError("layer {!r}: a weight-only entry is found by op_name, which is empty".format(self.name))
        if self.bits not in range(2, 9):
            raise ValueError("layer {!r}: bits must be 2..8, got {!r}".format(self.name, self.bits))
        check_block_size(self.name, self.block_size)


AnyLayer = Union[LayerParams, WeightOnlyParams]


def check_scales(layer: str, what: str, scales: Iterable[float]) -> None:
    """Raise ``ValueError`` by layer name unless every scale is a positive, normal, finite float32."""
    values = np.asarray(scales, dtype=np.float64).astype(np.float32)
    good = np.isfinite(values) & (values >= SMALLEST_SCALE)
    if not good.all():
        index = int(np.flatnonzero(~good)[0])
        raise ValueError("layer {!r}: {} scale {} of {} must be finite and at least {:.2g}, got {!r}".format(
            layer, what, index + 1, values.size, SMALLEST_SCALE, float(values[index])))


def check_clamps(layer: str, what: str, lower: int, upper: int) -> None:
    """Raise ``ValueError`` by layer name unless -128 <= lower <= upper <= 127."""
    if not -128 <= lower <= upper <= 127:
        raise ValueError("layer {!r}: {} range must lie in [-128, 127] and not be empty, got [{}, {}]".format(
            layer, what, lower, upper))


def check_block_size(layer: str, block_size: int) -> None:
    """Raise ``ValueError`` by layer name unless the block size is 0 or a positive multiple of 16."""
    if block_size < 0 or block_size % 16:
        raise ValueError("layer {!r}: block_size must be 0 or a multiple of 16, got {!r}".format(layer, block_size))


def quantize_algorithm(layers: Sequence[AnyLayer]) -> Message:
    """A ``CompressionAlgo`` of type QUANTIZE: one entry per spelling of each layer, in the order given.

    Raises:
        ValueError: no layers; one output name claimed by two layers (the converter would use the first for both).
    """
    if not layers:
        raise ValueError("nothing to quantize: no layers were given")
    owners = {}  # type: dict
    params = QuantizeParams(round_mode=QuantizeParams.ROUND_AWAY_FROM_ZERO)
    for layer in layers:
        keys = layer.output_names if isinstance(layer, LayerParams) else (layer.op_name,)
        for key in keys:
            if owners.setdefault((type(layer), key), layer) is not layer:
                raise ValueError("layers {!r} and {!r} both claim the name {!r}".format(
                    owners[type(layer), key].name, layer.name, key))
            if isinstance(layer, LayerParams):
                _add_full(params, layer, key)
            else:
                _add_weight_only(params, layer)
    return CompressionAlgo(type=CompressionAlgo.QUANTIZE, quant_params=params)


def prune_algorithm(prune_type: PruneType, weight_names: Sequence[str], sparsities: Sequence[float],
                    layer_names: Sequence[str], oc_blocks: Sequence[int] = ()) -> Message:
    """A ``CompressionAlgo`` of type PRUNE.

    Args:
        prune_type: the shape of the zeros.
        weight_names, sparsities, layer_names: per pruned weight: its tensor, share of zeros in [0, 1], owning layer.
        oc_blocks: per pruned weight the output channels of one block; for ``PruneType.SIMD_OC`` and only there.

    Raises:
        ValueError: lengths that differ, a share outside [0, 1], blocks missing or not wanted.
    """
    blocks = len(weight_names) if prune_type is PruneType.SIMD_OC else 0
    lengths = (len(weight_names), len(sparsities), len(layer_names), len(oc_blocks))
    if lengths != (len(weight_names),) * 3 + (blocks,):
        raise ValueError("{}: weight_names, sparsities, layer_names and oc_blocks must have {}, {}, {}, {} entries, "
                         "got {}".format(prune_type.name, *(len(weight_names),) * 3, blocks, lengths))
    for name, sparsity in zip(layer_names, sparsities):
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError("layer {!r}: sparsity must lie in [0, 1], got {!r}".format(name, sparsity))
    params = PruneParams(type=prune_type.value)
    level = params.simd_oc_pruner_params if prune_type is PruneType.SIMD_OC else params.level_pruner_params
    level.weight_tensor_names.extend(weight_names)
    level.prune_ratios.extend(sparsities)
    level.layer_names.extend(layer_names)
    if blocks:
        level.oc_blocks.extend(oc_blocks)
    return CompressionAlgo(type=CompressionAlgo.PRUNE, prune_params=params)


def _require_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError("a layer needs a name, got {!r}".format(name))


def _add_full(params: Message, layer: LayerParams, output_name: str) -> None:
    entry = params.layer.add(method=layer.method.value, op_name=layer.op_name or None)
    sides = ((entry.input, layer.name, layer.input_scale, layer.input_grid),
             (entry.output, output_name, layer.output_scale, layer.output_grid))
    for side, name, scale, grid in sides:
        side.add(name=name, bits=WIRE_BITS, scales=[scale], zero_point=0, clamp_min=grid.lower, clamp_max=grid.upper)
    entry.weight.add(name=layer.name, bits=WIRE_BITS, scales=layer.weight_scales.tolist(),
                     clamp_min=layer.weight_grid.lower, clamp_max=layer.weight_grid.upper, asymmetric=False)


def _add_weight_only(params: Message, layer: WeightOnlyParams) -> None:
    entry = params.layer.add(op_name=layer.op_name)
    entry.weight.add(name=layer.name, bits=layer.bits, asymmetric=layer.asymmetric, block_size=layer.block_size)
