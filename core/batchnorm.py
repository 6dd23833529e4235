"""Batch normalization folded into the convolution before it, as MNN folds it before quantizing."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np


def fold_factor(gamma: Optional[np.ndarray], var: np.ndarray, eps: float) -> np.ndarray:
    """The factor gamma / sqrt(var + eps) per output channel, float64 [O]; ``gamma`` None means ones.

    Raises:
        ValueError: ``var + eps`` is not positive everywhere, or the lengths differ.
    """
    spread = np.asarray(var, dtype=np.float64) + float(eps)
    if spread.ndim != 1 or not (spread > 0).all():
        raise ValueError(f"var + eps must be 1-D and positive, got shape {spread.shape}, values {spread!r}")
    gain = np.ones_like(spread) if gamma is None else np.asarray(gamma, dtype=np.float64)
    if gain.shape != spread.shape:
        raise ValueError(f"gamma must have the shape of var {spread.shape}, got {gain.shape}")
    return gain / np.sqrt(spread)


def fold_batch_norm(weight: np.ndarray, bias: Optional[np.ndarray], gamma: Optional[np.ndarray],
                    beta: Optional[np.ndarray], mean: np.ndarray, var: np.ndarray,
                    eps: float) -> Tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the one convolution that equals convolution followed by batch norm.

    Args:
        weight: [O, ...], output channels first (grouped and depthwise convolutions and linear layers too).
        bias: [O], or None for zeros.
        gamma: [O], or None for ones.
        beta: [O], or None for zeros.
        mean: running mean [O].
        var: running variance [O].
        eps: added to the variance.

    Returns:
        (weight, bias), computed in float64 and returned in the dtype of ``weight``.

    Raises:
        ValueError: a length is not the number of output channels, or ``var + eps`` is not positive.
    """
    kernel = np.asarray(weight)
    channels = kernel.shape[0]
    factor = fold_factor(gamma, var, eps)
    if factor.shape != (channels,):
        raise ValueError(f"var must have one entry per output channel ({channels}), got {factor.shape}")
    offset = _per_channel(bias, channels, "bias") - _per_channel(mean, channels, "mean")
    folded = kernel * factor.reshape((channels,) + (1,) * (kernel.ndim - 1))
    shift = _per_channel(beta, channels, "beta") + offset * factor
    return folded.astype(kernel.dtype), shift.astype(kernel.dtype)


def _per_channel(values: Optional[np.ndarray], channels: int, name: str) -> np.ndarray:
    if values is None:
        return np.zeros(channels)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {array.shape}")
    return array
