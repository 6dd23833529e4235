"""Which weights survive: exact numbers of single weights or of blocks along the output channels.

A weight is an array [out_channels, ...]; TensorFlow's layout is transposed at the border. The unit of pruning is a
run of ``block`` consecutive output channels at one place of the filter (1: a single weight, 4: what MNN's kernels load
at once); the last run is shorter when ``out_channels`` is no multiple. A unit is as important as its mean weight.
Everything here is O(n): a partition finds the threshold, nothing is sorted.
"""
from __future__ import annotations

from typing import Dict, Mapping, NamedTuple, Optional

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
    units = [_units(name, score, block, alive) for name, score in scores.items()]
    for unit in units:
        _protect(unit, max_prune_ratio)
    values = np.concatenate([unit.values.ravel() for unit in units]) if units else np.zeros(0, np.float32)
    sizes = None if block == 1 else np.concatenate([unit.sizes.ravel() for unit in units])
    total = sum(score.size for score in scores.values())
    pruned = _lowest(values, sizes, int(round(sparsity * total)))
    if np.any(np.isinf(values[pruned])):
        raise ValueError("a sparsity of %g cannot be reached with max_prune_ratio=%g: raise it"
                         % (sparsity, max_prune_ratio))
    keeps, start = {}, 0
    for (name, score), unit in zip(scores.items(), units):
        end = start + unit.values.size
        keeps[name] = _expand(~pruned[start:end].reshape(unit.values.shape), len(score), block)
        start = end
    return keeps


def layer_keep(score: np.ndarray, sparsity: float, block: int = 1, alive: Optional[np.ndarray] = None) -> np.ndarray:
    """Keep the most important weights of one layer; arguments and errors as :func:`global_keep`."""
    _check(sparsity, block, 1.0)
    unit = _units("", score, block, None if alive is None else {"": alive})
    sizes = None if block == 1 else unit.sizes.ravel()
    pruned = _lowest(unit.values.ravel(), sizes, int(round(sparsity * score.size)))
    return _expand(~pruned.reshape(unit.values.shape), len(score), block)


class _Units(NamedTuple):
    values: np.ndarray  #: float32 [ceil(out_channels / block), ...], written in place
    sizes: np.ndarray   #: int, the same shape (broadcast)


def _units(name: str, score: np.ndarray, block: int, alive: Optional[Mapping[str, np.ndarray]]) -> _Units:
    if score.ndim < 1 or score.size == 0:
        raise ValueError("layer %r has no weights to rank: shape %s" % (name, score.shape))
    largest = float(score.max())
    if not np.isfinite(largest) or not score.min() >= 0:
        raise ValueError("layer %r: scores must be finite and not negative" % name)
    values = np.asarray(score, dtype=np.float32) / np.float32(largest or 1.0)  # whose squares do not underflow
    values /= np.sqrt(np.dot(values.ravel(), values.ravel())) or np.float32(1.0)
    if alive is not None:
        values = np.where(alive[name], values, _DEAD)
    starts = np.arange(0, len(score), block)
    counts = np.minimum(block, len(score) - starts)
    column = (-1,) + (1,) * (score.ndim - 1)
    if block > 1:
        values = np.add.reduceat(values, starts, axis=0) / counts.reshape(column).astype(np.float32)
    return _Units(values, np.broadcast_to(counts.reshape(column), values.shape))


def _protect(unit: _Units, max_prune_ratio: float) -> None:
    """Put the units that a layer must not lose above every other score."""
    flat = unit.values.reshape(-1)
    allowed = int(max_prune_ratio * flat.size + 1e-6)
    if allowed < flat.size:
        order = np.argpartition(flat, allowed)
        flat[order[allowed:]] = np.where(flat[order[allowed:]] < 0, flat[order[allowed:]], _SAFE)


def _lowest(values: np.ndarray, sizes: Optional[np.ndarray], count: int) -> np.ndarray:
    """Flags of the units with the lowest values that make up ``count`` weights, to the nearest whole unit."""
    if count <= 0:
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


def _expand(keep: np.ndarray, channels: int, block: int) -> np.ndarray:
    return keep if block == 1 else np.repeat(keep, block, axis=0)[:channels]


def _check(sparsity: float, block: int, max_prune_ratio: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError("sparsity must lie in [0, 1), got %r" % (sparsity,))
    if block < 1:
        raise ValueError("a block has at least 1 output channel, got %r" % (block,))
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
