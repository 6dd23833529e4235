"""Weights that are rounded, and biases that are corrected, by what the layers of a graph read."""
from __future__ import annotations

import logging
from typing import Dict, NamedTuple, Optional

import numpy as np

from slimtrain.core import (
    FIELDS_PER_BATCH,
    LONGEST_FIELD,
    Grid,
    InputMoments,
    add_moments,
    receptive_fields,
    round_weight,
)
from slimtrain.hooks.geometry import convolution_geometry
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.weight_fake_quant import core_order, core_shape

logger = logging.getLogger(__name__)


class ChosenWeight(NamedTuple):
    """What a layer is deployed with."""

    kernel: np.ndarray            #: as its operation reads it; on its grid if it was rounded by data
    scales: np.ndarray            #: [O]
    bias: Optional[np.ndarray]    #: [O] in the place of the layer's own; None to leave that


def add_layer_moments(moments: Dict[str, InputMoments], layer: Layer, values: np.ndarray) -> None:
    """Add what a layer reads in one batch to its moments, which are by layer name.

    Args:
        moments: changed; a layer that reads too many values at once keeps empty ones.
        layer: a quantizable one.
        values: its input, [N, H, W, I] or [N, I].
    """
    shape = core_shape(layer)
    length = int(np.prod(shape[1:]))
    if length > LONGEST_FIELD:
        if layer.name not in moments:
            logger.warning("layer %r reads %d values at once, more than %d: its rounding and bias are left alone",
                           layer.name, length, LONGEST_FIELD)
            moments[layer.name] = InputMoments()
        return
    image = np.reshape(values, (-1, 1, 1, shape[1])) if layer.kind is LayerKind.MATMUL else values
    kernel = (1, 1) if layer.kind is LayerKind.MATMUL else (shape[2], shape[3])
    fields = receptive_fields(np.moveaxis(image, 3, 1), kernel, *convolution_geometry(layer, kernel, image.shape[1:3]),
                              shape[0] if layer.kind is LayerKind.DEPTHWISE else 1, FIELDS_PER_BATCH)
    moments[layer.name] = add_moments(moments.get(layer.name, InputMoments()), fields)


def rounded_by_data(layer: Layer, weight: ChosenWeight, bias: Optional[np.ndarray], grid: Grid, moments: InputMoments,
                    *, adaptive: bool, correct_bias: bool) -> ChosenWeight:
    """The weight on its grid; see :func:`slimtrain.core.round_weight`.

    Args:
        layer: the layer.
        weight: its float kernel and the scales.
        bias: the layer's own, [O] in any shape; None if it has none.
        grid: the integer levels.
        moments: of what it reads.
        adaptive: round by what the layer computes.
        correct_bias: give its outputs their mean back.
    """
    order = core_order(layer)
    rows = np.transpose(weight.kernel, order)
    rounded = round_weight(rows, weight.scales, grid, moments, adaptive=adaptive, correct_bias=correct_bias)
    on_grid = rounded.levels.astype(np.float32) * weight.scales.reshape((-1,) + (1,) * (rows.ndim - 1))
    kernel = np.ascontiguousarray(np.transpose(on_grid, np.argsort(order)))
    if rounded.correction is None:
        return ChosenWeight(kernel, weight.scales, None)
    corrected = rounded.correction + (0.0 if bias is None else bias.reshape(-1))
    return ChosenWeight(kernel, weight.scales, corrected.astype(np.float32))
