"""Finding the layers of a graph that can be quantized, and saying of the others why not."""
from __future__ import annotations

from enum import Enum
from typing import Collection, Dict, Mapping, NamedTuple, Optional, Set

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Coverage, LayerCoverage, LayerState
from slimtrain.hooks.compositions import is_merged, replaced_layers
from slimtrain.hooks.graph import inside_control_flow, is_frozen, only_reader, variables_behind


class LayerKind(Enum):
    """The operations that MNN can run in int8, by their TensorFlow type."""

    CONV = "Conv2D"
    DEPTHWISE = "DepthwiseConv2dNative"
    MATMUL = "MatMul"


class Layer(NamedTuple):
    """One operation with weights."""

    name: str                    #: of the operation
    kind: LayerKind
    op: tf.Operation
    input: tf.Tensor
    kernel: tf.Tensor            #: as the operation reads it
    bias: Optional[tf.Tensor]    #: one value per output channel, or None
    linear: tf.Tensor            #: what the operation and its bias produce
    reason: str                  #: why it cannot run in int8; empty when it can

    @property
    def channel_axis(self) -> int:
        """The axis of the kernel that counts output channels."""
        if self.kind is LayerKind.MATMUL:
            return 0 if self.op.get_attr("transpose_b") else 1
        return 2 if self.kind is LayerKind.DEPTHWISE else 3

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.kernel.shape.as_list()[self.channel_axis])

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(np.prod(self.kernel.shape.as_list()))


def find_layers(graph: tf.Graph, within: Set[str], fixed: Set[str], outputs: Set[str]) -> Dict[str, Layer]:
    """Every convolution and matrix product with a weight, by operation name, in the order they were made.

    Args:
        graph: where to look.
        within: names of the operations that make up the network.
        fixed: names of the tensors that depend on variables and constants alone.
        outputs: names of the tensors that leave the network.
    """
    types = {kind.value: kind for kind in LayerKind}
    found = {}
    within = within - replaced_layers(graph)
    for op in graph.get_operations():
        if op.type in types and op.name in within and op.inputs[1].name in fixed and op.inputs[0].name not in fixed:
            found[op.name] = _layer(op, types[op.type], within, fixed, outputs)
    return found


def _layer(op: tf.Operation, kind: LayerKind, within: Set[str], fixed: Set[str], outputs: Set[str]) -> Layer:
    kernel, raw = op.inputs[1], op.outputs[0]
    reader = only_reader(raw, within) if raw.name not in outputs else None
    bias = _bias(reader, raw, fixed) if reader is not None and kernel.shape.is_fully_defined() else None
    linear = raw if bias is None or reader is None else reader.outputs[0]
    return Layer(op.name, kind, op, op.inputs[0], kernel, bias, linear, _why_float(op, kind, kernel))


def _bias(reader: tf.Operation, raw: tf.Tensor, fixed: Set[str]) -> Optional[tf.Tensor]:
    """The bias that ``reader`` adds to ``raw``, if that is what it does."""
    if reader.type == "BiasAdd":
        return reader.inputs[1]
    if reader.type not in ("Add", "AddV2"):
        return None
    other = reader.inputs[1] if reader.inputs[0].name == raw.name else reader.inputs[0]
    shape, channels = other.shape.as_list() if other.shape.is_fully_defined() else None, raw.shape.as_list()[-1]
    if other.name in fixed and shape and shape[-1] == channels and int(np.prod(shape)) == channels:
        return other
    return None


def _why_float(op: tf.Operation, kind: LayerKind, kernel: tf.Tensor) -> str:
    """Why an operation must stay float; empty when it need not."""
    if inside_control_flow(op):
        return "it lies inside a cond or while_loop, which MNN does not quantize"
    if not variables_behind(kernel) and not is_merged(op.graph, kernel) and not is_frozen(op.graph):
        return "its weight is no variable"
    if kernel.dtype.base_dtype != tf.float32:
        return "its weight is {}, not float32".format(kernel.dtype.base_dtype.name)
    if not kernel.shape.is_fully_defined():
        return "the shape of its weight is not known"
    if kind is LayerKind.MATMUL:
        return "it transposes its input" if op.get_attr("transpose_a") else ""
    return _why_float_convolution(op, kind, kernel)


def _why_float_convolution(op: tf.Operation, kind: LayerKind, kernel: tf.Tensor) -> str:
    if op.get_attr("data_format") != b"NHWC":
        return "its data format is {}, MNN's TensorFlow converter reads NHWC".format(
            op.get_attr("data_format").decode())
    if op.get_attr("padding") == b"EXPLICIT":
        return "its padding is explicit, which MNN's TensorFlow converter does not read: tf.pad and VALID run in int8"
    if kind is LayerKind.DEPTHWISE and kernel.shape.as_list()[3] != 1:
        return "its depth multiplier is {}, MNN splits such a layer into float parts".format(kernel.shape.as_list()[3])
    inputs = op.inputs[0].shape.as_list()[-1] if op.inputs[0].shape.rank else None
    if kind is LayerKind.CONV and inputs is not None and inputs != kernel.shape.as_list()[2]:
        return "it is a grouped convolution, which MNN's TensorFlow converter does not read"
    return ""


def layer_coverage(layers: Mapping[str, Layer], skipped: Collection[str], state: LayerState) -> Coverage:
    """The state of those layers that are quantized, and why the others are left float.

    Args:
        layers: all layers of a network, by operation name.
        skipped: names of those that the user wants to keep float.
        state: of the quantized ones.
    """
    rows = []
    for name, layer in layers.items():
        reason = layer.reason or ("it was skipped" if name in skipped else "")
        rows.append(LayerCoverage(name, layer.kind.value, layer.parameters, LayerState.FLOAT if reason else state,
                                  reason))
    return Coverage(tuple(rows))
