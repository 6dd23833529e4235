"""What a parameter file must not say: whatever crashes the converter or the runtime, or breaks a model in silence."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from slimtrain.core import ParameterFileError
from slimtrain.proto.layers import WIRE_BITS, check_block_size, check_clamps, check_scales
from slimtrain.proto.schema import CompressionAlgo


def check_pipeline(pipeline: Message) -> None:
    """Check every algorithm of ``pipeline`` and that they go together.

    Raises:
        ParameterFileError: naming the layer, what was expected, what came.
    """
    for algorithm in pipeline.algo:
        check_algorithm(algorithm)
        if pipeline.for_guide and any(is_full(layer) for layer in algorithm.quant_params.layer):
            raise ParameterFileError(
                "for_guide is true, which makes the converter ignore all full int8 entries; set it to false")


def check_algorithm(algorithm: Message) -> None:
    """Check one ``CompressionAlgo``.

    Raises:
        ParameterFileError: as ``check_pipeline``.
    """
    wanted = "prune_params" if algorithm.type == CompressionAlgo.PRUNE else "quant_params"
    if not algorithm.HasField(wanted):
        raise ParameterFileError("an algorithm of type {} needs {}".format(
            CompressionAlgo.CompressionType.Name(algorithm.type), wanted))
    for layer in algorithm.quant_params.layer:
        try:
            _check_layer(layer)
        except ValueError as error:
            raise ParameterFileError(str(error)) from error


def is_full(layer: Message) -> bool:
    """Whether an entry asks for full int8 (it names an output) rather than for weight-only storage."""
    return bool(layer.input or layer.output)


def layer_name(layer: Message) -> str:
    """What people call the layer of an entry: its weight's name, which the converter never compares."""
    for side in (layer.weight, layer.output, layer.input):
        if side and side[0].name:
            return str(side[0].name)
    return str(layer.op_name or "unnamed layer")


def _check_layer(layer: Message) -> None:
    name = layer_name(layer)
    if not is_full(layer):
        _check_weight_only(layer, name)
        return
    for side in ("input", "weight", "output"):
        entries = getattr(layer, side)
        if not entries:
            raise ValueError("layer {!r}: full int8 needs input, weight and output; there is no {}".format(name, side))
        _check_side(name, side, entries[0])
    channels = len(layer.weight[0].scales)
    if layer.HasField("conv") and channels != layer.conv.output_channel:
        raise ValueError("layer {!r}: expected one weight scale for each of {} output channels, got {}".format(
            name, layer.conv.output_channel, channels))


def _check_side(name: str, side: str, entry: Any) -> None:
    if entry.bits != WIRE_BITS:
        raise ValueError("layer {!r}: {} bits must be 8 on the wire, got {}; narrow the clamps for fewer bits".format(
            name, side, entry.bits))
    if not entry.scales:
        raise ValueError("layer {!r}: {} has no scale".format(name, side))
    check_scales(name, side, entry.scales)
    check_clamps(name, side, entry.clamp_min, entry.clamp_max)
    if side == "weight":
        if entry.asymmetric:
            raise ValueError("layer {!r}: full int8 weights are symmetric, got asymmetric = true".format(name))
    elif entry.zero_point:
        raise ValueError("layer {!r}: {} zero_point must be 0 (MNN computes asymmetric tensors wrongly), got {}".format(
            name, side, entry.zero_point))
    elif len(entry.scales) != 1:
        raise ValueError("layer {!r}: {} must have one scale for the tensor, got {}".format(
            name, side, len(entry.scales)))


def _check_weight_only(layer: Message, name: str) -> None:
    if not layer.weight:
        raise ValueError("layer {!r}: an entry needs weight parameters, or input, weight and output".format(name))
    if not layer.op_name:
        raise ValueError("layer {!r}: a weight-only entry is found by op_name, which is missing".format(name))
    if layer.weight[0].bits not in range(2, 9):
        raise ValueError("layer {!r}: weight-only bits must be 2..8, got {}".format(name, layer.weight[0].bits))
    check_block_size(name, layer.weight[0].block_size)
