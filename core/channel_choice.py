"""Choosing the channels that survive, so that a wanted share of the weights is really gone.

Removing a channel removes a row of one layer and a column of the next, so a share of the weights is not a share of
the channels: the number of channels is found by bisection on the exact weight count of the smaller network.
"""
from __future__ import annotations

from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from slimtrain.core.channels import ChannelClasses


class ChannelChoice(NamedTuple):
    """The decision."""

    keep: np.ndarray    #: bool per class
    sparsity: float     #: the share of the weights that is really removed; as near to the request as alignment allows


def choose_channels(classes: ChannelClasses, scores: np.ndarray, sparsity: float, align: int = 1,
                    max_prune_ratio: float = 1.0, alive: Optional[np.ndarray] = None,
                    shares: Optional[Mapping[str, float]] = None) -> ChannelChoice:
    """Keep the most important channels.

    The scores of a group are divided by their mean. No group loses more than leaves it half of the channels that it
    would have if all groups lost the same share: a ranking over all groups alone empties one before the others are
    thinned.

    Args:
        classes: the network.
        scores: importance of each class, float [classes.size], not negative.
        sparsity: share of all weights to remove, in [0, 1).
        align: a group keeps a multiple of this many channels (or all).
        max_prune_ratio: no group loses a larger share of its channels; in (0, 1].
        alive: bool per class; what is False there is removed whatever its score.
        shares: layer -> share of its channels to remove, whatever the others lose; holds for all layers of its group.

    Raises:
        ValueError: arguments out of range; no channel of the network can be removed.
    """
    _check(classes, scores, sparsity, align, max_prune_ratio)
    keys = np.full(classes.size, np.inf)
    ranks = np.full(classes.size, np.inf)
    for group in classes.groups:
        values = scores[group.classes].astype(np.float64)
        values = values / (values.mean() or 1.0)
        if alive is not None:
            values = np.where(alive[group.classes], values, -1.0)
        keys[group.classes] = values
        order = np.argsort(values, kind="stable")
        ranks[group.classes[order]] = (np.arange(values.size) + 1.0) / values.size
    given = [next((share for name, share in (shares or {}).items() if name in group.layers), None)
             for group in classes.groups]
    even = _cut(classes, ranks, sparsity, [_Rule(align, max_prune_ratio, share) for share in given])
    limits = [min(max_prune_ratio, 1.0 - float(np.mean(even[group.classes])) / 2.0) for group in classes.groups]
    keep = _cut(classes, keys, sparsity, [_Rule(align, limit, share) for limit, share in zip(limits, given)])
    return ChannelChoice(keep, 1.0 - classes.weights(keep) / _all(classes))


class _Rule(NamedTuple):
    """How many channels a group may lose."""

    align: int
    limit: float
    share: Optional[float]

    def kept(self, wanted: int, size: int) -> int:
        if self.share is not None:
            wanted = size - int(round(self.share * size))
        least = max(1, int(np.ceil((1.0 - self.limit) * size - 1e-9)))
        return min(-(-max(wanted, least) // self.align) * self.align, size)


def _cut(classes: ChannelClasses, keys: np.ndarray, sparsity: float, rules: Sequence[_Rule]) -> np.ndarray:
    """Remove the lowest keys until the weights that are left come nearest to the request."""
    wanted = (1.0 - sparsity) * _all(classes)
    thresholds = np.concatenate([[-np.inf], np.unique(keys[np.isfinite(keys)])])
    low, high = 0, len(thresholds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = classes.weights(_keep_above(classes, keys, thresholds[middle], rules)) <= wanted
        low, high = (low, middle) if enough else (middle, high)
    options = [_keep_above(classes, keys, thresholds[index], rules) for index in (low, high)]
    return min(options, key=lambda keep: abs(classes.weights(keep) - wanted))


def _keep_above(classes: ChannelClasses, keys: np.ndarray, threshold: float, rules: Sequence[_Rule]) -> np.ndarray:
    keep = np.ones(classes.size, dtype=bool)
    for group, rule in zip(classes.groups, rules):
        values = keys[group.classes]
        kept = rule.kept(int(np.count_nonzero(values > threshold)), values.size)
        keep[group.classes[np.argsort(values, kind="stable")[:values.size - kept]]] = False
    return keep


def _all(classes: ChannelClasses) -> int:
    return classes.weights(np.ones(classes.size, dtype=bool))


def _check(classes: ChannelClasses, scores: np.ndarray, sparsity: float, align: int, max_prune_ratio: float) -> None:
    if not classes.groups:
        reasons = "; ".join("%s: %s" % item for item in classes.fixed.items()) or "it has no layers"
        raise ValueError("no channel of the network can be removed (%s)" % reasons)
    if scores.shape != (classes.size,) or not np.all(np.isfinite(scores)) or scores.min() < 0:
        raise ValueError("scores must be %d finite numbers that are not negative" % classes.size)
    if not 0.0 <= sparsity < 1.0:
        raise ValueError("sparsity must lie in [0, 1), got %r" % (sparsity,))
    if align < 1:
        raise ValueError("channels are aligned to at least 1, got %r" % (align,))
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
