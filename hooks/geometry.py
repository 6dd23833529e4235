"""Strides, padding and dilation of a layer that is computed as a convolution."""
from __future__ import annotations

from typing import NamedTuple, Sequence, Tuple

from slimtrain.core import same_padding
from slimtrain.hooks.layers import Layer, LayerKind

Pair = Tuple[int, int]


class Geometry(NamedTuple):
    """How a kernel moves over its input: (height, width) each."""

    strides: Pair
    padding: Tuple[Pair, Pair]   #: ((top, bottom), (left, right))
    dilation: Pair


def convolution_geometry(layer: Layer, kernel: Sequence[int], size: Sequence[int]) -> Geometry:
    """The geometry of a layer on an image; TensorFlow's SAME padding depends on its size.

    Args:
        layer: a convolution, or a matrix product as the 1x1 convolution that it is deployed as.
        kernel: (height, width) of the kernel.
        size: (height, width) of the input.
    """
    none = (0, 0), (0, 0)
    if layer.kind is LayerKind.MATMUL:
        return Geometry((1, 1), none, (1, 1))
    strides, dilation = (tuple(layer.op.get_attr(name)[1:3]) for name in ("strides", "dilations"))
    if layer.op.get_attr("padding") == b"VALID":
        return Geometry(strides, none, dilation)
    above, beside = (same_padding(*axis) for axis in zip(size, kernel, strides, dilation))
    return Geometry(strides, (above, beside), dilation)
