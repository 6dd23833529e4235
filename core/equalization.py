"""Cross-layer equalisation: two layers in a row trade the ranges of their channels (Nagel et al., ICCV 2019).

relu(x * s) = relu(x) * s for s > 0, so a channel between two layers may have any positive scale: the first layer is
divided by it, the second multiplied. The scales that give each channel the same range in both layers leave the function
as it is and give per-tensor activations, and depthwise weights, the most of their grids.
"""
from __future__ import annotations

from collections import Counter
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from slimtrain.core.placement import Op, OpKind

_ROUNDS = 20
_TOLERANCE = 1e-3
# an extreme factor only moves a channel that is almost dead
_LARGEST_FACTOR = 1e4


class Equalized(NamedTuple):
    """Weights and biases of a chain after equalisation, in order."""

    weights: List[np.ndarray]
    biases: List[Optional[np.ndarray]]
    factors: List[np.ndarray]  #: float64; output channel ``i`` of layer ``k`` was divided by ``factors[k][i]``


class ChainLayer(NamedTuple):
    """A layer of a chain."""

    layer: str
    batch_norm: str  #: the tensor that a batch norm behind the layer makes; "" without one


def equalizable_chains(ops: Sequence[Op], outputs: Sequence[str],
                       usable: Callable[[ChainLayer], bool]) -> List[Tuple[ChainLayer, ...]]:
    """Layers in a row of which each alone reads what the one before it makes, with at most a norm and a ReLU between.

    A chain ends at anything else: a ReLU6, a pool or a residual branch do not let a factor pass, and neither does a
    layer that is used twice.

    Args:
        ops: the network in execution order.
        outputs: tensors that leave the network.
        usable: whether a layer, and the batch norm behind it, can be scaled.

    Returns:
        the chains of two layers or more.
    """
    readers: Dict[str, List[Op]] = {}
    for op in ops:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)
    uses = Counter(op.layer for op in ops if op.kind is OpKind.LAYER)

    def only_reader(name: str) -> Optional[Op]:
        found = readers.get(name, [])
        return found[0] if len(found) == 1 and name not in outputs else None

    def link(op: Optional[Op]) -> Tuple[Optional[ChainLayer], Optional[Op]]:
        """The layer that an operation is, if it can be scaled, and what reads it."""
        if op is None or op.kind is not OpKind.LAYER or uses[op.layer] > 1:
            return None, None
        norm, following = "", only_reader(op.output)
        if following is not None and following.kind is OpKind.BATCH_NORM:
            norm, following = following.output, only_reader(following.output)
        if following is not None and following.kind is OpKind.RELU:
            following = only_reader(following.output)
        found = ChainLayer(op.layer, norm)
        return (found, following) if usable(found) else (None, None)

    chains: List[Tuple[ChainLayer, ...]] = []
    taken: List[str] = []
    for op in ops:
        chain: List[ChainLayer] = []
        following: Optional[Op] = op
        while True:
            found, following = link(following)
            if found is None or found.layer in taken:
                break
            chain.append(found)
            taken.append(found.layer)
        if len(chain) > 1:
            chains.append(tuple(chain))
    return chains


def equalize_chain(weights: Sequence[np.ndarray], biases: Sequence[Optional[np.ndarray]],
                   depthwise: Sequence[bool]) -> Equalized:
    """Equalise layers that read each other's output, with at most a ReLU in between.

    The factor of a channel is sqrt(r1 * r2) / r2 (equation 11), r being the largest magnitudes of its weights in the
    first and in the second layer. Pairs are visited in turns until no factor changes by more than 0.1 %.

    Args:
        weights: [O, I, ...] each, the inputs of one being the outputs of the one before; depthwise [C, 1, ...].
        biases: [O] or None each.
        depthwise: whether a layer has one input channel for each output channel.

    Returns:
        float64 weights and biases. The product of all factors of a chain's channels leaves its function unchanged;
        the outputs of the last layer keep their scale.

    Raises:
        ValueError: the layers do not fit each other.
    """
    values = [np.array(weight, dtype=np.float64) for weight in weights]
    offsets = [None if bias is None else np.array(bias, dtype=np.float64) for bias in biases]
    _check(values, depthwise)
    factors = [np.ones(len(value)) for value in values]
    for _ in range(_ROUNDS):
        largest = 1.0
        for first in range(len(values) - 1):
            factor = _factor(values[first], values[first + 1], depthwise[first + 1])
            values[first] /= _along(factor, values[first], 0)
            values[first + 1] *= _along(factor, values[first + 1], 0 if depthwise[first + 1] else 1)
            offset = offsets[first]
            offsets[first] = None if offset is None else offset / factor
            factors[first] *= factor
            largest = max(largest, float(np.exp(np.abs(np.log(factor)).max())))
        if largest < 1 + _TOLERANCE:
            break
    return Equalized(values, offsets, factors)


def _factor(first: np.ndarray, second: np.ndarray, depthwise: bool) -> np.ndarray:
    """sqrt(r1 / r2) of each channel, rounded to no power: 1 where one of the ranges is zero."""
    made = np.abs(first).reshape(len(first), -1).max(axis=1)
    readers = second if depthwise else np.swapaxes(second, 0, 1)
    read = np.abs(readers).reshape(len(readers), -1).max(axis=1)
    alive = (made > 0) & (read > 0)
    ratio = np.sqrt(np.where(alive, made, 1.0) / np.where(alive, read, 1.0))
    return np.clip(np.where(alive, ratio, 1.0), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _along(factor: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return factor.reshape(shape)


def _check(weights: Sequence[np.ndarray], depthwise: Sequence[bool]) -> None:
    for index in range(1, len(weights)):
        inputs = weights[index].shape[0 if depthwise[index] else 1]
        if inputs != len(weights[index - 1]):
            raise ValueError("layer %d of the chain reads %d channels, the one before it makes %d" % (
                index, inputs, len(weights[index - 1])))
