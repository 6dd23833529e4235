"""Choosing the channels that survive, so that a wanted share of the weights is really gone.

Removing a channel removes a row of one layer and a column of the next, so a share of the weights is not a share of
the channels: the number of channels is found by bisection on the exact weight count of the smaller network.
"""
from __future__ import annotations

from typing import List, NamedTuple, Optional

import numpy as np

from slimtrain.core.channels import ChannelClasses


class ChannelChoice(NamedTuple):
    """The decision."""

    keep: np.ndarray    #: bool per class
    sparsity: float     #: the share of the weights that is really removed; as near to the request as alignment allows


def choose_channels(classes: ChannelClasses, scores: np.ndarray, sparsity: float, align: int = 1,
                    max_prune_ratio: float = 1.0, alive: Optional[np.ndarray] = None) -> ChannelChoice:
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

    Raises:
        ValueError: arguments out of range; no channel of the network can be removed.
    """
    _check(classes, scores, sparsity, align, max_prune_ratio)
    keys = np.full(classes.size, np.inf)
    shares = np.full(classes.size, np.inf)
    for group in classes.groups:
        values = scores[group.classes].astype(np.float64)
        values = values / (values.mean() or 1.0)
        if alive is not None:
            values = np.where(alive[group.classes], values, -1.0)
        keys[group.classes] = values
        order = np.argsort(values, kind="stable")
        shares[group.classes[order]] = (np.arange(values.size) + 1.0) / values.size
    even = _cut(classes, shares, sparsity, align, np.full(len(classes.groups), max_prune_ratio))
    lost = np.array([1.0 - keep_share for keep_share in _kept_shares(classes, even)])
    limits = np.minimum(max_prune_ratio, (1.0 + lost) / 2.0)
    keep = _cut(classes, keys, sparsity, align, limits)
    return ChannelChoice(keep, 1.0 - classes.weights(keep) / _all(classes))


def _cut(classes: ChannelClasses, keys: np.ndarray, sparsity: float, align: int, limits: np.ndarray) -> np.ndarray:
    """Remove the lowest keys until the weights that are left come nearest to the request."""
    wanted = (1.0 - sparsity) * _all(classes)
    candidates = np.unique(keys[np.isfinite(keys)])
    low, high = 0, len(candidates)  # number of distinct keys removed
    while high - low > 1:
        middle = (low + high) // 2
        enough = classes.weights(_keep_above(classes, keys, candidates[middle - 1], align, limits)) <= wanted
        low, high = (low, middle) if enough else (middle, high)
    options = [np.ones(classes.size, dtype=bool)] if low == 0 else []
    options += [_keep_above(classes, keys, candidates[index - 1], align, limits)
                for index in (low, high) if index > 0]
    return min(options, key=lambda keep: abs(classes.weights(keep) - wanted))


def _keep_above(classes: ChannelClasses, keys: np.ndarray, threshold: float, align: int,
                limits: np.ndarray) -> np.ndarray:
    keep = np.ones(classes.size, dtype=bool)
    for group, limit in zip(classes.groups, limits):
        values = keys[group.classes]
        kept = int(np.count_nonzero(values > threshold))
        least = max(1, int(np.ceil((1.0 - limit) * values.size - 1e-9)))
        kept = min(-(-max(kept, least) // align) * align, values.size)
        keep[group.classes[np.argsort(values, kind="stable")[:values.size - kept]]] = False
    return keep


def _kept_shares(classes: ChannelClasses, keep: np.ndarray) -> List[float]:
    return [float(np.mean(keep[group.classes])) for group in classes.groups]


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
