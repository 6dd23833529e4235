"""Padding as TensorFlow has it, where MNN has it otherwise.

With o = ceil(size / stride) outputs, SAME pads an axis by (o - 1) * stride + extent - size values. A kernel whose
extent is shorter than its stride may need less than none: TensorFlow then pads nothing and leaves the last values
unread, while MNN 3.6 begins a convolution half of that many values behind the first. Poolings are exact, and so is
VALID. Explicit padding is not read by MNN's converter at all.
"""
from __future__ import annotations

from typing import Any, Collection, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import inside_control_flow
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.operations import Network
from slimtrain.hooks.state import SCOPE

_MAKERS = {LayerKind.CONV: tf.raw_ops.Conv2D, LayerKind.DEPTHWISE: tf.raw_ops.DepthwiseConv2dNative}


class _Axis(NamedTuple):
    """How a kernel moves along one spatial axis."""

    size: Optional[int]   #: of the input; None where it is known at run time only
    extent: int           #: of the kernel, with its dilation
    stride: int

    @property
    def lacking(self) -> Optional[int]:
        """What SAME padding has to add; a negative number counts values that are not read. None where it depends."""
        if self.size is not None:
            return (-(-self.size // self.stride) - 1) * self.stride + self.extent - self.size
        return 0 if self.extent == 1 else None  # 0 or less

    @property
    def is_exact(self) -> bool:
        """Whether MNN begins at the first value, whatever the size: of one value that is not read, the half is none."""
        return self.stride - self.extent < 2


def add_convolution(op: tf.Operation, kind: LayerKind, values: tf.Tensor, kernel: tf.Tensor, name: str) -> tf.Tensor:
    """The same convolution on other values, padded so that MNN computes it as TensorFlow does.

    Args:
        op: a convolution whose data format is NHWC.
        kind: what it is.
        values: its input.
        kernel: what it reads as its weight, of the same extent.
        name: of the new operation; ``name_input`` is the scope of what takes away values that are never read.
    """
    padding, strides, dilations = (op.get_attr(key) for key in ("padding", "strides", "dilations"))
    if padding == b"EXPLICIT":
        amounts = np.reshape(op.get_attr("explicit_paddings"), [4, 2])
        values, padding = tf.pad(values, amounts, name=name + "_input"), b"VALID"
    elif padding == b"SAME":
        axes = _axes(op, values, kernel)
        if not all(axis.is_exact for axis in axes):
            if all(axis.lacking is not None and axis.lacking <= 0 for axis in axes):
                padding = b"VALID"
            else:
                values = _cropped(values, axes, name + "_input")
    return _MAKERS[kind](input=values, filter=kernel, strides=list(strides), padding=padding.decode(),
                         dilations=list(dilations), name=name)


def exact_convolutions(graph: tf.Graph, network: Network, done: Collection[str]) -> Dict[str, tf.Tensor]:
    """Add all other convolutions of a network that MNN would pad in its own way, padded as TensorFlow does.

    Args:
        graph: the graph to add to.
        network: what it computes.
        done: names of layers that were added anew already.

    Returns:
        by the name of the tensor that each replaces.
    """
    added = {}
    with graph.as_default(), tf.control_dependencies(None):
        for layer in network.layers.values():
            if layer.kind is LayerKind.MATMUL or layer.name in done or inside_control_flow(layer.op):
                continue
            op = graph.get_operation_by_name(layer.name)
            if _differs(op):
                added[op.outputs[0].name] = add_convolution(op, layer.kind, op.inputs[0], op.inputs[1],
                                                            "{}/{}/padded".format(SCOPE, layer.name))
    return added


def _differs(op: tf.Operation) -> bool:
    if op.get_attr("data_format") != b"NHWC":
        return False
    if op.get_attr("padding") == b"SAME":
        return not all(axis.is_exact for axis in _axes(op, op.inputs[0], op.inputs[1]))
    return bool(op.get_attr("padding") == b"EXPLICIT")


def _axes(op: tf.Operation, values: tf.Tensor, kernel: tf.Tensor) -> List[_Axis]:
    """Height and width; empty where the kernel's shape is not known."""
    if not kernel.shape.is_fully_defined():
        return []
    sizes: List[Any] = values.shape.as_list() if values.shape.rank is not None else [None] * 4
    strides, dilations = op.get_attr("strides"), op.get_attr("dilations")
    return [_Axis(sizes[axis], (kernel.shape.as_list()[axis - 1] - 1) * dilations[axis] + 1, strides[axis])
            for axis in (1, 2)]


def _cropped(values: tf.Tensor, axes: Sequence[_Axis], name: str) -> tf.Tensor:
    """The values up to the last that is read: from here on SAME has nothing left to take away."""
    with tf.name_scope(name):
        ends = [0 if axis.is_exact else _end(values, index, axis) for index, axis in enumerate(axes, 1)]
        whole = sum(1 << index for index, axis in enumerate(axes, 1) if axis.is_exact)
        return tf.strided_slice(values, [0] * 4, tf.stack([0] + ends + [0]), [1] * 4, begin_mask=0b1111,
                                end_mask=0b1001 | whole, name="slice")


def _end(values: tf.Tensor, index: int, axis: _Axis) -> Any:
    """The first value that is not read; a slice ends with its tensor."""
    if axis.size is not None:
        return axis.size + min(axis.lacking or 0, 0)
    outputs = (tf.shape(values)[index] + (axis.stride - 1)) // axis.stride
    return (outputs - 1) * axis.stride + axis.extent
