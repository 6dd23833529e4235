"""What calibration sees of one tensor, in memory that does not grow with the number of batches.

A range is exact: every value counts. The distribution is kept as a histogram whose bins have edges at multiples of a
power of two. It widens by merging pairs of bins, so that it is at any time the histogram of everything counted.
"""
from __future__ import annotations

import math
from typing import NamedTuple, Sequence, Tuple

import numpy as np

#: bins on each side of zero
BINS = 2048
#: share of the past in the moving averages of the range
EMA_DECAY = 0.9
#: values of one tensor that enter the histogram, evenly strided; all of them enter the range
LARGEST_SAMPLE = 2**14


_NOTHING = np.zeros(2 * BINS, np.int64)
_NOTHING.setflags(write=False)


class Observation(NamedTuple):
    """Everything seen of one tensor; start with ``Observation()`` and go on with :func:`observe`."""

    batches: int = 0
    lowest: float = 0.0           #: smallest value, at most 0
    highest: float = 0.0          #: largest value, at least 0
    average_lowest: float = 0.0   #: exponential moving average of the smallest value of a batch
    average_highest: float = 0.0  #: the same of the largest
    zeros: int = 0                #: values that are exactly 0
    limit: float = 0.0            #: the histogram spans [-limit, limit]; 0, or a power of two
    counts: np.ndarray = _NOTHING  #: int64 [2 * BINS] of the values that are not 0

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin, float64 [2 * BINS]."""
        return np.asarray((np.arange(-BINS, BINS) + 0.5) * (self.limit / BINS))

    def distribution(self) -> Tuple[np.ndarray, np.ndarray]:
        """The values that occurred (bin centers and zero) and how often each did, float64 and int64 [values]."""
        filled = np.flatnonzero(self.counts)
        values = np.concatenate([self.centers[filled], np.zeros(1)])
        return values, np.concatenate([self.counts[filled], np.array([self.zeros], np.int64)])


def observe(seen: Observation, values: np.ndarray) -> Observation:
    """What is known after one more batch; ``seen`` itself is left as it is.

    Args:
        seen: what was known before.
        values: the tensor of one batch, any shape, float.

    Raises:
        ValueError: ``values`` are empty or not finite.
    """
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        raise ValueError("cannot observe an empty tensor, shape %s" % (np.shape(values),))
    return observe_sample(seen, float(flat.min()), float(flat.max()), sample(flat))


def observe_sample(seen: Observation, lowest: float, highest: float, part: np.ndarray) -> Observation:
    """As :func:`observe`, for a framework that finds the range of a tensor and takes the sample itself.

    Args:
        seen: what was known before.
        lowest, highest: range of the whole tensor.
        part: the values that enter the histogram, 1-D.

    Raises:
        ValueError: the range is not finite.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("cannot observe values that are not finite: they range from %r to %r" % (lowest, highest))
    limit = max(seen.limit, _power_of_two(max(-lowest, highest)))
    zeros, counts = _count(np.asarray(part), limit)
    first = not seen.batches
    return Observation(
        seen.batches + 1, min(seen.lowest, lowest), max(seen.highest, highest),
        min(lowest, 0.0) if first else EMA_DECAY * seen.average_lowest + (1 - EMA_DECAY) * min(lowest, 0.0),
        max(highest, 0.0) if first else EMA_DECAY * seen.average_highest + (1 - EMA_DECAY) * max(highest, 0.0),
        seen.zeros + zeros, limit, counts + _widened(seen.counts, seen.limit, limit))


def observe_together(seen: Observation, values: Sequence[np.ndarray]) -> Observation:
    """As :func:`observe`, for the tensors of one batch that share a scale.

    Raises:
        ValueError: a tensor is empty or not finite.
    """
    flat = [np.asarray(value).reshape(-1) for value in values]
    if not all(value.size for value in flat):
        raise ValueError("cannot observe an empty tensor, shapes %s" % [np.shape(value) for value in values])
    return observe_sample(seen, min(float(value.min()) for value in flat), max(float(value.max()) for value in flat),
                          np.concatenate([sample(value) for value in flat]))


def sample(flat: np.ndarray) -> np.ndarray:
    """At most ``LARGEST_SAMPLE`` evenly strided values of a 1-D array, or of a tensor that slices like one."""
    return flat[::sample_stride(len(flat))]


def sample_stride(size: int) -> int:
    """The stride that leaves at most ``LARGEST_SAMPLE`` of ``size`` values and meets every index of every axis."""
    stride = -(-size // LARGEST_SAMPLE)
    while stride > 1 and math.gcd(stride, size) != 1:
        stride += 1
    return max(stride, 1)


def _power_of_two(value: float) -> float:
    """The smallest power of two above ``value``; 0 for 0."""
    return math.ldexp(1.0, max(math.frexp(value)[1], -100)) if value > 0 else 0.0


def _count(values: np.ndarray, limit: float) -> Tuple[int, np.ndarray]:
    """Number of zeros, and of the other values in each bin."""
    if not limit:
        return values.size, np.zeros(2 * BINS, np.int64)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    # scaling by a power of two is exact in the dtype of the values, so nothing crosses an edge
    bins = np.floor(values * values.dtype.type(BINS / limit)).astype(np.int64) + BINS
    counts = np.bincount(np.minimum(bins, 2 * BINS - 1), minlength=2 * BINS)
    zeros = int(values.size - np.count_nonzero(values))
    counts[BINS] -= zeros
    return zeros, counts.astype(np.int64)


def _widened(counts: np.ndarray, limit: float, wider: float) -> np.ndarray:
    """The histogram over [-wider, wider]: pairs of bins are merged, once for each doubling."""
    if not limit:
        return counts
    for _ in range(min(int(round(math.log2(wider / limit))), int(math.log2(BINS)) + 1)):
        merged = np.zeros_like(counts)
        merged[BINS // 2: BINS + BINS // 2] = counts.reshape(-1, 2).sum(axis=1)
        counts = merged
    return counts
