"""Weights as the file will hold them, with a gradient: the TensorFlow side of ``slimtrain.core.weight_only``."""
from __future__ import annotations

from typing import Callable, List, Optional, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import SMALLEST_STORED_SCALE, StoredWeight, WeightMode, largest_level, stored_weight, usable_block
from slimtrain.hooks.fake_quant import round_half_away
from slimtrain.hooks.layers import Layer, LayerKind


def store_weight(kernel: tf.Tensor, layer: Layer, bits: int, mode: WeightMode, block_size: int = 0) -> tf.Tensor:
    """The kernel after storage, float32 of its shape; the grid is computed in float32 as MNN does.

    The gradient passes straight through the rounding. The scale, which the largest weights determine, has the gradient
    of learned step size quantization (arXiv 1902.08153, equation 3), which reaches those weights: at 2 bits that is
    what lets a layer choose its range.

    Args:
        kernel: as the operation reads it.
        layer: says where its output and input channels are.
        bits: 2 to 8.
        mode: symmetric or asymmetric.
        block_size: input channels that share a scale, 0 for all of them.
    """
    order = core_order(layer)
    shape = [kernel.shape.as_list()[axis] for axis in order]
    block = usable_block(shape, block_size)
    rows = tf.reshape(tf.transpose(kernel, order), [shape[0], shape[1] // block if block else 1, -1])
    top = float(largest_level(bits, mode))
    if mode is WeightMode.SYMMETRIC:
        minimum = tf.zeros_like(rows[..., :1])
        scale = tf.reduce_max(tf.abs(rows), axis=-1, keepdims=True) / top
    else:
        minimum = tf.reduce_min(rows, axis=-1, keepdims=True)
        scale = (tf.reduce_max(rows, axis=-1, keepdims=True) - minimum) / top
    stored = tf.reshape(_store(rows, scale, minimum), shape)
    return tf.transpose(stored, [int(axis) for axis in np.argsort(order)])


def stored_kernel(kernel: np.ndarray, layer: Layer, bits: int, mode: WeightMode,
                  block_size: int = 0) -> Tuple[StoredWeight, np.ndarray]:
    """What a file holds of a kernel, as [O, I, ...], and the kernel that it is restored to."""
    order = core_order(layer)
    stored = stored_weight(np.transpose(kernel, order), bits, mode, block_size)
    return stored, np.ascontiguousarray(np.transpose(stored.values, np.argsort(order)))


def core_shape(layer: Layer) -> List[int]:
    """The shape of a kernel as [O, I, ...]."""
    sizes = layer.kernel.shape.as_list()
    return [int(sizes[axis]) for axis in core_order(layer)]


def core_order(layer: Layer) -> List[int]:
    """The axes of a kernel in the order [O, I, height, width]; a depthwise one has one input."""
    if layer.kind is LayerKind.MATMUL:
        return [layer.channel_axis, 1 - layer.channel_axis]
    return [2, 3, 0, 1] if layer.kind is LayerKind.DEPTHWISE else [3, 2, 0, 1]


@tf.custom_gradient
def _store(rows: tf.Tensor, scale: tf.Tensor, minimum: tf.Tensor) -> Tuple[tf.Tensor, Callable]:
    """``round((x - minimum) / scale) * scale + minimum``; blocks of a scale that MNN cannot divide by are constant."""
    alive = tf.cast(scale > float(SMALLEST_STORED_SCALE), rows.dtype)
    position = (rows - minimum) / (scale * alive + (1.0 - alive)) * alive
    level = round_half_away(position)

    def gradient(dy: tf.Tensor) -> List[Optional[tf.Tensor]]:
        # both the weight and the minimum move the result, but the minimum moves the position back by as much
        return [dy, tf.reduce_sum(dy * (level - position), axis=-1, keepdims=True), None]

    return level * scale + minimum, gradient
