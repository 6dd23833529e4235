"""Quantized Winograd convolution on torch tensors: the application of ``slimtrain.core.winograd``, its oracle."""
from __future__ import annotations

import functools
from typing import List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtrain.callbacks.deployment import IntegerLayer
from slimtrain.callbacks.fake_quant import Range, fake_quantize
from slimtrain.callbacks.layer_scales import Bits, LayerScales, positive
from slimtrain.core import Grid, WinogradForm
from slimtrain.core.winograd import LARGEST_TRANSFORMED, kronecker, largest_ratio, transforms
from slimtrain.core.winograd_choice import forms_of_kernel

_EXACT = 1 << 24  # integers up to here are exact in float32


class WinogradLayerScales(LayerScales):
    """Scales of a layer that may be computed by Winograd's transforms: also one per position of a tile, learned.

    They exist before it is known which form, if any, the layer takes, because an optimizer must know them: there are as
    many as the largest form needs, and a smaller one uses the first of them. What is learned is in units of the scales
    before the transform: positions differ by a factor of a hundred, and no learning rate would suit all of them.
    """

    positions: nn.Parameter  #: float32 [most positions, 1 + O]: of the transformed input, then of the weights
    units: Tensor            #: float32, the same shape: ``positions * units`` are the scales

    def __init__(self, layer: nn.Module, bits: Bits, keep_zeros: bool, forms: Tuple[WinogradForm, ...]) -> None:
        super().__init__(layer, bits, keep_zeros)
        self.forms = forms
        self.form: Optional[WinogradForm] = None
        shape = max(form.positions for form in forms), 1 + len(self.weight)
        self.positions = nn.Parameter(torch.ones(shape, device=self.weight.device))
        self.register_buffer("units", torch.ones(shape, device=self.weight.device), persistent=False)

    def start(self, scales: Tensor, input_scale: Tensor) -> None:
        """Start from transformed scales [positions, 1 + O]."""
        before = _before(input_scale, self.weight_scale())
        with torch.no_grad():
            self.positions[:len(scales)] = before
            self.units[:len(scales)] = scales / before

    def transformed_scales(self, form: WinogradForm, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """Differentiable scales of the transformed input, then of the weights: [positions, 1 + O]."""
        learned = self._learned(form)
        used = self.ratios(form, input_scale, weight_scale) * _before(input_scale, weight_scale)
        return learned + (used - learned).detach()

    def ratios(self, form: WinogradForm, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """The scales over those before the transform, as a device uses them: float32 [positions, 1 + O]."""
        before, matrices = _before(input_scale, weight_scale), transforms(form)
        bounds = torch.full_like(before, largest_ratio(matrices.weight))
        bounds[0] = largest_ratio(matrices.input)
        return stable_ratio(torch.minimum(self._learned(form).detach() / before, bounds))

    def _learned(self, form: WinogradForm) -> Tensor:
        return positive(self.positions[:form.positions]) * self.units[:form.positions]


def _before(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The scales before the transforms, [1 + O], without gradient."""
    return torch.cat([input_scale.detach().reshape(1), weight_scale.detach()])


class Geometry(NamedTuple):
    """Where a convolution of stride 1 looks: padding before and after each axis."""

    rows: Tuple[int, int]
    columns: Tuple[int, int]


def possible_forms(layer: nn.Module) -> Tuple[WinogradForm, ...]:
    """The forms that can compute a layer, the one with the fewest products first; () when none can."""
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return ()
    if layer.stride != (1, 1) or layer.dilation != (1, 1):
        return ()
    return forms_of_kernel(layer.kernel_size)


def geometry(padding: Union[str, int, Tuple[int, ...]], kernel: int) -> Geometry:
    """The padding that ``torch.conv2d`` was given."""
    if padding == "same":
        both = ((kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2)
        return Geometry(both, both)
    if padding == "valid":
        return Geometry((0, 0), (0, 0))
    sizes: List[int] = [padding] if isinstance(padding, int) else list(padding)  # type: ignore[arg-type]
    return Geometry((sizes[0], sizes[0]), (sizes[-1], sizes[-1]))


def winograd_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], scales: WinogradLayerScales, form: WinogradForm,
                  input_scale: Tensor, where: Geometry) -> Tensor:
    """The convolution with transformed input and weights fake-quantized; differentiable.

    Args:
        x: [N, I, H, W] on the grid of ``input_scale``.
        weight: [O, I, k, k] on its grid.
        bias: [O] or None.
        scales: of the layer.
        form: one of ``scales.forms``.
        input_scale: scalar.
        where: the padding.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        kernel, size = weight.to(wide.dtype), _output_size(x, form, where)
        steps = scales.transformed_scales(form, input_scale, scales.weight_scale())
        levels = _transformed_range(wide.device)
        values = fake_quantize(transform_input(wide, form, where), steps[:, 0].contiguous(), levels)
        flat = transform_weight(kernel, form)
        kernels = fake_quantize(flat.reshape(-1, flat.shape[-1]), steps[:, 1:].reshape(-1), levels).reshape(flat.shape)
        result = transform_output(torch.bmm(kernels, values), form, len(x), size)
        return (result if bias is None else result + bias.to(result.dtype)[:, None, None]).to(x.dtype)


def winograd_on_device(integer: IntegerLayer, x: Tensor, ratios: Tensor, form: WinogradForm, where: Geometry,
                       output_grid: Grid) -> Tensor:
    """The layer, with whatever is fused into it, as MNN computes it: float32 on the grid of the output scale.

    Args:
        integer: the layer's folded integers.
        x: float32 [N, I, H, W] on the grid of ``integer.input_scale``.
        ratios: see :meth:`WinogradLayerScales.ratios`.
        form, where: see :func:`winograd_conv`.
        output_grid: levels of the output, including what its activation cuts off.
    """
    levels = torch.round(x / integer.input_scale)
    values = _levels(transform_input(levels, form, where), ratios[:, :1, None])
    kernels = _levels(transform_weight(integer.levels.double(), form), ratios[:, 1:, None].double())
    largest = kernels.shape[-1] * LARGEST_TRANSFORMED ** 2
    dtype = torch.float32 if largest < _EXACT else torch.float64
    sums = torch.bmm(kernels.to(dtype), values.to(dtype)).double()
    step = ratios[:, :1].double() * ratios[:, 1:].double() * (integer.weight_scales * integer.input_scale.double())
    real = transform_output(sums * step[:, :, None], form, len(x), _output_size(x, form, where))
    result = ((real + integer.bias.double()[:, None, None]) / integer.output_scale.double()).float()
    rounded = torch.sign(result) * torch.floor(result.abs() + 0.5)
    return rounded.clamp(output_grid.lower, output_grid.upper) * integer.output_scale


def stable_ratio(ratio: Tensor) -> Tensor:
    """:func:`slimtrain.core.winograd.stable_ratio` on tensors."""
    fraction, exponent = torch.frexp(ratio)
    return torch.ldexp((2 * torch.floor(fraction * 128) + 1) / 256, exponent)


def transform_input(x: Tensor, form: WinogradForm, where: Geometry) -> Tensor:
    """Transformed tiles of zero-padded images: [positions, I, N * tiles] from [N, I, H, W]."""
    size = _output_size(x, form, where)
    extra = [-length % form.unit for length in size]
    (top, bottom), (left, right) = where
    padded = F.pad(x, (left, right + extra[1], top, bottom + extra[0]))
    cut = padded.unfold(2, form.tile, form.unit).unfold(3, form.tile, form.unit)
    tiles = cut.permute(4, 5, 1, 0, 2, 3).reshape(form.positions, -1)
    return (_matrices(form, x.dtype, x.device).input @ tiles).reshape(form.positions, x.shape[1], -1)


def transform_weight(weight: Tensor, form: WinogradForm) -> Tensor:
    """Transformed kernels: [positions, O, I] from [O, I, k, k]."""
    flat = weight.flatten(2).permute(2, 0, 1).reshape(form.kernel ** 2, -1)
    return (_matrices(form, weight.dtype, weight.device).weight @ flat).reshape(form.positions, *weight.shape[:2])


def transform_output(products: Tensor, form: WinogradForm, batch: int, size: Tuple[int, int]) -> Tensor:
    """Images put together from transformed products: [N, O, *size] from [positions, O, N * tiles]."""
    counts = [-(-length // form.unit) for length in size]
    flat = _matrices(form, products.dtype, products.device).output @ products.reshape(form.positions, -1)
    square = flat.reshape(form.unit, form.unit, products.shape[1], batch, *counts).permute(3, 2, 4, 0, 5, 1)
    whole = square.reshape(batch, products.shape[1], counts[0] * form.unit, counts[1] * form.unit)
    return whole[:, :, :size[0], :size[1]].contiguous()


class _Matrices(NamedTuple):
    """What transforms a flattened square."""

    input: Tensor
    weight: Tensor
    output: Tensor


@functools.lru_cache(maxsize=64)
def _matrices(form: WinogradForm, dtype: torch.dtype, device: torch.device) -> _Matrices:
    def tensor(matrix: np.ndarray) -> Tensor:
        return torch.from_numpy(kronecker(matrix)).to(device, dtype)

    with torch.inference_mode(False):  # cached for training, whoever asks first
        return _Matrices(*(tensor(matrix) for matrix in transforms(form)))


@functools.lru_cache(maxsize=8)
def _transformed_range(device: torch.device) -> Range:
    with torch.inference_mode(False):
        return Range.of(-LARGEST_TRANSFORMED, LARGEST_TRANSFORMED, 0.0, device=device)


def _levels(values: Tensor, ratios: Tensor) -> Tensor:
    quotient = values / ratios
    rounded = torch.sign(quotient) * torch.floor(quotient.abs() + 0.5)
    return rounded.clamp(-LARGEST_TRANSFORMED, LARGEST_TRANSFORMED)


def _output_size(x: Tensor, form: WinogradForm, where: Geometry) -> Tuple[int, int]:
    rows, columns = (length + sum(pads) - form.kernel + 1 for length, pads in zip(x.shape[2:], where))
    return rows, columns
