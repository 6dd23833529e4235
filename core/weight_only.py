"""Weight-only quantization: weights stored in few bits, computed in float, on the grid that MNN chooses.

MNN's converter takes no scales for it. It recomputes them from the weights that it finds, in float32, for each output
channel or for each block of input channels of one:

- symmetric: ``scale = max|w| / (2**(bits - 1) - 1)``, ``level = round(w / scale)``;
- asymmetric: ``scale = (max w - min w) / (2**bits - 1)``, ``level = round((w - min w) / scale)``, so that zero is in
  general on no level.

Weights that lie on this grid lie on it again when it is recomputed from them. So what training simulates with these
functions is what the file will hold.
"""
from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Sequence

import numpy as np

from slimtrain.core.grid import round_half_away

#: MNN stores a constant for a block whose scale is not above this
SMALLEST_STORED_SCALE = np.float32(1e-6)

_BLOCK_UNIT = 16


class WeightMode(Enum):
    """Where the levels of a stored weight lie."""

    SYMMETRIC = "symmetric"    #: around zero, which is one of them
    ASYMMETRIC = "asymmetric"  #: from the smallest weight to the largest


class StoredWeight(NamedTuple):
    """A weight as it is stored; the real weights are ``levels * scales + minimums``."""

    levels: np.ndarray    #: int32, the shape of the weight; symmetric -q..q, asymmetric 0..2**bits - 1
    scales: np.ndarray    #: float32 [O, blocks]
    minimums: np.ndarray  #: float32 [O, blocks]; zeros if symmetric

    @property
    def values(self) -> np.ndarray:
        """The real weights, float32, as a runtime restores them."""
        rows = self.levels.reshape(self.scales.shape + (-1,)).astype(np.float32)
        restored = rows * self.scales[..., None] + self.minimums[..., None]
        return np.asarray(restored.reshape(self.levels.shape), dtype=np.float32)


def stored_weight(weight: np.ndarray, bits: int, mode: WeightMode, block_size: int = 0) -> StoredWeight:
    """Put a weight on the grid that MNN stores it on.

    Args:
        weight: [O, I / groups, ...], finite; float32 arithmetic whatever its dtype.
        bits: 2 to 8.
        mode: symmetric or asymmetric.
        block_size: input channels that share a scale; 0 for all of them. See :func:`usable_block`.

    Raises:
        ValueError: bits outside 2..8, a block size that is no multiple of 16, a weight that is empty or not finite.
    """
    rows = _rows(weight, block_size)
    top = largest_level(bits, mode)
    if mode is WeightMode.SYMMETRIC:
        minimums = np.zeros(rows.shape[:2], np.float32)
        scales = np.abs(rows).max(axis=-1) / np.float32(top)
    else:
        minimums = rows.min(axis=-1)
        scales = (rows.max(axis=-1) - minimums) / np.float32(top)
    alive = scales > SMALLEST_STORED_SCALE
    steps = np.where(alive, scales, np.float32(1))
    levels = np.where(alive[..., None], round_half_away((rows - minimums[..., None]) / steps[..., None]), 0)
    lowest = -top if mode is WeightMode.SYMMETRIC else 0
    levels = np.clip(levels, lowest, top).astype(np.int32)
    return StoredWeight(levels.reshape(np.shape(weight)), scales, minimums)


def largest_level(bits: int, mode: WeightMode) -> int:
    """The largest level: 2**(bits - 1) - 1 if symmetric, else 2**bits - 1.

    Raises:
        ValueError: bits outside 2..8.
    """
    if bits not in range(2, 9):
        raise ValueError("bits must be an integer from 2 to 8, got %r" % (bits,))
    return int(2 ** (bits - 1) - 1 if mode is WeightMode.SYMMETRIC else 2 ** bits - 1)


def usable_block(shape: Sequence[int], block_size: int) -> int:
    """The block that MNN uses for a weight [O, I / groups, ...]: ``block_size``, or 0 where it does not divide.

    Raises:
        ValueError: a block size that is no multiple of 16.
    """
    if block_size < 0 or block_size % _BLOCK_UNIT:
        raise ValueError("block_size must be 0 or a multiple of %d, got %r" % (_BLOCK_UNIT, block_size))
    return 0 if not block_size or shape[1] % block_size else block_size


def _rows(weight: np.ndarray, block_size: int) -> np.ndarray:
    """Float32 [O, blocks, weights of a block]; input channels are the slowest axis within an output channel."""
    values = np.asarray(weight, dtype=np.float32)
    if values.ndim < 2 or not values.size:
        raise ValueError("a weight must be [O, I, ...] and not empty, got shape %s" % (values.shape,))
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ValueError("a weight must be finite, %d of %d values are not" % (broken, values.size))
    block = usable_block(values.shape, block_size)
    return values.reshape(len(values), values.shape[1] // block if block else 1, -1)
