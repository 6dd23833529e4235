"""What the parameters asked for, against what the converted file holds."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

from google.protobuf.message import Message

from slimtrain.core import Coverage, LayerCoverage, LayerState
from slimtrain.proto.mnnfile import MnnLayer, MnnModel
from slimtrain.proto.schema import CompressionAlgo
from slimtrain.proto.validation import is_full, layer_name

GRAPH_OUTPUT = "__before_tr"
LINEAR = "__matmul_converted"


class Wanted(NamedTuple):
    """One layer that parameters speak of: the tensor spellings of full int8, or the operator of weight-only."""

    name: str
    full: bool
    tensors: Tuple[str, ...]
    op_name: str
    scales: int


class Comparison(NamedTuple):
    """``full`` and ``weight_only`` are the layers asked for; ``unasked`` the others with weights, as they are."""

    full: Coverage
    weight_only: Coverage
    unasked: Tuple[LayerCoverage, ...]

    @property
    def missing(self) -> Tuple[LayerCoverage, ...]:
        """Layers that are less compressed than asked for."""
        floats = tuple(layer for layer in self.weight_only.layers if layer.state is LayerState.FLOAT)
        return self.full.missing + floats


def wanted_layers(pipeline: Message) -> Tuple[Wanted, ...]:
    """The layers of all quantization algorithms, spellings of one layer joined, in the order of the file.

    Entries of one layer are told by the name of their weight.  Other writers use that name for the weight tensor, which
    two layers may share, so there only the two spellings of one tensor are joined.
    """
    groups: Dict[Tuple[str, str], Wanted] = {}
    for algorithm in pipeline.algo:
        if algorithm.type != CompressionAlgo.QUANTIZE:
            continue
        for entry in algorithm.quant_params.layer:
            wanted = _wanted(entry)
            key = _key(entry, wanted)
            old = groups.get(key)
            groups[key] = wanted if old is None else old._replace(tensors=old.tensors + wanted.tensors)
    return tuple(groups.values())


def compare(pipeline: Optional[Message], model: MnnModel) -> Comparison:
    """Find every wanted layer of ``pipeline`` (None: nothing is wanted) in ``model``."""
    wanted = wanted_layers(pipeline) if pipeline is not None else ()
    by_tensor = {layer.tensor: layer for layer in model.layers}
    by_name = {layer.name: layer for layer in model.layers}
    found = [_find(item, by_tensor, by_name) for item in wanted]
    taken = {layer.tensor for layer in found if layer is not None}
    free = [layer for layer in model.layers if layer.tensor not in taken]
    full: List[LayerCoverage] = []
    weight_only: List[LayerCoverage] = []
    for item, layer in zip(wanted, found):
        (full if item.full else weight_only).append(_judge(item, layer, model, free))
    return Comparison(Coverage(tuple(full)), Coverage(tuple(weight_only)),
                      tuple(LayerCoverage(layer.name, layer.kind, layer.parameters, layer.state) for layer in free))


def misfits(pipeline: Message, model: MnnModel) -> Tuple[str, ...]:
    """One line per full int8 layer whose number of weight scales is not that of its output channels: MNN crashes there,
    in the converter or when the model runs."""
    by_tensor = {layer.tensor: layer for layer in model.layers}
    lines = []
    for item in wanted_layers(pipeline):
        layer = _find(item, by_tensor, {})
        if item.full and layer is not None and layer.channels and layer.channels != item.scales:
            lines.append("layer {!r}: {} weight scales for {} output channels".format(
                item.name, item.scales, layer.channels))
    return tuple(lines)


def _wanted(entry: Message) -> Wanted:
    full = is_full(entry)
    tensors = (str(entry.output[0].name),) if entry.output else ()
    scales = len(entry.weight[0].scales) if entry.weight else 0
    return Wanted(layer_name(entry), full, tensors, str(entry.op_name), scales)


def _key(entry: Message, wanted: Wanted) -> Tuple[str, str]:
    is_ours = bool(entry.input and entry.weight and entry.input[0].name == entry.weight[0].name)
    if not wanted.full:
        return "op", wanted.op_name
    if is_ours:
        return "layer", wanted.name
    tensor = wanted.tensors[0] if wanted.tensors else wanted.name
    return "tensor", tensor[:-len(GRAPH_OUTPUT)] if tensor.endswith(GRAPH_OUTPUT) else tensor


def _find(wanted: Wanted, by_tensor: Dict[str, MnnLayer], by_name: Dict[str, MnnLayer]) -> Optional[MnnLayer]:
    for tensor in wanted.tensors:
        for spelling in (tensor, tensor + LINEAR):
            if spelling in by_tensor:
                return by_tensor[spelling]
    return by_name.get(wanted.op_name)


def _judge(wanted: Wanted, layer: Optional[MnnLayer], model: MnnModel, free: List[MnnLayer]) -> LayerCoverage:
    if layer is None:
        # Its size is unknown; one weight per channel keeps it from counting as nothing.
        return LayerCoverage(wanted.name, "not found", max(wanted.scales, 1), LayerState.FLOAT,
                             _why_not_found(wanted, model, free))
    good = layer.state is LayerState.INT8 or (not wanted.full and layer.state is LayerState.WEIGHT_ONLY)
    reason = "" if good else _why_not_quantized(wanted, layer)
    return LayerCoverage(wanted.name, layer.kind, layer.parameters, layer.state, reason)


def _why_not_found(wanted: Wanted, model: MnnModel, free: List[MnnLayer]) -> str:
    if not wanted.full:
        return "no operator is called {!r}".format(wanted.op_name)
    writers = ["{!r} is written by {}".format(name, model.writers[name])
               for name in wanted.tensors if name in model.writers]
    reason = "no convolution writes {}".format(" or ".join(map(repr, wanted.tensors)))
    same = [repr(layer.tensor) for layer in free
            if layer.channels == wanted.scales and layer.state is not LayerState.INT8][:3]
    candidates = ["with {} output channels and no parameters there is {}".format(
        wanted.scales, ", ".join(same))] if same else []
    return "; ".join([reason] + writers + candidates)


def _why_not_quantized(wanted: Wanted, layer: MnnLayer) -> str:
    if not wanted.full:
        return "the converter left operator {!r} in float".format(layer.name)
    if not any(layer.tensor in (tensor, tensor + LINEAR) for tensor in wanted.tensors):
        return "the converter calls its output {!r}, the parameters say {}".format(
            layer.tensor, " or ".join(map(repr, wanted.tensors)))
    if layer.kind not in ("Convolution", "ConvolutionDepthwise"):
        return "MNN has no full int8 for {}".format(layer.kind)
    if layer.inputs != 1:
        return "its weights are not constant in the model"
    return "the converter ignored its parameters (is for_guide set, or no weight given?)"
