"""The quantization grid: which integers exist, and how a real number gets to one of them.

Everything that is trained, exported or simulated goes through ``quantize``, ``dequantize`` and
``fake_quantize``, so there is a single definition of rounding: half away from zero, as MNN rounds.
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
    """Levels of weights: [-127, 127] for 8 bits, else [-2**(bits - 1), 2**(bits - 1) - 1].

    Folding a batch norm with a negative factor flips the sign of a weight, and -(-128) does not fit
    8 bits; narrower grids are stored in 8 bits too, where both ends survive.

    Raises:
        ValueError: ``bits`` is not 2..8.
    """
    return activation_grid(bits, signed=True)


def activation_grid(bits: int, signed: bool = True) -> Grid:
    """Levels of activations: as weights, or unsigned [0, 2**bits - 1] below 8 bits.

    Eight-bit tensors are int8 with zero point 0 in MNN, so an unsigned range has the same levels there.

    Raises:
        ValueError: ``bits`` is not 2..8.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    width = int(bits)
    if width == 8:
        return Grid(8, -127, 127)
    if signed:
        return Grid(width, -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    return Grid(width, 0, 2**width - 1)


def stored_zero_point(grid: Grid) -> int:
    """The int8 that stores level 0 of an activation: 0 where all levels fit int8, else the lowest level is -128.

    Levels here are counted from the real number 0, so that 0..255 is a grid with zero point -128.
    """
    return 0 if grid.lower >= -128 and grid.upper <= 127 else -128 - grid.lower


def capped_grid(grid: Grid, scale: float, cap: float = 6.0) -> Grid:
    """``grid`` without the levels above the one of ``cap``: how the 6 of a ReLU6 reaches MNN.

    In int8 MNN treats ReLU6 as ReLU; min(x, cap) before rounding and this upper level after it are the same.

    Raises:
        ValueError: a scale that is not finite and positive.
    """
    return grid._replace(upper=int(quantize(np.array(cap, dtype=np.float32), scale, grid)))


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, ties away from zero: sign(x) * floor(|x| + 0.5) in the dtype of ``x``.

    The sum is rounded in that dtype too: the float32 below 0.5 becomes 1, in MNN as here.
    """
    values = np.asarray(x)
    return np.sign(values) * np.floor(np.abs(values) + values.dtype.type(0.5))


def quantize(x: ArrayLike, scale: ArrayLike, grid: Grid, axis: Optional[int] = None,
             zero_point: ArrayLike = 0) -> np.ndarray:
    """Integer levels ``clip(round_half_away(x / scale) + zero_point, lower, upper)``.

    Computed in the dtype of ``x``, float32 or float64 (any other as float64). Infinities saturate.

    Args:
        x: any shape.
        scale: positive; a scalar, or 1-D with one entry per index of ``axis``.
        grid: the integer levels.
        axis: the channel axis of ``x``; None for one scale.
        zero_point: the level of the real number 0; a scalar, or as ``scale``.

    Returns:
        int32, the shape of ``x``.

    Raises:
        ValueError: NaN in ``x``; a scale that is not finite and positive; a length that does not fit.
    """
    values, step = checked_operands(x, scale, axis)
    return _levels(values, step, _zero_points(zero_point, values.shape, axis), grid)


def dequantize(q: np.ndarray, scale: ArrayLike, axis: Optional[int] = None,
               zero_point: ArrayLike = 0, dtype: type = np.float32) -> np.ndarray:
    """Real numbers ``(q - zero_point) * scale`` of integer levels, computed in ``dtype``.

    Raises:
        ValueError: a scale that is not finite and positive; a length that does not fit.
    """
    levels = np.asarray(q)
    step = along_axis(checked_scale(scale, dtype), levels.shape, axis, "scale")
    return (levels - _zero_points(zero_point, levels.shape, axis)).astype(dtype) * step


def fake_quantize(x: ArrayLike, scale: ArrayLike, grid: Grid, axis: Optional[int] = None,
                  zero_point: ArrayLike = 0) -> np.ndarray:
    """``dequantize(quantize(x))`` in the dtype of ``x``: what training simulates.

    Arguments and errors are those of ``quantize``.
    """
    values, step = checked_operands(x, scale, axis)
    zero = _zero_points(zero_point, values.shape, axis)
    return (_levels(values, step, zero, grid) - zero).astype(values.dtype) * step


def checked_scale(scale: ArrayLike, dtype: type) -> np.ndarray:
    """``scale`` as an array of ``dtype``, finite and positive there.

    Raises:
        ValueError: naming the first offending index.
    """
    given = np.asarray(scale, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        step: np.ndarray = given.astype(dtype)
        bad = np.flatnonzero(~(np.isfinite(step) & (step > 0)))
    if bad.size:
        raise ValueError(f"scale must be finite and positive in {np.dtype(dtype)}, "
                         f"got {given.ravel()[bad[0]]} at index {bad[0]} of {step.size}")
    return step


def along_axis(values: np.ndarray, shape: Tuple[int, ...], axis: Optional[int], name: str) -> np.ndarray:
    """``values`` reshaped to broadcast against ``shape``: a scalar, or 1-D along ``axis``.

    Raises:
        ValueError: an axis that does not exist, or a length that does not fit it.
    """
    if axis is None:
        if values.size != 1:
            raise ValueError(f"without an axis {name} must have one entry, got shape {values.shape}")
        return values.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in an array of shape {shape}")
    if values.ndim == 0:
        return values
    if values.shape != (shape[axis],):
        raise ValueError(f"{name} must have shape ({shape[axis]},) for axis {axis} of {shape}, "
                         f"got {values.shape}")
    target = [1] * len(shape)
    target[axis] = shape[axis]
    return values.reshape(target)


def checked_operands(x: ArrayLike, scale: ArrayLike, axis: Optional[int]) -> Tuple[np.ndarray, np.ndarray]:
    """``x`` in its working dtype, and ``scale`` in the same one, reshaped to broadcast against it.

    Raises:
        ValueError: as ``quantize``.
    """
    values = np.asarray(x)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    missing = int(np.isnan(values).sum())
    if missing:
        raise ValueError(f"cannot quantize NaN: {missing} of {values.size} values")
    return values, along_axis(checked_scale(scale, values.dtype.type), values.shape, axis, "scale")


def _zero_points(zero_point: ArrayLike, shape: Tuple[int, ...], axis: Optional[int]) -> np.ndarray:
    zero = np.asarray(zero_point)
    if not np.array_equal(zero, np.round(zero)):
        raise ValueError(f"zero_point must hold integers, got {zero_point!r}")
    return along_axis(zero.astype(np.int32), shape, axis, "zero_point")


def _levels(values: np.ndarray, step: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    # A tiny scale may send a quotient to infinity, which the clip brings back.
    with np.errstate(over="ignore"):
        nearest = round_half_away(values / step)
    return np.clip(nearest + zero, grid.lower, grid.upper).astype(np.int32)
