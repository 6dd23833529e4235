"""Strides, padding and dilation of an ONNX convolution, as two axes."""
from __future__ import annotations

from typing import NamedTuple, Sequence, Tuple

import numpy as np
import onnx

from slimtrain.core import same_padding
from slimtrain.proto.onnx_graph import attribute

Pair = Tuple[int, int]


class Geometry(NamedTuple):
    """How a convolution moves over its input: (height, width) each; of one axis the height is 1."""

    kernel: Pair
    strides: Pair
    padding: Tuple[Pair, Pair]   #: ((top, bottom), (left, right))
    dilation: Pair


def conv_geometry(node: onnx.NodeProto, weight: Sequence[int], image: Sequence[int]) -> Geometry:
    """The geometry of a Conv node.

    Args:
        node: the node.
        weight: shape of its weight, [O, I / groups, ...].
        image: sizes of its input behind batch and channels.
    """
    kernel, axes = [int(size) for size in weight[2:]], len(weight) - 2
    strides = [int(step) for step in attribute(node, "strides", [1] * axes)]
    dilation = [int(step) for step in attribute(node, "dilations", [1] * axes)]
    pads = [int(pad) for pad in attribute(node, "pads", [0] * 2 * axes)]
    padding = list(zip(pads[:axes], pads[axes:]))
    mode = attribute(node, "auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        padding = [same_padding(*numbers) for numbers in zip(image, kernel, strides, dilation)]
        padding = [(after, before) for before, after in padding] if mode == b"SAME_LOWER" else padding
    missing = 2 - axes
    return Geometry(_pair([1] * missing + kernel), _pair([1] * missing + strides),
                    tuple([(0, 0)] * missing + padding), _pair([1] * missing + dilation))  # type: ignore[arg-type]


def as_image(values: np.ndarray) -> np.ndarray:
    """[N, C, H, W] of [N, C, L] or [N, C, H, W]."""
    return values if values.ndim == 4 else values[:, :, None, :]


def _pair(values: Sequence[int]) -> Pair:
    return int(values[0]), int(values[1])
