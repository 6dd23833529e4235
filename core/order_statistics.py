"""The lowest of millions of values in a few passes over them.

A sample brackets the threshold (Floyd and Rivest, "Expected time bounds for selection", Communications of the ACM 18,
1975); one pass counts what lies below and inside the bracket, and only what lies inside is partitioned. A partition of
everything takes several times as long, and forty times where half of the values are equal, as those of weights whose
gradient is zero are.
"""
from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

_FEW = 1 << 13      # values that are partitioned at once
_STRIDE = 61        # of the sample; a prime, so that every place of a kernel gets into it
_PIECE = 1 << 15    # values that stay in the cache between two operations on them


class Run(NamedTuple):
    """Values that weigh the same."""

    values: np.ndarray   #: float32 [N] without NaN
    size: int            #: what each weighs, at least 1


def lowest(runs: Sequence[Run], weight: int) -> List[np.ndarray]:
    """Flags of the lowest values that weigh ``weight`` together, to the nearest whole value.

    Ties go by position, those in earlier runs first.

    Returns:
        for each run a bool array [N], True = among the lowest.
    """
    if weight <= 0:
        return [np.zeros(len(run.values), dtype=bool) for run in runs]
    if weight >= _weight(runs):
        return [np.ones(len(run.values), dtype=bool) for run in runs]
    threshold = weighted_threshold(runs, weight)
    flags = [run.values <= threshold for run in runs]
    surplus = sum(run.size * int(np.count_nonzero(flag)) for run, flag in zip(runs, flags)) - weight
    _give_back(runs, flags, threshold, surplus)
    return flags


def weighted_threshold(runs: Sequence[Run], weight: int) -> np.float32:
    """The smallest value for which all values up to it weigh at least ``weight``, which lies in [1, weight of all]."""
    if sum(len(run.values) for run in runs) <= _FEW:
        return _by_partition(runs, weight)
    sample = [Run(np.ascontiguousarray(run.values[::_STRIDE]), run.size) for run in runs]
    low, high = _bracket(sample, weight / _weight(runs))
    up_to_low = inside = 0
    picked: List[Run] = []
    for run in runs:
        counted, values = _between(run.values, low, high)
        up_to_low += counted * run.size
        inside += len(values) * run.size
        picked.append(Run(values, run.size))
    if up_to_low < weight <= up_to_low + inside:
        return _by_partition(picked, weight - up_to_low)
    # many equal values, of which the sample saw some; or a sample that says nothing about the whole
    if weight <= up_to_low and _weight_where(np.less, runs, low) < weight:
        return low
    if weight > up_to_low and weight <= _weight_where(np.less_equal, runs, high):
        return high
    return _by_partition(runs, weight)


def _give_back(runs: Sequence[Run], flags: Sequence[np.ndarray], threshold: np.float32, surplus: int) -> None:
    """Take the flags off the last values at the threshold, while that comes nearer to the weight."""
    for run, flag in zip(reversed(runs), reversed(flags)):
        for start in reversed(range(0, len(flag), _PIECE)):
            if surplus <= 0:
                return
            tied = start + np.flatnonzero(run.values[start:start + _PIECE] == threshold)
            kept = len(tied) - (2 * surplus + run.size - 1) // (2 * run.size)
            flag[tied[max(0, kept):]] = False
            if kept > 0:
                return
            surplus -= len(tied) * run.size


def _bracket(sample: Sequence[Run], share: float) -> Tuple[np.float32, np.float32]:
    """Two values between which lies, all but certainly, the one up to which ``share`` of the weight lies."""
    whole = _weight(sample)
    # eight standard deviations of a random sample's rank
    margin = 4.0 * np.sqrt(whole * max(run.size for run in sample))
    ranks = int(share * whole - margin), int(share * whole + margin) + 1
    low = weighted_threshold(sample, ranks[0]) if ranks[0] >= 1 else np.float32(-np.inf)
    high = weighted_threshold(sample, ranks[1]) if ranks[1] <= whole else np.float32(np.inf)
    return low, high


def _between(values: np.ndarray, low: np.float32, high: np.float32) -> Tuple[int, np.ndarray]:
    """How many values there are up to ``low``, and those above it that are below ``high``."""
    counted, found = 0, []
    flags = np.empty((2, min(_PIECE, len(values))), dtype=bool)
    for start in range(0, len(values), _PIECE):
        piece = values[start:start + _PIECE]
        not_above, inside = flags[:, :len(piece)]
        np.less_equal(piece, low, out=not_above)
        counted += int(np.count_nonzero(not_above))
        np.less(piece, high, out=inside)
        np.greater(inside, not_above, out=inside)
        found.append(piece[inside])
    return counted, np.concatenate(found) if found else values[:0]


def _weight_where(compare: np.ufunc, runs: Sequence[Run], value: np.float32) -> int:
    return sum(run.size * int(np.count_nonzero(compare(run.values, value))) for run in runs)


def _by_partition(runs: Sequence[Run], weight: int) -> np.float32:
    every = np.concatenate([np.repeat(run.values, run.size) for run in runs])
    found: np.float32 = np.partition(every, weight - 1)[weight - 1]
    return found


def _weight(runs: Sequence[Run]) -> int:
    return sum(run.size * len(run.values) for run in runs)
