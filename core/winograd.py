"""Quantized Winograd convolution: fewer products per output, each of two transformed 8-bit numbers.

``F(m, k)`` computes m x m outputs of a k x k convolution of stride 1 from a tile of a x a inputs, a = m + k - 1, with
a**2 products per pair of channels instead of (m k)**2. Tile and kernel are transformed (``B^T d B``, ``G g G^T``),
multiplied position by position, and transformed back (``A^T (.) A``). In int8 the transformed tile and kernel are
quantized again, which costs accuracy that training can win back: "Searching for Winograd-aware quantized networks",
Fernandez-Marques et al., arXiv 2002.10711.

The transforms are those of Toom and Cook in MNN's form: points 0, 1, -1, 2, -2 and infinity, all divisions in G.
MNN transforms in float32 what is integer here, so a value next to a tie could fall on either side. Scales are therefore
an odd multiple of a power of two of the scale before the transform (:func:`stable_ratio`): then no transformed integer
comes near a tie, and what MNN rounds is what is rounded here.
"""
from __future__ import annotations

from typing import NamedTuple, Tuple

import numpy as np

from slimtrain.core.grid import round_half_away
from slimtrain.core.simulator import Activation, IntegerConv

#: transformed inputs and weights lie in -127..127
LARGEST_TRANSFORMED = 127
#: inputs along an axis of the tiles that MNN has int8 kernels for, the larger first
WINOGRAD_TILES = (6, 4)

_POINTS = (0, 1, -1, 2, -2)
_MANTISSA = 256


class WinogradForm(NamedTuple):
    """``F(unit, kernel)``: the outputs of a tile and the kernel, along each of the two axes."""

    unit: int
    kernel: int

    @property
    def tile(self) -> int:
        """Inputs along an axis of a tile."""
        return self.unit + self.kernel - 1

    @property
    def positions(self) -> int:
        """Products per tile and pair of channels."""
        return self.tile ** 2

    def __str__(self) -> str:
        return f"F({self.unit},{self.kernel})"


class Transforms(NamedTuple):
    """Float64 matrices of one axis; the entries of ``input`` and ``output`` are integers."""

    input: np.ndarray   #: B^T, [tile, tile]
    weight: np.ndarray  #: G, [tile, kernel]
    output: np.ndarray  #: A^T, [unit, tile]


class WinogradScales(NamedTuple):
    """How a layer's transformed tensors are quantized.

    Ratios are what :func:`stable_ratio` gives: scale after the transform over scale before it.
    """

    form: WinogradForm
    input_ratios: np.ndarray   #: float [positions]
    weight_ratios: np.ndarray  #: float [positions, O]


def transforms(form: WinogradForm) -> Transforms:
    """The matrices of ``form``: ``y = output @ ((weight @ g) * (input @ d))`` correlates d with g.

    Raises:
        ValueError: a unit or kernel below 2, or a tile other than 4 or 6, the ones MNN has int8 kernels for.
    """
    if form.unit < 2 or form.kernel < 2 or form.tile not in WINOGRAD_TILES:
        raise ValueError(f"a Winograd convolution needs a tile of 4 or 6 and at least 2 outputs and taps, got {form}")
    points = np.array(_POINTS[:form.tile - 1], dtype=np.float64)
    others = [np.delete(points, index) for index in range(len(points))]
    divisors = np.array([np.prod(point - rest) for point, rest in zip(points, others)])
    # coefficients of the product of (x - other points), lowest power first; the last row is that of infinity
    rows = [np.append(np.poly(rest)[::-1], 0.0) for rest in others] + [np.poly(points)[::-1]]
    weight = np.vstack([np.vander(points, form.kernel, increasing=True) / divisors[:, None], np.eye(form.kernel)[-1:]])
    output = np.vstack([np.vander(points, form.unit, increasing=True), np.eye(form.unit)[-1:]]).T
    return Transforms(np.round(np.stack(rows)), weight, output)


def kronecker(matrix: np.ndarray) -> np.ndarray:
    """The matrix that applies ``matrix`` to both axes of a flattened square: ``M X M^T`` as one product."""
    return np.kron(matrix, matrix)


def stable_ratio(ratio: np.ndarray) -> np.ndarray:
    """The nearest ratio p / 2**e with p odd, 129 to 255: at most 0.8 % off.

    A transformed integer T is quantized to round(T / ratio). At a tie 2 T 2**e = (2 n + 1) p, which is even on the left
    and odd on the right: no tie exists, and none is nearer than 1 / 510. Weights are integers over 4 or 576, where the
    same holds for e >= 2 or 6 (:func:`largest_ratio`), with 1 / 4590.
    """
    fraction, exponent = np.frexp(np.asarray(ratio, dtype=np.float64))
    odd = 2 * np.floor(fraction * (_MANTISSA // 2)) + 1
    return np.asarray(np.ldexp(odd / _MANTISSA, exponent))


def largest_ratio(matrix: np.ndarray) -> float:
    """A bound above which :func:`stable_ratio` no longer keeps ties away, for values transformed by ``matrix``.

    Args:
        matrix: the weight or input matrix of :func:`transforms`.
    """
    exponent = 0
    while not _is_whole_but_for_thirds(matrix * 2.0 ** exponent):
        exponent += 1
    return float((_MANTISSA - 1) / 4.0 ** exponent)


def largest_gain(matrix: np.ndarray) -> np.ndarray:
    """How many times larger a transformed value can be than the values before it, float64 [positions]."""
    return np.outer(np.abs(matrix).sum(axis=1), np.abs(matrix).sum(axis=1)).ravel()


def tiles(x: np.ndarray, form: WinogradForm, padding: Tuple[Tuple[int, int], Tuple[int, int]]) -> np.ndarray:
    """Overlapping tiles of zero-padded images: [positions, I, N, rows, columns] from [N, I, H, W].

    Raises:
        ValueError: the kernel does not fit the padded image.
    """
    sizes = [x.shape[2 + axis] + sum(padding[axis]) - form.kernel + 1 for axis in (0, 1)]
    if min(sizes) < 1:
        raise ValueError(f"a kernel of {form.kernel} does not fit the padded image of shape {x.shape}")
    counts = [-(-size // form.unit) for size in sizes]
    extra = [count * form.unit - size for count, size in zip(counts, sizes)]
    padded = np.pad(x, ((0, 0), (0, 0)) + tuple((padding[axis][0], padding[axis][1] + extra[axis]) for axis in (0, 1)),
                    mode="constant")
    cut = [[padded[:, :, row:row + counts[0] * form.unit:form.unit, column:column + counts[1] * form.unit:form.unit]
            for column in range(form.tile)] for row in range(form.tile)]
    stacked = np.array(cut).reshape((form.positions,) + cut[0][0].shape)
    return np.asarray(stacked.transpose(0, 2, 1, 3, 4))


def transform_weight(weight: np.ndarray, form: WinogradForm) -> np.ndarray:
    """``G g G^T`` of every kernel: float64 [positions, O, I] from [O, I, k, k]."""
    flat = np.asarray(weight, dtype=np.float64).reshape(weight.shape[:2] + (-1,))
    return np.moveaxis(flat @ kronecker(transforms(form).weight).T, -1, 0)


def transform_input(x: np.ndarray, form: WinogradForm,
                    padding: Tuple[Tuple[int, int], Tuple[int, int]]) -> np.ndarray:
    """``B^T d B`` of every tile: float64 [positions, I, N, rows, columns] from [N, I, H, W]."""
    return np.tensordot(kronecker(transforms(form).input), tiles(np.asarray(x, np.float64), form, padding), axes=1)


def multiply(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums over input channels at every position: [positions, O, N, rows, columns]."""
    flat = values.reshape(values.shape[:2] + (-1,))
    return np.asarray(np.matmul(weight, flat).reshape(weight.shape[:2] + values.shape[2:]))


def transform_output(products: np.ndarray, form: WinogradForm, size: Tuple[int, int]) -> np.ndarray:
    """``A^T (.) A`` of every tile, put side by side and cut to ``size``: float64 [N, O, H', W']."""
    outputs = np.tensordot(kronecker(transforms(form).output), products, axes=1)
    unit, (channels, batch, rows, columns) = form.unit, products.shape[1:]
    square = outputs.reshape(unit, unit, channels, batch, rows, columns).transpose(3, 2, 4, 0, 5, 1)
    return np.asarray(square.reshape(batch, channels, rows * unit, columns * unit)[:, :, :size[0], :size[1]])


def winograd_convolution(x: np.ndarray, weight: np.ndarray, form: WinogradForm,
                         padding: Tuple[Tuple[int, int], Tuple[int, int]] = ((0, 0), (0, 0))) -> np.ndarray:
    """The convolution that ``form`` computes when nothing is quantized: float64 [N, O, H', W'].

    Raises:
        ValueError: the kernel is not that of ``form`` or does not fit the padded image.
    """
    if weight.shape[2:] != (form.kernel, form.kernel):
        raise ValueError(f"{form} needs a weight of [O, I, {form.kernel}, {form.kernel}], got {weight.shape}")
    products = multiply(transform_weight(weight, form), transform_input(x, form, padding))
    return transform_output(products, form, _output_size(x, form, padding))


def simulate_winograd(q_x: np.ndarray, conv: IntegerConv, scales: WinogradScales) -> np.ndarray:
    """Output levels of a convolution that MNN computes by ``scales.form``: int32 [N, O, H', W'] from [N, I, H, W].

    Exact up to the products; MNN adds them in float32, which moves an output that lies next to a tie by one level.

    Raises:
        ValueError: a stride, dilation, grouping or kernel that the form cannot compute.
    """
    form = scales.form
    if conv.groups != 1 or conv.strides != (1, 1) or conv.dilation != (1, 1):
        raise ValueError(f"{form} computes dense convolutions of stride and dilation 1 only")
    weight = _levels(transform_weight(conv.weight, form), scales.weight_ratios[:, :, None])
    inputs = _levels(transform_input(q_x, form, conv.padding), scales.input_ratios[:, None, None, None, None])
    step = scales.input_ratios[:, None] * scales.weight_ratios * (conv.weight_scales * float(conv.input_scale))
    products = multiply(weight, inputs) * step[:, :, None, None, None]
    real = transform_output(products, form, _output_size(q_x, form, conv.padding))
    bias = np.zeros(len(conv.weight)) if conv.bias is None else np.asarray(conv.bias, dtype=np.float64)
    lower = conv.output_grid.lower if conv.activation is Activation.NONE else max(conv.output_grid.lower, 0)
    levels = round_half_away(((real + bias[:, None, None]) / float(conv.output_scale)).astype(np.float32))
    return np.clip(levels, lower, conv.output_grid.upper).astype(np.int32)


def _levels(values: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    return np.clip(round_half_away(values / ratios), -LARGEST_TRANSFORMED, LARGEST_TRANSFORMED)


def _output_size(x: np.ndarray, form: WinogradForm,
                 padding: Tuple[Tuple[int, int], Tuple[int, int]]) -> Tuple[int, int]:
    height, width = (x.shape[2 + axis] + sum(padding[axis]) - form.kernel + 1 for axis in (0, 1))
    return height, width


def _is_whole_but_for_thirds(matrix: np.ndarray) -> bool:
    scaled = matrix * 3
    return bool(np.allclose(scaled, np.round(scaled), rtol=0, atol=1e-9))
