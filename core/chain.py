"""Convolutions in a row without anything between them: the one convolution they equal, and what they cost.

A chain is a tuple of kernels [out, in, *extents] in the order of execution (a linear layer has no extents).  Along
each axis at most one kernel is longer than 1; it takes the axis' stride, padding and dilation, or the first kernel
if there is none.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

Chain = Tuple[np.ndarray, ...]
Shape = Tuple[int, ...]


class Affine(NamedTuple):
    """A convolution: ``weight`` [O, I, *extents] and ``bias`` [O] or None."""

    weight: np.ndarray
    bias: Optional[np.ndarray] = None


def axis_owners(shapes: Sequence[Shape]) -> Tuple[int, ...]:
    """For each axis of the kernels the index of the kernel that takes its stride, padding and dilation."""
    axes = range(2, len(shapes[0]))
    return tuple(next((index for index, shape in enumerate(shapes) if shape[axis] > 1), 0) for axis in axes)


def compose_chain(chain: Sequence[np.ndarray]) -> np.ndarray:
    """The kernel [out of the last, in of the first, *extents] that equals the chain; float64.

    Raises:
        ValueError: channels do not fit, or two kernels are longer than 1 along one axis.
    """
    return merge_chain([Affine(weight) for weight in chain]).weight


def merge_chain(chain: Sequence[Affine]) -> Affine:
    """The convolution that equals a chain of convolutions; float64, a bias if there is one in the chain.

    With biases this is exact only if all padding comes before the first of them: a bias that is padded with zeros
    afterwards is missing at the border, which no single convolution can imitate.

    Raises:
        ValueError: there is nothing to merge; as ``compose_chain``.
    """
    if not chain:
        raise ValueError("a chain needs at least one convolution, got none")
    weight, bias = chain[0]
    first = Affine(np.asarray(weight, dtype=np.float64), None if bias is None else np.asarray(bias, dtype=np.float64))
    return reduce(_after, chain[1:], first)


def identity_tap(extents: Shape, stride: Shape, padding: Sequence[Tuple[int, int]],
                 dilation: Shape) -> Optional[Shape]:
    """The position of a kernel that sees the output's own place; None where output and input differ in shape.

    Args:
        extents, stride, dilation: one number per axis.
        padding: (before, after) per axis.
    """
    tap = []
    for extent, step, (before, after), spacing in zip(extents, stride, padding, dilation):
        if step != 1 or before + after != spacing * (extent - 1) or before % spacing:
            return None
        tap.append(before // spacing)
    return tuple(tap)


def chain_multiply_adds(shapes: Sequence[Shape], stride: Shape) -> int:
    """Multiply-adds of a chain per output position; what comes before a stride runs at the finer resolution."""
    owners = axis_owners(shapes)
    total = 0
    for index, shape in enumerate(shapes):
        finer = [step for step, owner in zip(stride, owners) if index < owner]
        total += int(np.prod(shape + tuple(finer), dtype=np.int64))
    return total


def chain_parameters(shapes: Sequence[Shape]) -> int:
    """Number of weights of a chain."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def chain_error(weight: np.ndarray, chain: Sequence[np.ndarray]) -> float:
    """|weight - compose_chain(chain)| / |weight| in Frobenius norms; 0.0 for a weight of zeros that is met."""
    reference = np.asarray(weight, dtype=np.float64)
    miss, norm = np.linalg.norm(reference - compose_chain(chain)), np.linalg.norm(reference)
    return float(miss / norm) if norm else float(miss)


def _after(done: Affine, following: Affine) -> Affine:
    """``done`` and then ``following``, as one matrix product for the weights and one for the bias."""
    weight = np.asarray(following.weight, dtype=np.float64)
    _check_fit(done.weight.shape, weight.shape)
    product = np.tensordot(weight, done.weight, axes=(1, 0))
    axes = weight.ndim - 2
    later, inputs, earlier = range(1, 1 + axes), 1 + axes, range(2 + axes, 2 + 2 * axes)
    pairs = [axis for both in zip(later, earlier) for axis in both]
    extents = [max(both) for both in zip(weight.shape[2:], done.weight.shape[2:])]
    merged = product.transpose([0, inputs] + pairs).reshape([weight.shape[0], done.weight.shape[1]] + extents)
    if done.bias is None and following.bias is None:
        return Affine(merged)
    bias = np.zeros(weight.shape[0]) if following.bias is None else np.asarray(following.bias, dtype=np.float64)
    if done.bias is not None:
        bias = bias + weight.reshape(weight.shape[:2] + (-1,)).sum(axis=2).dot(done.bias)
    return Affine(merged, bias)


def _check_fit(before: Shape, after: Shape) -> None:
    clash = any(first > 1 and second > 1 for first, second in zip(before[2:], after[2:]))
    if len(before) != len(after) or before[0] != after[1] or clash:
        raise ValueError(f"kernels of shapes {before} and {after} (out, in, extents) cannot be merged: the first's "
                         "outputs must be the second's inputs, and along each axis one of them must be 1 long")
