"""What TensorFlow operations do to the channels that flow through them, and arithmetic on shadows.

A shadow is an integer array beside a tensor of the network: for each value the channel it belongs to, or -1. Dimensions
of unknown length (the batch) have length 1.
"""
from __future__ import annotations

from typing import Any, List, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

#: results stand where the values stood that they were computed from
KEEPS_PLACES = frozenset({
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Abs", "Neg", "Exp", "Log",
    "Sqrt", "Rsqrt", "Square", "Erf", "Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Cast",
    "Snapshot", "ClipByValue"})
#: results keep batch and channel, not the place
POOLS = frozenset({"MaxPool", "MaxPoolV2", "AvgPool", "ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic",
                   "SpaceToBatchND", "BatchToSpaceND"})
#: results are computed from the values of several tensors at one place
JOINS = frozenset({"Add", "AddV2", "AddN", "BiasAdd", "Sub", "Mul", "RealDiv", "DivNoNan", "Maximum", "Minimum",
                   "SquaredDifference", "Pow"})
#: values stay in their order, in other dimensions
VIEWS = frozenset({"Reshape", "Squeeze", "ExpandDims"})
#: values move and stay what they are
MOVES = frozenset({"Transpose", "ConcatV2", "Split", "SplitV", "Slice", "StridedSlice", "Pack", "Unpack", "Tile",
                   "GatherV2", "SpaceToDepth", "DepthToSpace", "ReverseV2"})
#: values get neighbours
PADS = frozenset({"Pad", "PadV2", "MirrorPad"})
#: dimensions vanish
REDUCES = frozenset({"Mean", "Sum", "Max", "Min"})
#: operations that look at a shape only, or watch a network without being part of it
IGNORED = ("Shape", "Rank", "Size", "NoOp", "Summary", "Assert", "Print", "Histogram")


def static_shape(tensor: tf.Tensor) -> Optional[List[int]]:
    """The shape of a shadow; None when not even the number of dimensions is known."""
    if tensor.shape.rank is None:
        return None
    return [1 if length is None else length for length in tensor.shape.as_list()]


def fits(shadow: np.ndarray, tensor: tf.Tensor) -> bool:
    """Whether a shadow can belong to a tensor."""
    lengths = tensor.shape.as_list() if tensor.shape.rank is not None else []
    return shadow.ndim == len(lengths) and all(wanted in (None, found) for wanted, found in zip(lengths, shadow.shape))


def spread(channels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The shadow of that shape whose channels lie along the last dimension."""
    return np.broadcast_to(channels, tuple(shape))


def varying(shadow: np.ndarray) -> List[int]:
    """The dimensions along which channels change."""
    return [dim for dim in range(shadow.ndim) if shadow.shape[dim] > 1 and shadow.strides[dim]
            and bool((shadow != shadow.take([0], axis=dim)).any())]


def narrowed(shadows: Sequence[np.ndarray]) -> List[np.ndarray]:
    """The same shadows without the dimensions along which none changes."""
    kept = {dim for shadow in shadows for dim in varying(shadow)}
    index = tuple(slice(None) if dim in kept else slice(0, 1) for dim in range(shadows[0].ndim))
    return [shadow[index] for shadow in shadows]


def without(shadow: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """What is left of a shadow when the slices are removed that hold nothing but these channels."""
    gone = np.isin(shadow, list(channels))
    for dim in range(shadow.ndim):
        others = tuple(axis for axis in range(shadow.ndim) if axis != dim)
        stays = np.flatnonzero(~gone.all(axis=others))
        shadow, gone = shadow.take(stays, axis=dim), gone.take(stays, axis=dim)
    return shadow


def run_on_shadows(op: tf.Operation, inputs: Sequence[Any]) -> Optional[List[np.ndarray]]:
    """What an operation that moves values does to integers; None when it cannot be told.

    Args:
        op: of the network.
        inputs: one array for each input of ``op``.
    """
    with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
        attributes = {}
        for name, value in op.node_def.attr.items():
            fresh = type(value)()
            fresh.CopyFrom(value)
            if name in ("T", "Tparams"):
                fresh.type = tf.int32.as_datatype_enum
            if not name.startswith("_"):
                attributes[name] = fresh
        try:
            tensors = [tf.constant(value) for value in inputs]
            moved = graph.create_op(op.type, tensors, [tf.int32] * len(op.outputs), attrs=attributes, name="moved")
            with tf.Session(graph=graph) as session:
                return [value.astype(np.int64) for value in session.run(list(moved.outputs))]
        except (ValueError, TypeError, tf.errors.OpError):
            return None
