"""The messages of one compression algorithm, made of checked values."""

from __future__ import annotations

from enum import Enum
from typing import Any, Dict, Sequence, Tuple

from slimtrain.core import Grid, stored_zero_point
from slimtrain.proto.checks import NO_TENSOR, WIRE_BITS
from slimtrain.proto.layers import AnyLayer, LayerParams, WeightOnlyParams
from slimtrain.proto.schema import CompressionAlgo, Message, PruneParams, QuantizeParams
from slimtrain.proto.winograd import units_attr


class PruneType(Enum):
    """Shape of the zeros: single weights, blocks of output channels, whole filters."""

    RANDOM = PruneParams.RANDOM
    SIMD_OC = PruneParams.SIMD_OC
    FILTER = PruneParams.FILTER


def quantize_algorithm(layers: Sequence[AnyLayer]) -> Message:
    """A ``CompressionAlgo`` of type QUANTIZE: one entry per spelling of each layer, in the order given.

    Raises:
        ValueError: no layers; two layers of one name; an output or operator that two layers claim (the
            converter would take the first entry for both).
    """
    if not layers:
        raise ValueError("nothing to quantize: no layers were given")
    _refuse_shared_names(layers)
    params = QuantizeParams(round_mode=QuantizeParams.ROUND_AWAY_FROM_ZERO)
    for layer in layers:
        if isinstance(layer, LayerParams):
            for output_name in layer.output_names:
                _add_full(params, layer, output_name)
        else:
            _add_weight_only(params, layer)
    return CompressionAlgo(type=CompressionAlgo.QUANTIZE, quant_params=params)


def prune_algorithm(
    prune_type: PruneType,
    weight_names: Sequence[str],
    sparsities: Sequence[float],
    layer_names: Sequence[str],
    oc_blocks: Sequence[int] = (),
) -> Message:
    """A ``CompressionAlgo`` of type PRUNE.

    Args:
        prune_type: the shape of the zeros.
        weight_names, sparsities, layer_names: for every pruned weight its tensor, its share of zeros in [0,
            1], and the layer that owns it.
        oc_blocks: for every pruned weight the output channels of one block; with ``SIMD_OC`` and only there.

    Raises:
        ValueError: lengths that differ, a share outside [0, 1], blocks that are missing or not wanted.
    """
    count = len(weight_names)
    blocks = count if prune_type is PruneType.SIMD_OC else 0
    lengths = (len(sparsities), len(layer_names), len(oc_blocks))
    if lengths != (count, count, blocks):
        raise ValueError(
            f"pruning {prune_type.name} of {count} weights needs as many sparsities and layer_names, and "
            f"{blocks} oc_blocks; got {lengths[0]}, {lengths[1]} and {lengths[2]}"
        )
    for name, sparsity in zip(layer_names, sparsities):
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"layer {name!r}: sparsity must lie in [0, 1], got {sparsity!r}")
    params = PruneParams(type=prune_type.value)
    target = params.simd_oc_pruner_params if blocks else params.level_pruner_params
    target.weight_tensor_names.extend(weight_names)
    target.prune_ratios.extend(sparsities)
    target.layer_names.extend(layer_names)
    if blocks:
        target.oc_blocks.extend(oc_blocks)
    return CompressionAlgo(type=CompressionAlgo.PRUNE, prune_params=params)


def _refuse_shared_names(layers: Sequence[AnyLayer]) -> None:
    owners: Dict[Tuple[str, str], AnyLayer] = {}
    for layer in layers:
        claims = [("name", layer.name)]
        if isinstance(layer, LayerParams):
            claims += [("output", name) for name in layer.output_names]
        else:
            claims += [("operator", layer.op_name)]
        for claim in claims:
            owner = owners.setdefault(claim, layer)
            if owner is not layer:
                raise ValueError(
                    f"layers {owner.name!r} and {layer.name!r} have the same {claim[0]} {claim[1]!r}"
                )


def _add_full(params: Message, layer: LayerParams, output_name: str) -> None:
    entry = params.layer.add(method=layer.method.value, op_name=layer.op_name or None)
    _add_activation(entry.input, layer.name, layer.input_scale, layer.input_grid)
    entry.weight.add(
        name=layer.name,
        bits=WIRE_BITS,
        scales=layer.weight_scales.tolist(),
        clamp_min=layer.weight_grid.lower,
        clamp_max=layer.weight_grid.upper,
        asymmetric=False,
    )
    _add_activation(entry.output, output_name, layer.output_scale, layer.output_grid)
    if layer.winograd is not None:
        entry.wino_params.version = 0
        entry.wino_params.units_attr.extend(units_attr(layer.winograd, layer.input_scale, layer.weight_scales))


def _add_activation(side: Any, name: str, scale: float, grid: Grid) -> None:
    zero = stored_zero_point(grid)
    side.add(
        name=name,
        bits=WIRE_BITS,
        scales=[scale],
        zero_point=zero,
        clamp_min=grid.lower + zero,
        clamp_max=grid.upper + zero,
    )


def _add_weight_only(params: Message, layer: WeightOnlyParams) -> None:
    entry = params.layer.add(op_name=layer.op_name)
    entry.weight.add(
        name=layer.name, bits=layer.bits, asymmetric=layer.asymmetric, block_size=layer.block_size
    )
    # the converter asks each entry for its output where an activation follows a 1-D convolution, and crashes without
    entry.output.add(name=NO_TENSOR + layer.op_name)
