"""Batch normalization in a graph: where it starts and ends, and which tensors hold its inference statistics.

With a Python bool for ``training`` it is one fused operation. With a placeholder, version 1 of control flow makes two
of them, each behind switches, and a merge. In training form the operation knows only the statistics of the batch; the
moving averages are found where its batch statistics flow to. Where it is no fused operation at all (of dense layers,
and of Keras 3), the batch statistics are tensors of their own, in whose place the moving averages are read.
"""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import variables_behind, variables_by_name

FUSED = frozenset({"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"})
_ASSIGN = frozenset({"AssignSub", "AssignAdd", "Assign", "AssignSubVariableOp", "AssignAddVariableOp",
                     "AssignVariableOp"})
_STEPS_TO_ASSIGN = 8
_SAME_VALUES = ("Identity", "StopGradient", "Squeeze", "Reshape")


class BatchNorm(NamedTuple):
    """One batch normalization: ``y = gamma * (x - mean) / sqrt(variance + epsilon) + beta`` at inference."""

    input: tf.Tensor
    output: tf.Tensor
    gamma: tf.Tensor
    beta: tf.Tensor
    mean: tf.Tensor       #: moving average, readable at any time
    variance: tf.Tensor   #: moving average, readable at any time
    epsilon: float
    ops: Tuple[str, ...]  #: names of the operations between input and output
    training: bool        #: whether the graph normalizes with the statistics of the batch


def find_batch_norms(graph: tf.Graph) -> Dict[str, BatchNorm]:
    """Every batch normalization whose inference statistics are known, by the name of its output tensor.

    Adds operations that read moving averages to the graph.
    """
    found = {}
    merged: Set[str] = set()
    ops = graph.get_operations()
    for op in ops:
        if op.type == "Merge" and all(source.op.type in FUSED and source.value_index == 0 for source in op.inputs):
            norm = _merged(op)
            merged.update(source.op.name for source in op.inputs)
            if norm is not None:
                found[norm.output.name] = norm
    for op in ops:
        if op.type in FUSED and op.name not in merged:
            norm = _plain(op)
            if norm is not None:
                found[norm.output.name] = norm
    return found


def _plain(op: tf.Operation) -> Optional[BatchNorm]:
    training = bool(op.get_attr("is_training"))
    statistics = _moving_averages(op) if training else (op.inputs[3], op.inputs[4])
    if statistics is None or op.get_attr("data_format") != b"NHWC":
        return None
    return BatchNorm(op.inputs[0], op.outputs[0], op.inputs[1], op.inputs[2], statistics[0], statistics[1],
                     float(op.get_attr("epsilon")), (op.name,), training)


def _merged(merge: tf.Operation) -> Optional[BatchNorm]:
    """A pair of fused operations in the two branches of a ``cond``: the one that infers knows the moving averages."""
    pair = [source.op for source in merge.inputs]
    infer = next((op for op in pair if not op.get_attr("is_training")), None)
    if infer is None or infer.get_attr("data_format") != b"NHWC":
        return None
    outside = [_before(tensor, ("Switch",)) for tensor in infer.inputs]
    switches = [tensor.op.name for op in pair for tensor in op.inputs if tensor.op.type == "Switch"]
    return BatchNorm(outside[0], merge.outputs[0], outside[1], outside[2], outside[3], outside[4],
                     float(infer.get_attr("epsilon")), tuple(switches + [op.name for op in pair] + [merge.name]), True)


def _before(tensor: tf.Tensor, types: Sequence[str]) -> tf.Tensor:
    while tensor.op.type in types:
        tensor = tensor.op.inputs[0]
    return tensor


def _moving_averages(op: tf.Operation) -> Optional[Tuple[tf.Tensor, tf.Tensor]]:
    names = [_assigned_variable(op.outputs[index]) for index in (1, 2)]
    known = variables_by_name(op.graph)
    if any(name not in known for name in names):
        return None
    with op.graph.as_default(), tf.name_scope(None), tf.control_dependencies(None):
        mean, variance = (tf.identity(known[name].read_value(), name="MNN_QAT/{}/inference".format(name))
                          for name in names)
    return mean, variance


def find_batch_statistics(graph: tf.Graph) -> Dict[str, tf.Tensor]:
    """The moving average to be read at inference in the place of each statistic of a batch, by its tensor's name.

    Adds operations that read moving averages to the graph.
    """
    found: Dict[str, tf.Tensor] = {}
    known = variables_by_name(graph)
    for op in graph.get_operations():
        path, name = _way_to_variable(op.outputs[0]) if is_over_batch(op) else ([], "")
        # the statistic itself is used twice: to normalize, and to update its average
        shared = [tensor for tensor in path if len({reader.name for reader in tensor.consumers()}) > 1]
        if name in known and shared and shared[-1].shape.as_list() == known[name].shape.as_list():
            with graph.as_default(), tf.name_scope(None), tf.control_dependencies(None):
                found[shared[-1].name] = tf.identity(known[name].read_value(), name="MNN_QAT/{}/inference".format(name))
    return found


def is_over_batch(op: tf.Operation) -> bool:
    """Whether ``op`` averages over the batch, the first axis, and others at most."""
    if op.type != "Mean" or not op.inputs[0].shape.rank:
        return False
    axes = tf.get_static_value(op.inputs[1])
    return axes is not None and 0 in {int(axis) % op.inputs[0].shape.rank for axis in axes.reshape(-1)}


def normalizes_over_batch(op: tf.Operation) -> bool:
    """Whether ``op`` measures how far values are from their mean over the batch."""
    if op.type != "SquaredDifference":
        return False
    return any(is_over_batch(_before(tensor, _SAME_VALUES).op) for tensor in op.inputs)


def _way_to_variable(statistic: tf.Tensor) -> Tuple[List[tf.Tensor], str]:
    """The tensors from a statistic to the nearest assignment downstream of it, and the variable assigned there."""
    ways: List[List[tf.Tensor]] = [[statistic]]
    seen: Set[str] = set()
    for _ in range(_STEPS_TO_ASSIGN):
        longer: List[List[tf.Tensor]] = []
        for way in ways:
            for op in way[-1].consumers():
                if op.type in _ASSIGN:
                    return way, str((variables_behind(op.inputs[0]) or [""])[0])
                if op.name not in seen:
                    seen.add(op.name)
                    longer.extend(way + [tensor] for tensor in op.outputs)
        ways = longer
    return [], ""


def _assigned_variable(statistic: tf.Tensor) -> str:
    """The variable that a batch statistic is averaged into."""
    return _way_to_variable(statistic)[1]
