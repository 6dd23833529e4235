"""Putting tensors on their grid in the graph itself, where MNN would do so for quantized layers alone.

A tensor that a float operation makes, or that enters the network, is on the grid of the quantized layer that reads it.
MNN quantizes it for that layer; whoever else reads it would get it as it was, while all of them see it quantized in
training. Sums and products that MNN computes on integers are on their grid by themselves.
"""
from __future__ import annotations

from typing import Collection, FrozenSet, NamedTuple, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Grid, Placement
from slimtrain.hooks.graph import connect, edges_from, float_inputs
from slimtrain.hooks.operations import Network
from slimtrain.hooks.state import SCOPE

_MOVES = frozenset({
    "Reshape", "Squeeze", "ExpandDims", "Transpose", "Slice", "StridedSlice", "Split", "SplitV", "Unpack", "Pack",
    "Identity", "Gather", "GatherV2", "Pad", "ConcatV2", "SpaceToDepth", "DepthToSpace", "ResizeNearestNeighbor"})
_MAX_POOLS = frozenset({"MaxPool", "MaxPoolV2"})
_INT8_ARITHMETIC = frozenset({"Add", "AddV2", "Sub", "Mul"})
#: what the converter leaves out
_DROPPED = frozenset({"Identity", "StopGradient", "CheckNumerics"})
#: values that MNN rectifies at once; where they are no multiple of it, the last ones come out wrong
_AT_ONCE = 16


class InputGrid(NamedTuple):
    """A tensor that no quantized layer produces, and the grid that all its readers see it on."""

    tensor: str
    scale: float
    grid: Grid
    in_graph: bool   #: whether an exported graph has to put it there


def read_in_float(graph: tf.Graph, network: Network, placement: Placement, layers: Collection[str],
                  int8_safe: Collection[str]) -> FrozenSet[str]:
    """Names of the quantized tensors that MNN makes in float and that others than quantized layers read in float.

    Args:
        graph: holds the network.
        network: what it computes.
        placement: what is quantized.
        layers: names of the quantized layers.
        int8_safe: tensors that MNN selects on integers as it should.
    """
    def has_float_reader(tensor: tf.Tensor) -> bool:
        for op in tensor.consumers():
            if op.name not in network.within or op.name in layers:
                continue
            if op.type in _MOVES or (op.type in _MAX_POOLS and op.outputs[0].name in int8_safe):
                if any(has_float_reader(output) for output in op.outputs):
                    return True
            elif any(output.dtype.is_floating for output in op.outputs):
                return True
        return False

    produced = {call.fused for call in placement.calls}
    tensors = [graph.get_tensor_by_name(name) for name in placement.quantizers if name not in produced]
    return frozenset(tensor.name for tensor in tensors
                     if not _is_made_on_integers(tensor, placement) and has_float_reader(tensor))


def rectifies_in_float(op: tf.Operation) -> bool:
    """Whether ``op`` is a rectifier that MNN would compute wrongly in int8, unless it is fused into a layer.

    How many values there are depends on the batch and on the layout; a multiple of channels is one in any case.
    """
    if op.type != "Relu":
        return op.type == "LeakyRelu"
    channels = op.inputs[0].shape.as_list()[-1] if op.inputs[0].shape.rank else None
    return not channels or channels % _AT_ONCE != 0


def _is_made_on_integers(tensor: tf.Tensor, placement: Placement) -> bool:
    if tensor.op.type == "Relu6" or rectifies_in_float(tensor.op):
        return False
    op = tensor.op.inputs[0].op if tensor.op.type == "Relu" else tensor.op
    if op.type not in _INT8_ARITHMETIC or any(source.name not in placement.on_grid for source in float_inputs(op)):
        return False
    return tensor.op.type == "Relu" or not _is_element_wise(tensor, {call.fused for call in placement.calls})


def _is_element_wise(tensor: tf.Tensor, fused: Collection[str]) -> bool:
    """Whether a tensor comes from a convolution, or from a sum or product of such tensors.

    The converter takes these for an operation that MNN has in float alone.
    """
    while tensor.op.type in _DROPPED:
        tensor = tensor.op.inputs[0]
    return tensor.name in fused or (tensor.op.type in _INT8_ARITHMETIC and all(
        _is_element_wise(source, fused) for source in float_inputs(tensor.op)))


def put_on_grid(graph: tf.Graph, grids: Sequence[InputGrid]) -> None:
    """Let everything that reads a tensor read ``clip(round(x / scale)) * scale``, rounded as the device rounds."""
    with graph.as_default(), tf.control_dependencies(None):
        for grid in grids:
            if grid.in_graph:
                tensor = graph.get_tensor_by_name(grid.tensor)
                edges = edges_from(tensor)
                with tf.name_scope("{}/{}/grid/".format(SCOPE, tensor.op.name)):
                    connect(edges, _on_grid(tensor, np.float32(grid.scale), grid.grid))


def _on_grid(values: tf.Tensor, scale: np.float32, grid: Grid) -> tf.Tensor:
    position = values * (np.float32(1) / scale)
    levels = tf.floor(tf.abs(position) + 0.5) * tf.sign(position)
    on_grid = tf.clip_by_value(levels, float(grid.lower), float(grid.upper)) * scale
    on_grid.set_shape(values.shape)
    return on_grid
