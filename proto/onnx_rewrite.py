"""Rewriting a float ONNX file so that MNN quantizes all of it and computes what training simulated.

Four things stand between an exported file and an exact int8 model (all measured on MNN 3.6): weights must lie on
their grid; linear layers above 65535 weights, or followed by an activation, only work as 1x1 convolutions; some
operations compute differently on integers (``onnx_exactness``); and the parameter file must call each tensor what the
converter will call it.
"""
from __future__ import annotations

import logging
from typing import Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import onnx
from onnx import helper

from slimtrain.core import Placement, Quantizer, SlimtrainError
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.layers import LayerParams
from slimtrain.proto.onnx_exactness import Step, make_islands, put_on_grid
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_match import Match, Weight, bias_addition, match_layers, node_weight
from slimtrain.proto.onnx_placement import is_fusable, place_onnx
from slimtrain.proto.onnx_reductions import write_reductions

logger = logging.getLogger(__name__)

# what the converter appends to the name of a convolution that is an output of the graph
_OUTPUT_SUFFIX = "__before_tr"


class Rewritten(NamedTuple):
    """A rewritten model and the parameters that belong to it."""

    model: onnx.ModelProto
    params: Tuple[LayerParams, ...]
    changes: Tuple[str, ...]     #: one sentence per structural change
    placement: Placement         #: of the quantized tensors, by the names they have in ``model``
    layers: Mapping[str, DeployedLayer]  #: output of a convolution in ``model`` -> its layer


def rewrite(model: onnx.ModelProto, layers: Sequence[DeployedLayer], *, on_grid: bool = True) -> Rewritten:
    """Rewrite a model; ``model`` itself is left as it is.

    Args:
        model: the exported float model.
        layers: the quantized layers in execution order.
        on_grid: False keeps the trained float weights, to check the structural changes by themselves.

    Raises:
        SlimtrainError: a layer cannot be found, or the file's structure is not that of the recorded model.
    """
    graph = OnnxGraph(model)
    changes = write_reductions(graph)
    written: Dict[str, DeployedLayer] = {}
    for match in match_layers(graph, layers):
        write = _write_conv if match.node.op_type == "Conv" else _write_linear
        written[write(graph, match, on_grid, changes)] = match.layer
    placement = place_onnx(graph, {name: layer.name for name, layer in written.items()})
    steps = steps_of(written.values()) if on_grid else {}
    if on_grid:
        _compare(placement, written)
    make_islands(graph, placement, steps, changes)
    if on_grid:
        put_on_grid(graph, placement, steps, changes)
    rewritten = graph.model()
    onnx.checker.check_model(rewritten)
    params = all_params(graph, written)
    return Rewritten(rewritten, params, tuple(changes), placement, written)


def steps_of(layers: Iterable[DeployedLayer]) -> Dict[Quantizer, Step]:
    """Scale and levels of each owner of a scale."""
    steps = {layer.call.output: Step(layer.output_scale, layer.output_grid) for layer in layers}
    steps.update((layer.call.input, Step(layer.input_scale, layer.input_grid)) for layer in layers)
    return steps


def _compare(placement: Placement, written: Mapping[str, DeployedLayer]) -> None:
    """Warn where the exported graph quantizes a layer otherwise than the recorded model did."""
    for call in placement.calls:
        simulated = written[call.tensor].call
        if (call.input, call.output) != (simulated.input, simulated.output):
            logger.warning("layer %r was trained with the scales of %s and %s, but the exported graph puts it behind "
                           "%s and before %s", call.layer, simulated.input, simulated.output, call.input, call.output)


# -- layers


def _write_conv(graph: OnnxGraph, match: Match, on_grid: bool, changes: List[str]) -> str:
    node, layer = match.node, match.layer
    if match.needs_fold:
        _drop_batch_norm(graph, node, layer, changes)
    weight = node_weight(graph, node)
    if weight is not None and (on_grid or match.weight is not Weight.ON_GRID):
        inputs = [node.input[0], *_constants(graph, layer, on_grid, weight.shape)]
        del node.input[:]
        node.input.extend(inputs)
        graph.refresh()
    return str(node.output[0])


def _constants(graph: OnnxGraph, layer: DeployedLayer, on_grid: bool, shape: Tuple[int, ...]) -> List[str]:
    """Names of the weight and, where there is one, the bias."""
    weight, bias = layer.weight, layer.bias
    if not on_grid:
        factor = layer.factor.reshape((-1,) + (1,) * (layer.levels.ndim - 1))
        weight, bias = (layer.trained_weight * factor).astype(np.float32), layer.float_bias
    names = [graph.add_constant(weight.reshape(shape), layer.name + ".weight")]
    return names if bias is None else names + [graph.add_constant(bias, layer.name + ".bias")]


def _drop_batch_norm(graph: OnnxGraph, node: onnx.NodeProto, layer: DeployedLayer, changes: List[str]) -> None:
    norm = graph.only_consumer(node.output[0])
    if norm is None or norm.op_type != "BatchNormalization":
        raise SlimtrainError("layer %r is followed by a batch norm in the model, but by %s in the ONNX file; export "
                             "the model in evaluation mode" % (layer.name, norm.op_type if norm else "nothing"))
    output = norm.output[0]
    graph.replace([norm], [])
    node.output[0] = output
    graph.refresh()
    changes.append("folded the batch norm behind %s" % layer.name)


def _write_linear(graph: OnnxGraph, match: Match, on_grid: bool, changes: List[str]) -> str:
    """Write a linear layer as reshape, 1x1 convolution, activation, reshape; returns the convolution's output."""
    layer, old = match.layer, [match.node]
    source, output = match.node.input[0], match.node.output[0]
    rank = len(graph.shapes().get(source, ())) if match.node.op_type == "MatMul" else 2
    addition = None if layer.bias is None else bias_addition(graph, match.node, len(layer.levels))
    if addition is not None:
        old, output = old + [addition[0]], addition[0].output[0]
    following = graph.only_consumer(output)
    if match.needs_fold and following is not None and following.op_type == "BatchNormalization":
        old, output = old + [following], following.output[0]
        following = graph.only_consumer(output)
    activation = following if layer.activation and following is not None and is_fusable(graph, following) else None
    if activation is not None:
        old, output = old + [activation], activation.output[0]
    outputs, features = layer.levels.shape
    image, conv = graph.new_name(layer.name + "/image"), graph.new_name(layer.name + "/conv")
    shape = graph.add_constant(np.array([-1, features, 1, 1], np.int64), layer.name + "/image_shape")
    inputs = [image, *_constants(graph, layer, on_grid, (outputs, features, 1, 1))]
    new = [helper.make_node("Reshape", [source, shape], [image]),
           helper.make_node("Conv", inputs, [conv], name=conv, kernel_shape=[1, 1])]
    last = conv
    if activation is not None:
        last = graph.new_name(layer.name + "/activation")
        fused = onnx.NodeProto()
        fused.CopyFrom(activation)
        fused.input[0], fused.output[0] = conv, last
        new.append(fused)
    new += _reshape_back(graph, layer.name, source, last, output, rank, outputs)
    graph.replace(old, new)
    changes.append("wrote linear layer %s as a 1x1 convolution" % layer.name)
    return conv


def _reshape_back(graph: OnnxGraph, name: str, source: str, last: str, output: str, rank: int,
                  outputs: int) -> List[onnx.NodeProto]:
    if rank == 2:
        shape = graph.add_constant(np.array([-1, outputs], np.int64), name + "/shape")
        return [helper.make_node("Reshape", [last, shape], [output])]
    parts = [graph.new_name(name + "/" + part) for part in ("dims", "leading", "shape")]
    bounds = [graph.add_constant(np.array([value], np.int64), name + "/bound") for value in (0, -1)]
    width = graph.add_constant(np.array([outputs], np.int64), name + "/width")
    return [helper.make_node("Shape", [source], [parts[0]]),
            helper.make_node("Slice", [parts[0], *bounds], [parts[1]]),
            helper.make_node("Concat", [parts[1], width], [parts[2]], axis=0),
            helper.make_node("Reshape", [last, parts[2]], [output])]


# -- parameters


def all_params(graph: OnnxGraph, written: Mapping[str, DeployedLayer]) -> Tuple[LayerParams, ...]:
    """Parameters of convolutions by the name of their output; the second use of a layer is called ``layer[use 2]``."""
    params: List[LayerParams] = []
    uses: Dict[str, int] = {}
    for output, layer in written.items():
        uses[layer.name] = uses.get(layer.name, 0) + 1
        name = layer.name if uses[layer.name] == 1 else "%s[use %d]" % (layer.name, uses[layer.name])
        params += _conv_params(graph, layer, name, output)
    return tuple(params)


def _conv_params(graph: OnnxGraph, layer: DeployedLayer, name: str, output: str) -> List[LayerParams]:
    """An entry, or one per group: the converter splits grouped convolutions and numbers the parts."""
    channels = len(layer.weight_scales)
    is_depthwise = layer.groups == channels and layer.levels.shape[1] == 1
    if layer.groups == 1 or is_depthwise:
        fused = fused_output(graph, output)
        return [_entry(layer, name, (fused, fused + _OUTPUT_SUFFIX), slice(None))]
    size = channels // layer.groups
    return [_entry(layer, "%s[group %d]" % (name, group), ("%s___output___%d" % (output, group),),
                   slice(group * size, (group + 1) * size)) for group in range(layer.groups)]


def _entry(layer: DeployedLayer, name: str, outputs: Tuple[str, ...], part: slice) -> LayerParams:
    return LayerParams(name, outputs, layer.input_scale, layer.output_scale, layer.weight_scales[part],
                       layer.input_grid, layer.output_grid, layer.weight_grid, layer.method,
                       winograd=layer.winograd)


def fused_output(graph: OnnxGraph, output: str) -> str:
    """Name of what leaves a convolution and the activation that is fused into it."""
    node = graph.only_consumer(output)
    return str(node.output[0]) if node is not None and is_fusable(graph, node) else output
