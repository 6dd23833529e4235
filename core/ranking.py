"""Which weights survive: exact numbers of single weights or of blocks along the output channels.

A weight is an array [out_channels, ...]; TensorFlow's layout is transposed at the border. The unit of pruning is a
run of ``block`` consecutive output channels at one place of the filter (1: a single weight, 4: what MNN's kernels load
at once); the last run is shorter when ``out_channels`` is no multiple. A unit is as important as its mean weight.
Everything here is O(n): a partition finds the threshold, nothing is sorted.
"""
from __future__ import annotations

from typing import Dict, Mapping, Optional

import numpy as np

_DEAD = np.float32(-1.0)      # below every score: what is pruned stays pruned
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
        layer -> bool array of the weight's shape, True = survives. Ties go by position.

    Raises:
        ValueError: arguments out of range, scores that are negative or not finite, a sparsity that
            ``max_prune_ratio`` does not allow.
    """
    _check(sparsity, block, max_prune_ratio)
    layers = _Layers(scores, block, alive)
    count = int(round(sparsity * layers.weights))
    pruned = _lowest(layers.values, layers.sizes, count)
    # protecting what a layer must not lose costs a partition of each; mostly no layer is near its limit
    if any(int(np.count_nonzero(pruned[part])) > layers.allowed(part, max_prune_ratio) for part in layers.parts):
        layers.protect(max_prune_ratio)
        pruned = _lowest(layers.values, layers.sizes, count)
        if np.any(np.isinf(layers.values[pruned])):
            raise ValueError("a sparsity of %g cannot be reached with max_prune_ratio=%g: raise it" %
                             (sparsity, max_prune_ratio))
    return layers.expand(np.logical_not(pruned, out=pruned))


def layer_keep(score: np.ndarray, sparsity: float, block: int = 1, alive: Optional[np.ndarray] = None) -> np.ndarray:
    """Keep the most important weights of one layer; arguments and errors as :func:`global_keep`."""
    _check(sparsity, block, 1.0)
    layers = _Layers({"": score}, block, None if alive is None else {"": alive})
    return layers.expand(~_lowest(layers.values, layers.sizes, int(round(sparsity * score.size))))[""]


class _Layers:
    """The units of all layers one behind the other; the arrays are large, so each is written once."""

    def __init__(self, scores: Mapping[str, np.ndarray], block: int, alive: Optional[Mapping[str, np.ndarray]]) -> None:
        self._block = block
        self._channels = {name: len(_checked(name, score)) for name, score in scores.items()}
        self._shapes = {name: (-(-len(score) // block),) + score.shape[1:] for name, score in scores.items()}
        ends = np.cumsum([0] + [int(np.prod(shape)) for shape in self._shapes.values()])
        self.parts = [slice(int(start), int(end)) for start, end in zip(ends, ends[1:])]
        self.weights = sum(score.size for score in scores.values())
        self.values = np.empty(int(ends[-1]), dtype=np.float32)
        for part, (name, shape) in zip(self.parts, self._shapes.items()):
            values = self.values[part].reshape(shape)
            _unit_means(scores[name], block, values)
            if alive is not None:
                np.copyto(values, _DEAD, where=~alive[name][::block])
        self.sizes = self._sizes()

    def _sizes(self) -> Optional[np.ndarray]:
        """Weights per unit; None when a unit is a weight."""
        if self._block == 1:
            return None
        sizes = np.full(self.values.shape, self._block)
        for part, (name, shape) in zip(self.parts, self._shapes.items()):
            sizes[part].reshape(shape)[-1] = self._channels[name] - (shape[0] - 1) * self._block
        return sizes

    @staticmethod
    def allowed(part: slice, max_prune_ratio: float) -> int:
        """Number of units that a layer may lose."""
        return int(max_prune_ratio * (part.stop - part.start) + 1e-6)

    def protect(self, max_prune_ratio: float) -> None:
        """Put the units that a layer must not lose above every other."""
        for part in self.parts:
            flat, allowed = self.values[part], self.allowed(part, max_prune_ratio)
            if allowed < flat.size:
                best = np.argpartition(flat, allowed)[allowed:]
                flat[best] = np.where(flat[best] < 0, flat[best], _SAFE)

    def expand(self, keep: np.ndarray) -> Dict[str, np.ndarray]:
        """Flags of units as flags of weights, by layer."""
        keeps = {}
        for part, (name, shape) in zip(self.parts, self._shapes.items()):
            units = keep[part].reshape(shape)
            keeps[name] = units if self._block == 1 else np.repeat(units, self._block, axis=0)[:self._channels[name]]
        return keeps


def _checked(name: str, score: np.ndarray) -> np.ndarray:
    if score.ndim < 1 or score.size == 0:
        raise ValueError("layer %r has no weights to rank: shape %s" % (name, score.shape))
    if not (np.isfinite(score.max()) and score.min() >= 0):
        raise ValueError("layer %r: scores must be finite and not negative" % name)
    return score


def _unit_means(score: np.ndarray, block: int, out: np.ndarray) -> None:
    """Mean scores of the units, divided by the norm of the layer's scores."""
    flat = np.ravel(score)
    largest = float(flat.max())
    # squares of what is far from 1 leave the range of float32
    near = 1e-12 < largest < 1e12
    scaled = flat if near or not largest else flat / np.float32(largest)
    norm = float(np.sqrt(np.dot(scaled, scaled))) * (1.0 if near or not largest else largest) or 1.0
    whole = len(score) // block
    if block == 1:
        np.multiply(score, np.float32(1.0 / norm), out=out)
        return
    blocks = score[:whole * block].reshape((whole, block) + score.shape[1:])
    np.multiply(blocks.sum(axis=1), np.float32(1.0 / (norm * block)), out=out[:whole])
    if whole < len(out):
        rest = score[whole * block:]
        np.multiply(rest.sum(axis=0), np.float32(1.0 / (norm * len(rest))), out=out[-1])


def _lowest(values: np.ndarray, sizes: Optional[np.ndarray], count: int) -> np.ndarray:
    """Flags of the units with the lowest values that make up ``count`` weights, to the nearest whole unit."""
    if count <= 0:
        return np.zeros(values.shape, dtype=bool)
    if sizes is not None and sizes.min() == sizes.max():
        count, sizes = int(np.floor(count / sizes[0] + 0.5)), None
        if not count:
            return np.zeros(values.shape, dtype=bool)
    each = values if sizes is None else np.repeat(values, sizes)
    if count >= each.size:
        return np.ones(values.shape, dtype=bool)
    threshold = np.partition(each, count - 1)[count - 1]
    below: np.ndarray = values < threshold
    tied = np.flatnonzero(values == threshold)
    if sizes is None:
        below[tied[:count - int(np.count_nonzero(below))]] = True
    else:
        missing = count - int(sizes[below].sum())
        middle = np.cumsum(sizes[tied]) - sizes[tied] / 2
        below[tied[:int(np.searchsorted(middle, missing, side="right"))]] = True
    return below


def _check(sparsity: float, block: int, max_prune_ratio: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError("sparsity must lie in [0, 1), got %r" % (sparsity,))
    if block < 1:
        raise ValueError("a block has at least 1 output channel, got %r" % (block,))
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
