"""Cross-layer equalisation: two layers in a row trade the ranges of their channels (Nagel et al., ICCV 2019).

relu(x * s) = relu(x) * s for s > 0, so a channel between two layers may have any positive scale: the first layer is
divided by it, the second multiplied. The scales that give each channel the same range in both layers leave the function
as it is and give per-tensor activations, and depthwise weights, the most of their grids.
"""
from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

import numpy as np

_ROUNDS = 20
_TOLERANCE = 1e-3
# an extreme factor only moves a channel that is almost dead
_LARGEST_FACTOR = 1e4


class Equalized(NamedTuple):
    """Weights and biases of a chain after equalisation, in order."""

    weights: List[np.ndarray]
    biases: List[Optional[np.ndarray]]
    factors: List[np.ndarray]  #: float64; output channel ``i`` of layer ``k`` was divided by ``factors[k][i]``


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
