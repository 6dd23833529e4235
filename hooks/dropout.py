"""Dropout in a training graph: recognised so that the exported network can go without it."""
from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Set

import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import is_random

_SCALING = frozenset({"Mul", "RealDiv"})


class Dropout(NamedTuple):
    """``output = source / keep_probability`` where a random mask says so, else 0."""

    op: str            #: name of the operation that applies the mask
    source: tf.Tensor  #: what it drops from


def find_dropouts(graph: tf.Graph, fixed: Set[str]) -> Dict[str, Dropout]:
    """Every dropout that is drawn anew in each run, by the name of its output tensor.

    Args:
        graph: where to look.
        fixed: names of the tensors that depend on variables and constants alone.
    """
    noise = _noise(graph, fixed)
    found = {}
    for op in graph.get_operations() if noise else ():
        scaled = _masked_value(op, noise)
        if scaled is not None and scaled.op.type in _SCALING and len(scaled.op.inputs) == 2:
            values = [tensor for tensor in scaled.op.inputs if not _is_parameter(tensor, fixed)]
            if len(values) == 1:
                found[op.outputs[0].name] = Dropout(op.name, values[0])
    return found


def _noise(graph: tf.Graph, fixed: Set[str]) -> Set[str]:
    """Names of the tensors made of random numbers and parameters alone."""
    noise: Set[str] = set()
    for op in graph.get_operations():
        drawn = any(tensor.name in noise for tensor in op.inputs)
        pure = all(tensor.name in noise or _is_parameter(tensor, fixed) for tensor in op.inputs)
        if is_random(op.type) or (drawn and pure):
            noise.update(tensor.name for tensor in op.outputs)
    return noise


def _is_parameter(tensor: tf.Tensor, fixed: Set[str]) -> bool:
    return tensor.name in fixed or tensor.shape.rank == 0


def _masked_value(op: tf.Operation, noise: Set[str]) -> Optional[tf.Tensor]:
    """The input that ``op`` masks with random numbers, if that is what it does."""
    if op.type == "Mul":
        pair = list(op.inputs)
    elif op.type in ("Select", "SelectV2"):
        pair = [op.inputs[1], op.inputs[0]]
    else:
        return None
    for value, mask in (pair, pair[::-1]):
        if mask.name in noise and value.name not in noise:
            return value
    return None
