"""Whether a layer bears Winograd's transforms in int8: a trial in each form that it could take, on its own tensors."""
from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from slimtrain.core.grid import Grid, fake_quantize
from slimtrain.core.metrics import sqnr_db
from slimtrain.core.scales import mse_scale
from slimtrain.core.winograd import (
    LARGEST_TRANSFORMED,
    WINOGRAD_TILES,
    WinogradForm,
    largest_ratio,
    multiply,
    stable_ratio,
    transform_input,
    transform_output,
    transform_weight,
    transforms,
    winograd_convolution,
)

Padding = Tuple[Tuple[int, int], Tuple[int, int]]

_GRID = Grid(8, -LARGEST_TRANSFORMED, LARGEST_TRANSFORMED)
_MOST_VALUES = 1 << 14  # of one position, for the search of its scale


class FormTrial(NamedTuple):
    """What a form does to a layer before any training."""

    scales: np.ndarray   #: float32 [positions, 1 + O], of the least squared error: of the input, then of the weights
    sqnr_db: float       #: of the layer's output against that of plain int8


class WinogradChoice(NamedTuple):
    """What was decided about one layer."""

    layer: str
    form: Optional[WinogradForm]          #: None for plain int8
    sqnr_db: Dict[WinogradForm, float]    #: of the layer's output against that of plain int8, by form that was tried
    reason: str                           #: why it is plain int8; "" when it is not


def forms_of_kernel(kernel: Sequence[int]) -> Tuple[WinogradForm, ...]:
    """The forms for a kernel (height, width), the one with the fewest products first; () when there are none."""
    if len(kernel) != 2 or kernel[0] != kernel[1] or kernel[0] < 2:
        return ()
    return tuple(WinogradForm(tile - kernel[0] + 1, kernel[0]) for tile in WINOGRAD_TILES if tile > kernel[0])


def try_form(x: np.ndarray, weight: np.ndarray, form: WinogradForm, input_scale: float, weight_scales: np.ndarray,
             padding: Padding) -> FormTrial:
    """Compute a layer in one form.

    Args:
        x: [N, I, H, W] on the grid of ``input_scale``.
        weight: [O, I, k, k] on the grid of ``weight_scales`` [O].
        form: of the kernel's size.
        input_scale, weight_scales: before the transforms.
        padding: ((top, bottom), (left, right)).
    """
    values, kernels = transform_input(x, form, padding), transform_weight(weight, form)
    flat = values.reshape(form.positions, -1)
    inputs = mse_scale(flat[:, ::max(1, flat.shape[1] // _MOST_VALUES)], _GRID, axis=0)
    weights = mse_scale(kernels.reshape(-1, kernels.shape[2]), _GRID, axis=0).reshape(form.positions, -1)
    matrices = transforms(form)
    used_inputs = _used(inputs, np.asarray(input_scale, np.float64), largest_ratio(matrices.input))
    used_weights = _used(weights, np.asarray(weight_scales, np.float64), largest_ratio(matrices.weight))
    quantized = fake_quantize(flat, used_inputs, _GRID, axis=0).reshape(values.shape)
    rows = fake_quantize(kernels.reshape(-1, kernels.shape[2]), used_weights.ravel(), _GRID, axis=0)
    plain = winograd_convolution(x, weight, form, padding)
    result = transform_output(multiply(rows.reshape(kernels.shape), quantized), form, plain.shape[2:])
    return FormTrial(np.concatenate([inputs[:, None], weights], axis=1).astype(np.float32), sqnr_db(plain, result))


def choose_form(layer: str, results: Dict[WinogradForm, float], smallest_sqnr_db: float,
                impossible: str = "") -> WinogradChoice:
    """Give a layer the first of its forms that is near enough to plain int8.

    Args:
        layer: its name.
        results: by form, in the order of preference, the SQNR against plain int8 in dB.
        smallest_sqnr_db: what is near enough.
        impossible: why no form can compute the layer, if so.
    """
    form = next((form for form, result in results.items() if result >= smallest_sqnr_db and not impossible), None)
    reason = impossible
    if form is None and not reason:
        reason = "its sensitivity: no form is within {:g} dB of plain int8".format(smallest_sqnr_db)
    return WinogradChoice(layer, form, dict(results), reason)


def check_sqnr(smallest_sqnr_db: float) -> None:
    """Raise ``ValueError`` for what is no number of decibels."""
    wrong_kind = isinstance(smallest_sqnr_db, bool) or not isinstance(smallest_sqnr_db, (int, float))
    if wrong_kind or smallest_sqnr_db != smallest_sqnr_db:
        raise ValueError("min_sqnr_db must be a number of decibels, got {!r}".format(smallest_sqnr_db))


def _used(scales: np.ndarray, before: np.ndarray, bound: float) -> np.ndarray:
    return np.asarray(stable_ratio(np.minimum(scales / before, bound)) * before)
