"""The clipping threshold that loses the least information (entropy calibration, as TensorRT does it).

S. Migacz, "8-bit inference with TensorRT", GTC 2017: of all thresholds, take the one whose quantized distribution has
the smallest Kullback-Leibler divergence from the clipped one.
"""
from __future__ import annotations

import numpy as np

#: thresholds are tried at every so many bins
_STRIDE = 4


def entropy_threshold(counts: np.ndarray, levels: int) -> int:
    """How many bins of a histogram of magnitudes to keep; values beyond saturate.

    For each candidate ``n`` the reference is the first ``n`` bins with everything beyond added to the last of them,
    the quantized distribution spreads the count of each of ``levels`` equal groups of the first ``n`` bins evenly
    over those bins of the group that the reference has something in. A candidate for which that leaves a bin
    without any count is no candidate.

    Args:
        counts: [bins], from zero on; the zeros themselves are better left out.
        levels: positive integer levels.

    Returns:
        the number of bins, ``levels``..bins; of equals the smallest. All bins where fewer than ``levels`` are filled.

    Raises:
        ValueError: counts that are negative or not 1-D, or no levels.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or (values < 0).any() or levels < 1:
        raise ValueError("expected non-negative counts [bins] and at least one level, got shape %s and %d levels" % (
            values.shape, levels))
    filled = np.flatnonzero(values)
    used = int(filled[-1]) + 1 if filled.size else 0
    if used <= levels:
        return max(used, 1)
    candidates = list(range(levels, used, _STRIDE)) + [used]
    present = values > 0
    divergences = [_divergence(values, present, size, levels) for size in candidates]
    return candidates[int(np.argmin(divergences))]


def _divergence(counts: np.ndarray, filled: np.ndarray, size: int, levels: int) -> float:
    """KL(reference || quantized) in nats; infinite where the quantized distribution misses a bin."""
    kept, present = counts[:size], filled[:size].copy()
    beyond = counts[size:].sum()
    present[-1] |= beyond > 0
    edges = np.arange(levels + 1) * size // levels
    starts = edges[:-1]
    shares = np.add.reduceat(kept, starts) / np.maximum(np.add.reduceat(present, starts, dtype=np.float64), 1)
    quantized = np.repeat(shares, edges[1:] - starts)[present]
    if not quantized.all():
        return float("inf")
    reference = kept[present]
    reference[-1] += beyond  # where there is something, the last bin is present
    total = reference.sum()
    return float((reference * np.log(reference / quantized)).sum() / total + np.log(quantized.sum() / total))
