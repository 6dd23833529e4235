"""How far two results are apart: in decibels, and in steps of the output grid."""

from __future__ import annotations

from typing import Tuple

import numpy as np

from slimtrain.core.grid import checked_scale


def sqnr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """Signal to quantization noise ratio 10 * log10(sum(reference**2) / sum((reference - actual)**2)) in dB.

    Sums are float64. ``inf`` when the arrays are equal, ``-inf`` when only the reference is all zero.

    Raises:
        ValueError: shapes differ, the arrays are empty, or a value is not finite.
    """
    wanted, got = _pair(reference, actual)
    signal, noise = float(np.sum(wanted**2)), float(np.sum((wanted - got) ** 2))
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal else float("-inf")


def max_steps(reference: np.ndarray, actual: np.ndarray, scale: float) -> float:
    """The largest |reference - actual| in units of ``scale``, the output step.

    Raises:
        ValueError: as ``sqnr_db``, or a scale that is not finite and positive.
    """
    wanted, got = _pair(reference, actual)
    return float(np.max(np.abs(wanted - got)) / checked_scale(scale, np.float64))


def _pair(reference: np.ndarray, actual: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    wanted, got = np.asarray(reference, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if wanted.shape != got.shape:
        raise ValueError(f"reference and actual must have one shape, got {wanted.shape} and {got.shape}")
    if wanted.size == 0:
        raise ValueError(f"nothing to compare: both arrays are empty, shape {wanted.shape}")
    for name, array in (("reference", wanted), ("actual", got)):
        broken = int((~np.isfinite(array)).sum())
        if broken:
            raise ValueError(f"{name} has {broken} values of {array.size} that are not finite")
    return wanted, got
