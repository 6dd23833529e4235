"""The layers of an ONNX file that MNN can run in int8, and why the others stay float."""
from __future__ import annotations

from typing import Collection, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import onnx

from slimtrain.core import ConversionError, Grid, PlannedCall, Quantizer, Role, has_small_groups, select
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_match import bias_addition, node_weight
from slimtrain.proto.onnx_placement import is_fusable

_KINDS = ("Conv", "Gemm", "MatMul")
_PLACEHOLDER = Grid(8, -127, 127)


class FloatLayer(NamedTuple):
    """A layer that can be quantized."""

    name: str
    tensor: str                   #: the output of its node
    kind: str                     #: operator of the node
    weight: np.ndarray            #: float32 [O, I / groups, ...]
    bias: Optional[np.ndarray]    #: float32 [O]
    groups: int
    activation: str               #: "relu", "relu6" or "" as the converter fuses it

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved on its own."""
        return self.groups > 1 and self.weight.shape[1] == 1 and len(self.weight) == self.groups


class Layers(NamedTuple):
    """All layers of a file."""

    quantized: Tuple[FloatLayer, ...]
    left_float: Dict[str, str]     #: name -> why


def find_layers(graph: OnnxGraph, skip: Collection[str] = ()) -> Layers:
    """The layers of a graph in normal form, in execution order.

    Args:
        graph: see :func:`slimtrain.proto.onnx_normal.normal_form`.
        skip: names or patterns of layers that stay float: of nodes, or of their outputs (MNN's operator names).

    Raises:
        ValueError: a name or pattern in ``skip`` matches nothing.
        ConversionError: there is nothing to quantize.
    """
    nodes = [node for node in graph.nodes if node.op_type in _KINDS or node.op_type == "ConvTranspose"]
    names = _names(nodes)
    known = names + [str(node.output[0]) for node in nodes]
    skipped = set(select(known, skip)) if skip else set()
    quantized: List[FloatLayer] = []
    left_float: Dict[str, str] = {}
    for name, node in zip(names, nodes):
        reason = "skipped by name" if skipped & {name, str(node.output[0])} else _why_float(graph, node)
        if reason:
            left_float[name] = reason
        else:
            quantized.append(_layer(graph, name, node))
    if not quantized:
        raise ConversionError("the model has no layer that can be quantized: %s" % (
            "; ".join("%s: %s" % item for item in left_float.items()) or "no Conv, Gemm or MatMul in it"))
    return Layers(tuple(quantized), left_float)


def undecided(layer: FloatLayer) -> DeployedLayer:
    """A layer of which no scale is known yet, to rewrite the structure of a file with."""
    own = PlannedCall(layer.name, Quantizer(layer.name, Role.INPUT), Quantizer(layer.name, Role.OUTPUT), "",
                      layer.activation)
    return DeployedLayer(
        name=layer.name, trained_weight=layer.weight.astype(np.float64), levels=np.zeros(layer.weight.shape, np.int32),
        weight_scales=np.ones(len(layer.weight), np.float32), bias=layer.bias,
        float_bias=np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias,
        factor=np.ones(len(layer.weight)), folds_batch_norm=False, activation=own.activation, groups=layer.groups,
        call=own, input_scale=1.0, output_scale=1.0, input_grid=_PLACEHOLDER, output_grid=_PLACEHOLDER,
        weight_grid=_PLACEHOLDER)


def _names(nodes: List[onnx.NodeProto]) -> List[str]:
    """A name per node: its own where that is unique, else that of its output."""
    own = [str(node.name) for node in nodes]
    return [name if name and own.count(name) == 1 else str(node.output[0]) for name, node in zip(own, nodes)]


def _why_float(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    if node.op_type == "ConvTranspose":
        return "MNN has no int8 for transposed convolutions"
    weight = node_weight(graph, node)
    if weight is None:
        return "its weights are computed by the model, or not the second operand of two dimensions"
    if weight.dtype != np.float32:
        return "its weights are %s, not float32" % weight.dtype
    if not np.isfinite(weight).all():
        return "its weights are not finite"
    if weight.ndim > 4:
        return "MNN has no int8 for convolutions over more than two axes"
    groups = int(attribute(node, "group", 1))
    if has_small_groups(weight.shape[1] * groups, len(weight), groups):
        return "MNN takes groups this small apart into depthwise convolutions, which stay float"
    if len(node.input) > 2 and node.input[2] and _bias(graph, node, len(weight)) is None:
        return "its bias is computed by the model, or not one number per channel"
    return ""


def _layer(graph: OnnxGraph, name: str, node: onnx.NodeProto) -> FloatLayer:
    weight = node_weight(graph, node)
    assert weight is not None
    addition = bias_addition(graph, node, len(weight))
    following = graph.only_consumer(node.output[0] if addition is None else addition[0].output[0])
    activation = ""
    if following is not None and is_fusable(graph, following):
        activation = "relu" if following.op_type == "Relu" else "relu6"
    return FloatLayer(name, str(node.output[0]), str(node.op_type), weight, _bias(graph, node, len(weight)),
                      int(attribute(node, "group", 1)), activation)


def _bias(graph: OnnxGraph, node: onnx.NodeProto, channels: int) -> Optional[np.ndarray]:
    if node.op_type == "MatMul":
        addition = bias_addition(graph, node, channels)
        return None if addition is None else addition[1]
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if value is None or value.size not in (1, channels):
        return None
    return np.array(np.broadcast_to(value.reshape(-1), (channels,)), dtype=np.float32)
