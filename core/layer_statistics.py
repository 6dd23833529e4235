"""What quantization does to each layer of a network on an example: ranges, what they cut, and the error it makes."""
from __future__ import annotations

from typing import Dict, Mapping, NamedTuple, Optional

import numpy as np

from slimtrain.core.compression_report import Histogram, histogram
from slimtrain.core.grid import Grid
from slimtrain.core.metrics import sqnr_db


class SeenLayer(NamedTuple):
    """A quantized layer on an example; what was not seen of it is None."""

    weight: np.ndarray                #: as it is trained, before quantization
    weight_scale: float               #: the largest of its channels
    weight_grid: Grid
    input: Optional[np.ndarray]       #: in the float network
    input_scale: float
    input_grid: Grid
    output: Optional[np.ndarray]      #: in the float network
    simulated: Optional[np.ndarray]   #: the same output in the simulation


class LayerStatistics(NamedTuple):
    """Numbers by layer name."""

    weights: Dict[str, Histogram]
    inputs: Dict[str, Histogram]     #: of each layer's input in the float network
    sqnr_db: Dict[str, float]        #: each layer's output in the simulation against the float network


def quantization_statistics(layers: Mapping[str, SeenLayer]) -> LayerStatistics:
    """Histograms with the points at which quantization clips, and what it costs each output in dB."""
    statistics = LayerStatistics({}, {}, {})
    for name, seen in layers.items():
        statistics.weights[name] = _clipped(seen.weight, seen.weight_scale, seen.weight_grid)
        if seen.input is not None:
            statistics.inputs[name] = _clipped(seen.input, seen.input_scale, seen.input_grid)
        if seen.output is not None and seen.simulated is not None and seen.output.shape == seen.simulated.shape:
            statistics.sqnr_db[name] = sqnr_db(seen.output, seen.simulated)
    return statistics


def _clipped(values: np.ndarray, scale: float, grid: Grid) -> Histogram:
    return histogram(values, scale * grid.lower, scale * grid.upper)
