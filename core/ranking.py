"""Which weights survive: exact numbers of single weights or of blocks along the output channels.

A weight is an array [out_channels, ...]; TensorFlow's layout is transposed at the border. The unit of pruning is a
run of ``block`` consecutive output channels at one place of the filter (1: a single weight, 4: what MNN's kernels load
at once); the last run is shorter when ``out_channels`` is no multiple. A unit is as important as its mean weight.
Everything here is O(n): nothing is sorted, and nothing is moved: a transposed view is gone through in the order in
which its memory lies.
"""
from __future__ import annotations

from typing import Dict, List, Mapping, Optional

import numpy as np

from slimtrain.core.order_statistics import Run, lowest

_FAR = np.float32(1e30)       # scores less this much are all equal, and below every score: what is pruned stays pruned
_SAFE = np.float32(np.inf)    # above every score


def sparsity_of(keeps: Mapping[str, np.ndarray]) -> float:
    """The share of weights that do not survive, over all layers."""
    total = sum(keep.size for keep in keeps.values())
    return 1.0 - sum(int(np.count_nonzero(keep)) for keep in keeps.values()) / total if total else 0.0


def global_keep(scores: Mapping[str, np.ndarray], sparsity: float, block: int = 1, max_prune_ratio: float = 1.0,
                alive: Optional[Mapping[str, np.ndarray]] = None) -> Dict[str, np.ndarray]:
    """Keep the most important weights of all layers together.

    Each layer's scores are divided by their Euclidean norm first. Gradients differ by orders of magnitude between
    layers, and without it one layer would be emptied before another loses anything; and with the mean in its place
    a small layer, where each weight matters more, would lose as large a share as a large one.

    Args:
        scores: layer -> non-negative float array [out_channels, ...].
        sparsity: share of all weights to prune, in [0, 1). Met exactly for single weights, to half a block else.
        block: output channels per unit.
        max_prune_ratio: no layer loses a larger share of its units; in (0, 1].
        alive: layer -> bool array; what is False there stays pruned and counts.

    Returns:
        layer -> bool array of the weight's shape and order in memory, True = survives. Ties go by position in memory.

    Raises:
        ValueError: arguments out of range, scores that are negative or not finite, a sparsity that
            ``max_prune_ratio`` does not allow.
    """
    _check(sparsity, block, max_prune_ratio)
    layers = _Layers(scores, block, alive)
    count = int(round(sparsity * layers.weights))
    pruned = layers.lowest(count)
    # protecting what a layer must not lose costs a selection in each; mostly no layer is near its limit
    if any(int(np.count_nonzero(flags)) > _allowed(flags.size, max_prune_ratio) for flags in pruned.values()):
        layers.protect(max_prune_ratio)
        pruned = layers.lowest(count)
        if any(bool(np.any(np.isinf(layers.units[name]) & flags)) for name, flags in pruned.items()):
            raise ValueError("a sparsity of %g cannot be reached with max_prune_ratio=%g: raise it" %
                             (sparsity, max_prune_ratio))
    return layers.survivors(pruned)


def layer_keep(score: np.ndarray, sparsity: float, block: int = 1, alive: Optional[np.ndarray] = None) -> np.ndarray:
    """Keep the most important weights of one layer; arguments and errors as :func:`global_keep`."""
    _check(sparsity, block, 1.0)
    layers = _Layers({"": score}, block, None if alive is None else {"": alive})
    return layers.survivors(layers.lowest(int(round(sparsity * score.size))))[""]


class _Layers:
    """The units of all layers; the arrays are large, so each is written once."""

    def __init__(self, scores: Mapping[str, np.ndarray], block: int, alive: Optional[Mapping[str, np.ndarray]]) -> None:
        self._block = block
        largest = {name: _largest(name, score) for name, score in scores.items()}
        self._channels = {name: len(score) for name, score in scores.items()}
        self.weights = sum(score.size for score in scores.values())
        #: layer -> float32 [units along the output channels, ...]
        self.units = {name: _unit_means(score, largest[name], block) for name, score in scores.items()}
        if alive is not None:
            for name, units in self.units.items():
                dead = ~alive[name][::block]
                units -= dead.view(np.uint8) * _FAR  # a tenth of the time of an assignment to some places

    def _runs(self, name: str) -> List[Run]:
        units, rest = self.units[name], self._channels[name] % self._block
        if not rest:
            return [Run(units.ravel("K"), self._block)]
        return [Run(units[:-1].reshape(-1), self._block), Run(units[-1:].reshape(-1), rest)]

    def lowest(self, count: int) -> Dict[str, np.ndarray]:
        """Flags of the units to prune for ``count`` weights less, by layer."""
        runs = {name: self._runs(name) for name in self.units}
        flags = iter(lowest([run for own in runs.values() for run in own], count))
        found = {name: [next(flags) for _ in own] for name, own in runs.items()}
        return {name: _like(self.units[name], parts[0]) if len(parts) == 1
                else np.concatenate(parts).reshape(self.units[name].shape) for name, parts in found.items()}

    def protect(self, max_prune_ratio: float) -> None:
        """Put the units that a layer must not lose above every other."""
        for units in self.units.values():
            low = _like(units, lowest([Run(units.ravel("K"), 1)], _allowed(units.size, max_prune_ratio))[0])
            np.copyto(units, _SAFE, where=~low & (units >= 0))

    def survivors(self, pruned: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Flags of units that go as flags of weights that stay, by layer."""
        keeps = {}
        for name, flags in pruned.items():
            units = np.logical_not(flags, out=flags)
            keeps[name] = units
            if self._block > 1:
                keeps[name] = _empty(units, self._channels[name], bool)
                for place in range(self._block):
                    into = keeps[name][place::self._block]
                    into[:] = units[:len(into)]
        return keeps


def _allowed(units: int, max_prune_ratio: float) -> int:
    """How many of its units a layer may lose."""
    return int(max_prune_ratio * units + 1e-6)


def _largest(name: str, score: np.ndarray) -> float:
    """The largest of a layer's scores, after a look at whether they are scores at all."""
    if score.ndim < 1 or score.size == 0:
        raise ValueError("layer %r has no weights to rank: shape %s" % (name, score.shape))
    largest = float(score.max())
    if not (np.isfinite(largest) and score.min() >= 0):
        raise ValueError("layer %r: scores must be finite and not negative" % name)
    return largest


def _unit_means(score: np.ndarray, largest: float, block: int) -> np.ndarray:
    """Mean scores of the units, divided by the norm of the layer's scores; in memory without gaps."""
    flat = score.ravel("K")
    # squares of what is far from 1 leave the range of float32
    near = 1e-12 < largest < 1e12
    scaled = flat if near or not largest else flat / np.float32(largest)
    norm = float(np.sqrt(np.dot(scaled, scaled))) * (1.0 if near or not largest else largest) or 1.0
    if block == 1:
        return np.multiply(score, np.float32(1.0 / norm), out=_empty(score, len(score), np.float32))
    units = _empty(score, -(-len(score) // block), np.float32)
    whole, rest = divmod(len(score), block)
    units[:whole] = score[:whole * block:block]
    for place in range(1, block):  # a sum along an axis would go through the memory in steps of a few values
        units[:whole] += score[place:whole * block:block]
    if rest:
        units[whole] = score[whole * block:].sum(axis=0) * np.float32(block / rest)
    return np.multiply(units, np.float32(1.0 / (norm * block)), out=units)


def _empty(like: np.ndarray, length: int, dtype: type) -> np.ndarray:
    """An array of other length along the first axis, without gaps, in the order in which ``like`` lies in memory."""
    shape = (length,) + like.shape[1:]
    outer = _outer_first(like)
    return np.empty([shape[axis] for axis in outer], dtype).transpose(np.argsort(outer))


def _like(array: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """The inverse of ``array.ravel("K")`` for an array without gaps."""
    outer = _outer_first(array)
    return flat.reshape([array.shape[axis] for axis in outer]).transpose(np.argsort(outer))


def _outer_first(array: np.ndarray) -> np.ndarray:
    """The axes of an array, those of the longest steps in memory first."""
    return np.argsort([-abs(step) for step in array.strides], kind="stable")


def _check(sparsity: float, block: int, max_prune_ratio: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError("sparsity must lie in [0, 1), got %r" % (sparsity,))
    if block < 1:
        raise ValueError("a block has at least 1 output channel, got %r" % (block,))
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
