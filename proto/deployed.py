"""A quantized layer as a training framework, or calibration, hands it over for the rewriting of an ONNX file."""
from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from slimtrain.core import Grid, PlannedCall, WinogradScales
from slimtrain.proto.layers import QuantMethod


class DeployedLayer(NamedTuple):
    """One use of a quantized layer, as the converter shall see it."""

    name: str
    trained_weight: np.ndarray   #: float [O, I / groups, ...] as the model holds it, to recognise it in a file
    levels: np.ndarray           #: int32, the same shape, after folding
    weight_scales: np.ndarray    #: float32 [O], positive, after folding
    bias: Optional[np.ndarray]   #: float32 [O], after folding; of a depthwise layer in whole accumulator units
    float_bias: np.ndarray       #: float32 [O], after folding
    factor: np.ndarray           #: float64 [O], by which the folded batch norm multiplies; ones without one
    folds_batch_norm: bool
    activation: str              #: "relu", "relu6" or ""
    groups: int
    call: PlannedCall
    input_scale: float
    output_scale: float
    input_grid: Grid
    output_grid: Grid
    weight_grid: Grid
    method: QuantMethod = QuantMethod.QAT
    winograd: Optional[WinogradScales] = None  #: of a layer that is computed by Winograd's transforms

    @property
    def weight(self) -> np.ndarray:
        """Float32 weights on the grid, [O, I / groups, ...]."""
        return self.levels.astype(np.float32) * self.weight_scales.reshape((-1,) + (1,) * (self.levels.ndim - 1))
