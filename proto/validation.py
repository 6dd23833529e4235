"""What a parameter file must not say: whatever crashes MNN, or breaks a model in silence."""

from __future__ import annotations

from slimtrain.core import ParameterFileError
from slimtrain.proto.checks import NO_TENSOR, WIRE_BITS, check_clamps, check_scales, check_weight_only
from slimtrain.proto.schema import CompressionAlgo, Message
from slimtrain.proto.winograd import check_units_attr


def check_pipeline(pipeline: Message) -> None:
    """Check every algorithm of ``pipeline`` and that they go together.

    Raises:
        ParameterFileError: naming the layer, what was expected, what came.
    """
    missing = pipeline.FindInitializationErrors()
    if missing:
        raise ParameterFileError(f"required fields are not set: {', '.join(missing)}")
    for algorithm in pipeline.algo:
        check_algorithm(algorithm)
    check_guide(pipeline)


def check_guide(pipeline: Message) -> None:
    """Refuse the flag that makes the converter ignore every full int8 entry.

    Raises:
        ParameterFileError: the flag is set and there is such an entry.
    """
    if pipeline.for_guide and any(
        is_full(layer) for algo in pipeline.algo for layer in algo.quant_params.layer
    ):
        raise ParameterFileError(
            "for_guide is true: the converter would ignore the full int8 layers; set it to false"
        )


def check_algorithm(algorithm: Message) -> None:
    """Check one ``CompressionAlgo``.

    Raises:
        ParameterFileError: as ``check_pipeline``.
    """
    wanted = "prune_params" if algorithm.type == CompressionAlgo.PRUNE else "quant_params"
    if not algorithm.HasField(wanted):
        raise ParameterFileError(
            f"an algorithm of type {CompressionAlgo.CompressionType.Name(algorithm.type)} needs {wanted}"
        )
    for layer in algorithm.quant_params.layer:
        try:
            _check_layer(layer)
        except ValueError as error:
            raise ParameterFileError(str(error)) from error


def is_full(layer: Message) -> bool:
    """Whether an entry asks for full int8, found by its output, rather than for weight-only storage."""
    return bool(layer.input or any(not side.name.startswith(NO_TENSOR) for side in layer.output))


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
        if not getattr(layer, side):
            raise ValueError(f"layer {name!r}: full int8 needs input, weight and output, there is no {side}")
    _check_side(name, "weight", layer.weight[0])
    for side, entry in (("input", layer.input[0]), ("output", layer.output[0])):
        _check_side(name, side, entry)
        _check_activation(name, side, entry)
    if layer.weight[0].asymmetric:
        raise ValueError(f"layer {name!r}: weights of a full int8 layer are symmetric, got asymmetric = true")
    channels = len(layer.weight[0].scales)
    if layer.wino_params.units_attr:
        check_units_attr(name, layer.wino_params.units_attr, channels)
    if layer.HasField("conv") and channels != layer.conv.output_channel:
        raise ValueError(
            f"layer {name!r}: expected one weight scale for each of {layer.conv.output_channel} output "
            f"channels, got {channels}"
        )


def _check_side(name: str, side: str, entry: Message) -> None:
    if entry.bits != WIRE_BITS:
        raise ValueError(
            f"layer {name!r}: {side} bits must be {WIRE_BITS}, got {entry.bits}; for fewer narrow the clamps"
        )
    if not entry.scales:
        raise ValueError(f"layer {name!r}: {side} has no scale")
    check_scales(name, side, entry.scales)
    check_clamps(name, side, entry.clamp_min, entry.clamp_max)


def _check_activation(name: str, side: str, entry: Message) -> None:
    if not entry.clamp_min <= entry.zero_point <= entry.clamp_max:
        raise ValueError(
            f"layer {name!r}: {side} zero_point must lie in the range [{entry.clamp_min}, {entry.clamp_max}], got "
            f"{entry.zero_point}: padding needs a level for 0"
        )
    if len(entry.scales) != 1:
        raise ValueError(f"layer {name!r}: {side} needs one scale for its tensor, got {len(entry.scales)}")


def _check_weight_only(layer: Message, name: str) -> None:
    if not layer.weight:
        raise ValueError(f"layer {name!r}: an entry needs weight, or input, weight and output")
    if not layer.op_name:
        raise ValueError(f"layer {name!r}: a weight-only entry is found by op_name, which is not set")
    check_weight_only(name, layer.weight[0].bits, layer.weight[0].block_size)
