"""The quantization grid: which integers exist, and how a real number gets to one of them.

Everything that is trained, exported or simulated goes through the three functions at the end,
so there is a single definition of rounding: half away from zero, as the MNN runtime rounds.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, Union

import numpy as np

ArrayLike = Union[np.ndarray, float, int]


class Grid(NamedTuple):
    """Integer levels ``lower..upper`` (both included) of a ``bits``-bit number."""

    bits: int
    lower: int
    upper: int

    @property
    def signed(self) -> bool:
        """Whether the grid has negative levels."""
        return self.lower < 0


def weight_grid(bits: int) -> Grid:
    """Levels of weights: [-127, 127] for 8 bits, else the two's complement range.

    Folding a batch norm with a negative factor flips the sign of a weight, and -(-128) does not fit
    8 bits; narrower grids are stored in 8 bits, so both ends survive there.

    Raises:
        ValueError: ``bits`` is not 2..8.
    """
    return activation_grid(bits, signed=True)


def activation_grid(bits: int, signed: bool = True) -> Grid:
    """Levels of activations: as weights if signed; [0, 2**bits - 1] for unsigned ranges below 8 bits.

    Eight-bit tensors are int8 with zero point 0 in MNN, so there an unsigned range is [-127, 127] too.

    Raises:
        ValueError: ``bits`` is not 2..8.
    """
    if bits not in range(2, 9):
        raise ValueError("bits must be an integer from 2 to 8, got {!r}".format(bits))
    if bits == 8:
        return Grid(8, -127, 127)
    if signed:
        return Grid(int(bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(int(bits), 0, 2**bits - 1)


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, ties away from zero, in the dtype of ``x``: sign(x) * floor(|x| + 0.5)."""
    return np.sign(x) * np.floor(np.abs(x) + np.asarray(x).dtype.type(0.5))


def quantize(x: np.ndarray, scale: ArrayLike, grid: Grid, axis: Optional[int] = None,
             zero_point: ArrayLike = 0) -> np.ndarray:
    """Integer levels ``clip(round_half_away(x / scale) + zero_point, lower, upper)``.

    Computed in the dtype of ``x`` (float32 or float64; others as float64). Infinities saturate.

    Args:
        x: any shape.
        scale: positive; a scalar, or 1-D with one entry per index of ``axis``.
        grid: the integer levels.
        axis: the channel axis of ``x``; None for one scale.
        zero_point: integer level of the real number 0; a scalar or as ``scale``.

    Returns:
        int32, the shape of ``x``.

    Raises:
        ValueError: NaN in ``x``; a scale that is not finite and positive; a length that does not fit.
    """
    return _levels(*_operands(x, scale, axis), zero=_zero_points(zero_point, np.shape(x), axis), grid=grid)


def dequantize(q: np.ndarray, scale: ArrayLike, axis: Optional[int] = None,
               zero_point: ArrayLike = 0, dtype: type = np.float32) -> np.ndarray:
    """Real numbers ``(q - zero_point) * scale`` of integer levels, in ``dtype``.

    Raises:
        ValueError: a scale that is not finite and positive; a length that does not fit.
    """
    levels = np.asarray(q)
    step = along_axis(checked_scale(scale, dtype), levels.shape, axis, "scale")
    return (levels - _zero_points(zero_point, levels.shape, axis)).astype(dtype) * step


def fake_quantize(x: np.ndarray, scale: ArrayLike, grid: Grid, axis: Optional[int] = None,
                  zero_point: ArrayLike = 0) -> np.ndarray:
    """``dequantize(quantize(x))`` in the dtype of ``x``: what training simulates. Arguments as ``quantize``."""
    values, step = _operands(x, scale, axis)
    zero = _zero_points(zero_point, values.shape, axis)
    levels = _levels(values, step, zero=zero, grid=grid)
    return (levels - zero).astype(values.dtype) * step


def checked_scale(scale: ArrayLike, dtype: type) -> np.ndarray:
    """``scale`` as an array of ``dtype``, finite and positive there.

    Raises:
        ValueError: naming the first offending index.
    """
    step = np.asarray(scale).astype(dtype)
    good = np.isfinite(step) & (step > 0)
    if not good.all():
        bad = int(np.flatnonzero(~good.ravel())[0])
        raise ValueError("scale must be finite and positive, got {!r} at index {} of {}".format(
            float(np.asarray(scale).ravel()[bad]), bad, step.size))
    return step


def along_axis(values: np.ndarray, shape: Tuple[int, ...], axis: Optional[int], name: str) -> np.ndarray:
    """``values`` reshaped to broadcast against ``shape``: a scalar, or 1-D along ``axis``.

    Raises:
        ValueError: an axis that does not exist, or a length that does not fit it.
    """
    if axis is None:
        if values.size != 1:
            raise ValueError("without an axis {} must have one entry, got shape {}".format(name, values.shape))
        return values.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise ValueError("axis {} does not exist in an array of shape {}".format(axis, shape))
    if values.ndim == 0:
        return values
    if values.shape != (shape[axis],):
        raise ValueError("{} must have shape ({},) for axis {} of {}, got {}".format(
            name, shape[axis], axis, shape, values.shape))
    target = [1] * len(shape)
    target[axis] = shape[axis]
    return values.reshape(target)


def _operands(x: np.ndarray, scale: ArrayLike, axis: Optional[int]) -> Tuple[np.ndarray, np.ndarray]:
    values = np.asarray(x)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    missing = int(np.isnan(values).sum())
    if missing:
        raise ValueError("cannot quantize NaN: {} of {} values".format(missing, values.size))
    return values, along_axis(checked_scale(scale, values.dtype.type), values.shape, axis, "scale")


def _zero_points(zero_point: ArrayLike, shape: Tuple[int, ...], axis: Optional[int]) -> np.ndarray:
    zero = np.asarray(zero_point)
    if not np.array_equal(zero, np.asarray(zero, dtype=np.int32)):
        raise ValueError("zero_point must hold integers, got {!r}".format(zero_point))
    return along_axis(zero.astype(np.int32), shape, axis, "zero_point")


def _levels(values: np.ndarray, step: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    with np.errstate(over="ignore"):
        nearest = round_half_away(values / step)
    return np.clip(nearest + zero, grid.lower, grid.upper).astype(np.int32)
