"""What quantization does to each layer of a network on an example: ranges, what they cut, and the error it makes."""
from __future__ import annotations

import math
from typing import Dict, Mapping, NamedTuple, Optional

import numpy as np

from slimtrain.core.compression_report import Histogram, histogram
from slimtrain.core.grid import Grid
from slimtrain.core.metrics import sqnr_db


class Range(NamedTuple):
    """The values that quantization keeps, from the lowest to the highest."""

    low: float
    high: float


#: of what stays float, or is given a grid as wide as it is
UNCLIPPED = Range(-math.inf, math.inf)


def range_of(scale: float, grid: Grid) -> Range:
    """What a grid spans, in the units of the values."""
    return Range(scale * grid.lower, scale * grid.upper)


class SeenLayer(NamedTuple):
    """A quantized layer on an example; what was not seen of it is None."""

    weight: np.ndarray                #: as it is trained, before quantization
    input: Optional[np.ndarray]       #: in the float network
    output: Optional[np.ndarray]      #: in the float network
    simulated: Optional[np.ndarray]   #: the same output in the simulation
    weight_range: Range = UNCLIPPED   #: that of the channel with the largest scale
    input_range: Range = UNCLIPPED


class LayerStatistics(NamedTuple):
    """Numbers by layer name."""

    weights: Dict[str, Histogram]
    inputs: Dict[str, Histogram]     #: of each layer's input in the float network
    sqnr_db: Dict[str, float]        #: each layer's output in the simulation against the float network


def quantization_statistics(layers: Mapping[str, SeenLayer]) -> LayerStatistics:
    """Histograms with the points at which quantization clips, and what it costs each output in dB."""
    statistics = LayerStatistics({}, {}, {})
    for name, seen in layers.items():
        statistics.weights[name] = histogram(seen.weight, *seen.weight_range)
        if seen.input is not None:
            statistics.inputs[name] = histogram(seen.input, *seen.input_range)
        if seen.output is not None and seen.simulated is not None and seen.output.shape == seen.simulated.shape:
            statistics.sqnr_db[name] = sqnr_db(seen.output, seen.simulated)
    return statistics
