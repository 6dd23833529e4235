"""Overflow-aware quantization: how far a layer's levels must narrow so that its sums fit 16 bits.

A sum of products of input and weight levels shrinks with the square of the clamp that both share.
"""
from __future__ import annotations

import math
from typing import NamedTuple

#: the largest sum that fits 16 bits; magnitudes are counted so that -32768 counts as this
LARGEST_SUM = 32767


class Clamp(NamedTuple):
    """The largest level of a layer's weights and inputs, and whether its sums are to fit 16 bits."""

    level: int
    fits_int16: bool


def narrowed_clamp(clamp: Clamp, peak: float, smallest: int, largest: int) -> Clamp:
    """The clamp for the next step.

    Args:
        clamp: the present one.
        peak: largest magnitude of an integer sum seen with it.
        smallest: below this a layer is better off with sums of 32 bits.
        largest: the clamp of such a layer, and of one that was never narrowed.

    Returns:
        ``clamp`` itself when the sums fit or need not; otherwise a lower one, estimated from the peak, or
        ``Clamp(largest, False)`` when that would lie below ``smallest``.
    """
    if not clamp.fits_int16 or peak < LARGEST_SUM + 0.5:
        return clamp
    level = min(clamp.level - 1, int(clamp.level * math.sqrt(LARGEST_SUM / peak)))
    return Clamp(level, True) if level >= max(smallest, 1) else Clamp(largest, False)
