"""Quantized Winograd convolution in a graph: the application of ``slimtrain.core.winograd``, its oracle."""
from __future__ import annotations

from typing import NamedTuple, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import WinogradForm
from slimtrain.core.winograd import LARGEST_TRANSFORMED, kronecker, largest_ratio, transforms
from slimtrain.hooks.fake_quant import Levels, fake_quantize

_LEVELS = Levels(-float(LARGEST_TRANSFORMED), float(LARGEST_TRANSFORMED))
# of a float32: sign, exponent and the six highest bits of the fraction; the seventh, which makes the ratio odd
_KEPT_BITS, _ODD_BIT = -(1 << 17), 1 << 16


class Scales(NamedTuple):
    """The scales of a layer before and after the transforms."""

    input: tf.Tensor      #: scalar, before
    weight: tf.Tensor     #: [O], before
    learned: tf.Tensor    #: [positions of the largest form, 1 + O], after: of the input, then of the weights


def winograd_conv(x: tf.Tensor, kernel: tf.Tensor, scales: Scales, form: WinogradForm, padding: bytes) -> tf.Tensor:
    """The convolution of stride 1 with transformed input and kernel fake-quantized; differentiable.

    Args:
        x: [N, H, W, I] on its grid.
        kernel: [k, k, I, O] on its grid.
        scales: of the layer.
        form: of the kernel's size.
        padding: as the operation has it, ``b"SAME"`` or ``b"VALID"``.
    """
    inputs, outputs = (int(size) for size in kernel.shape.as_list()[2:])
    before = tf.stop_gradient(tf.concat([tf.reshape(scales.input, [1]), scales.weight], 0))
    learned = scales.learned[:form.positions]
    used = learned + tf.stop_gradient(ratios(learned, before, form) * before - learned)
    tiles, (batch, rows, columns), size = _tiles(x, form, padding)
    matrices = transforms(form)
    values = tf.reshape(_product(matrices.input, tiles), [form.positions, -1, inputs])
    values = fake_quantize(values, used[:, 0], _LEVELS, axis=0)
    flat = _product(matrices.weight, tf.reshape(kernel, [form.kernel ** 2, inputs * outputs]))
    turned = tf.transpose(tf.reshape(flat, [form.positions, inputs, outputs]), [0, 2, 1])
    turned = tf.reshape(turned, [form.positions * outputs, inputs])
    kernels = fake_quantize(turned, tf.reshape(used[:, 1:], [-1]), _LEVELS, axis=0)
    products = tf.matmul(values, tf.reshape(kernels, [form.positions, outputs, inputs]), transpose_b=True)
    squares = _product(matrices.output, tf.reshape(products, [form.positions, -1]))
    squares = tf.reshape(squares, [form.unit, form.unit, batch, rows, columns, outputs])
    whole = tf.reshape(tf.transpose(squares, [2, 3, 0, 4, 1, 5]),
                       [batch, rows * form.unit, columns * form.unit, outputs])
    return whole[:, :size[0], :size[1]]


def ratios(learned: tf.Tensor, before: tf.Tensor, form: WinogradForm) -> tf.Tensor:
    """The scales after over those before the transforms, [positions, 1 + O], as a device uses them."""
    matrices = transforms(form)
    bounds = np.full(before.shape.as_list(), largest_ratio(matrices.weight), np.float32)
    bounds[0] = largest_ratio(matrices.input)
    return stable_ratio(tf.minimum(learned / before, bounds))


def stable_ratio(ratio: tf.Tensor) -> tf.Tensor:
    """:func:`slimtrain.core.winograd.stable_ratio` in a graph; float32, without a gradient."""
    bits = tf.bitcast(tf.stop_gradient(ratio), tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(bits, _KEPT_BITS), _ODD_BIT), tf.float32)


def _tiles(x: tf.Tensor, form: WinogradForm,
           padding: bytes) -> Tuple[tf.Tensor, Tuple[tf.Tensor, ...], Tuple[tf.Tensor, ...]]:
    """Flattened tiles [positions, N * rows * columns * I], (N, rows, columns), and the size of the output."""
    total = form.kernel - 1 if padding == b"SAME" else 0
    shape, channels = tf.shape(x), int(x.shape.as_list()[3])
    size = tuple(shape[axis] + total - form.kernel + 1 for axis in (1, 2))
    counts = tuple((length + form.unit - 1) // form.unit for length in size)
    pads = [[total // 2, total - total // 2 + count * form.unit - length] for length, count in zip(size, counts)]
    padded = tf.pad(x, [[0, 0], pads[0], pads[1], [0, 0]])
    cut = tf.extract_image_patches(padded, [1, form.tile, form.tile, 1], [1, form.unit, form.unit, 1], [1, 1, 1, 1],
                                   "VALID")
    parts = tf.reshape(cut, [shape[0] * counts[0] * counts[1], form.positions, channels])
    return tf.reshape(tf.transpose(parts, [1, 0, 2]), [form.positions, -1]), (shape[0],) + counts, size


def _product(matrix: np.ndarray, values: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.constant(kronecker(matrix), tf.float32), values)
