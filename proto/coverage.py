"""What the parameters asked for against what the converted file holds."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

from slimtrain.core import Coverage, LayerCoverage, LayerState
from slimtrain.proto.mnnfile import MnnLayer, MnnModel
from slimtrain.proto.schema import CompressionAlgo, Message
from slimtrain.proto.validation import is_full, layer_name

# What the converter adds to the name of a tensor: before a change of layout, after a matrix product.
GRAPH_OUTPUT = "__before_tr"
LINEAR = "__matmul_converted"
_QUANTIZABLE = ("Convolution", "ConvolutionDepthwise")


class Wanted(NamedTuple):
    """One layer that parameters speak of.

    ``full`` tells full int8, found by one of the ``tensors``, from weight-only, found by ``op_name``;
    ``scales`` counts weight scales.
    """

    name: str
    full: bool
    tensors: Tuple[str, ...]
    op_name: str
    scales: int


class Comparison(NamedTuple):
    """``full`` and ``weight_only``: layers asked for; ``unasked``: the others with weights, as they are."""

    full: Coverage
    weight_only: Coverage
    unasked: Tuple[LayerCoverage, ...]

    @property
    def missing(self) -> Tuple[LayerCoverage, ...]:
        """Layers that are less compressed than asked for."""
        floats = [layer for layer in self.weight_only.layers if layer.state is LayerState.FLOAT]
        return self.full.missing + tuple(floats)


def wanted_layers(pipeline: Message) -> Tuple[Wanted, ...]:
    """The layers of all quantization algorithms in the order of the file, spellings of one layer joined.

    Our entries carry the layer's name as that of the weight, and of the input to tell them from those of
    other writers.  There a weight may belong to two layers, so only the two spellings of one tensor are
    joined.
    """
    groups: Dict[Tuple[str, str], Wanted] = {}
    for algorithm in pipeline.algo:
        if algorithm.type != CompressionAlgo.QUANTIZE:
            continue
        for entry in algorithm.quant_params.layer:
            wanted = Wanted(
                name=layer_name(entry),
                full=is_full(entry),
                tensors=(str(entry.output[0].name),) if entry.output else (),
                op_name=str(entry.op_name),
                scales=len(entry.weight[0].scales) if entry.weight else 0,
            )
            old = groups.setdefault(_key(entry, wanted), wanted)
            if old is not wanted:
                groups[_key(entry, wanted)] = old._replace(tensors=old.tensors + wanted.tensors)
    return tuple(groups.values())


def compare(pipeline: Optional[Message], model: MnnModel) -> Comparison:
    """Find every wanted layer of ``pipeline`` (None: nothing is wanted) in ``model``."""
    wanted = wanted_layers(pipeline) if pipeline is not None else ()
    found = [_find(item, model) for item in wanted]
    taken = {layer.tensor for layer in found if layer is not None}
    free = [layer for layer in model.layers if layer.tensor not in taken]
    judged = [(item.full, _judge(item, layer, model, free)) for item, layer in zip(wanted, found)]
    return Comparison(
        full=Coverage(tuple(layer for full, layer in judged if full)),
        weight_only=Coverage(tuple(layer for full, layer in judged if not full)),
        unasked=tuple(LayerCoverage(layer.name, layer.kind, layer.parameters, layer.state) for layer in free),
    )


def layer_names(pipeline: Message, model: MnnModel) -> Dict[str, str]:
    """What the parameters call the layers of a model, by the names of the tensors that these write."""
    found = [(item.name, _find(item, model)) for item in wanted_layers(pipeline)]
    return {layer.tensor: name for name, layer in found if layer is not None}


def misfits(pipeline: Message, model: MnnModel) -> Tuple[str, ...]:
    """One line per full int8 layer with another number of weight scales than of output channels.

    MNN crashes there, in the converter or when the model runs.
    """
    lines = []
    for item in wanted_layers(pipeline):
        layer = _writer(item.tensors, model)
        if layer is not None and layer.kind in _QUANTIZABLE and layer.channels != item.scales:
            lines.append(
                f"layer {item.name!r}: {item.scales} weight scales for {layer.channels} output channels"
            )
    return tuple(lines)


def _key(entry: Message, wanted: Wanted) -> Tuple[str, str]:
    if not wanted.full:
        return "operator", wanted.op_name
    if entry.input and entry.weight and entry.input[0].name == entry.weight[0].name:
        return "layer", wanted.name
    tensor = wanted.tensors[0] if wanted.tensors else wanted.name
    return "tensor", tensor[: -len(GRAPH_OUTPUT)] if tensor.endswith(GRAPH_OUTPUT) else tensor


def _find(wanted: Wanted, model: MnnModel) -> Optional[MnnLayer]:
    layer = _writer(wanted.tensors, model)
    if layer is None and wanted.op_name:
        layer = next((item for item in model.layers if item.name == wanted.op_name), None)
    return layer


def _writer(tensors: Tuple[str, ...], model: MnnModel) -> Optional[MnnLayer]:
    by_tensor = {layer.tensor: layer for layer in model.layers}
    spellings = [spelling for tensor in tensors for spelling in (tensor, tensor + LINEAR)]
    return next((by_tensor[spelling] for spelling in spellings if spelling in by_tensor), None)


def _judge(wanted: Wanted, layer: Optional[MnnLayer], model: MnnModel, free: List[MnnLayer]) -> LayerCoverage:
    if layer is None:
        # Its size is unknown; one weight per channel keeps it from counting as nothing.
        size = max(wanted.scales, 1)
        reason = _why_not_found(wanted, model, free)
        return LayerCoverage(wanted.name, "not found", size, LayerState.FLOAT, reason)
    good = layer.state is LayerState.INT8 or (not wanted.full and layer.state is LayerState.WEIGHT_ONLY)
    reason = "" if good else _why_not_quantized(wanted, layer)
    return LayerCoverage(wanted.name, layer.kind, layer.parameters, layer.state, reason)


def _why_not_found(wanted: Wanted, model: MnnModel, free: List[MnnLayer]) -> str:
    if not wanted.full:
        return f"no operator is called {wanted.op_name!r}"
    reasons = [f"no convolution writes {_either(wanted.tensors)}"]
    reasons += [
        f"{name!r} is written by {model.writers[name]}" for name in wanted.tensors if name in model.writers
    ]
    # Most often the converter gave the tensor another name: say which convolutions are left over.
    similar = [
        repr(layer.tensor)
        for layer in free
        if layer.channels == wanted.scales and layer.state is not LayerState.INT8
    ]
    if similar:
        reasons.append(f"unclaimed with {wanted.scales} channels: {', '.join(similar[:3])}")
    return "; ".join(reasons)


def _why_not_quantized(wanted: Wanted, layer: MnnLayer) -> str:
    if not wanted.full:
        return f"the converter left the operator {layer.name!r} in float"
    if not any(layer.tensor in (tensor, tensor + LINEAR) for tensor in wanted.tensors):
        return f"the converter calls its output {layer.tensor!r}, the parameters {_either(wanted.tensors)}"
    if layer.kind not in _QUANTIZABLE:
        return f"MNN has no full int8 for {layer.kind}"
    if layer.inputs != 1:
        return "its weights are computed by the model, not constant"
    return "the converter ignored its parameters (for_guide set, or an entry without weight)"


def _either(names: Tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
