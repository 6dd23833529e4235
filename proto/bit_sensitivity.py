"""Measuring how much a network minds each width of each layer, whatever runs it, and showing that as a table."""
from __future__ import annotations

import io
import logging
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from slimtrain.core import LayerState, sqnr_db
from slimtrain.core.bit_choice import FLOAT_BITS, BitResult, BitSensitivity, stored_size
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)


class NetworkRun(NamedTuple):
    """A network on all examples."""

    outputs: np.ndarray   #: float64, all values of all outputs
    loss: float           #: its mean over the samples


class WeightSize(NamedTuple):
    """How many weights a layer has, and how many output channels."""

    weights: int
    channels: int


def check_examples(examples: Sequence[object], bits: Sequence[int]) -> None:
    """Refuse to measure nothing.

    Raises:
        ValueError: no examples or widths.
    """
    if not examples or not bits:
        raise ValueError("the sensitivity needs examples and widths, got %d and %d" % (len(examples), len(bits)))


def measure_layers(layers: Mapping[str, WeightSize], whole: NetworkRun, run: Callable[[str, int], NetworkRun],
                   bits: Sequence[int], state: LayerState) -> BitSensitivity:
    """Quantize one layer at a time, all others float.

    Args:
        layers: by name, in the order of the network.
        whole: the float network.
        run: the network with one layer, by name, at one width.
        bits: the widths to try.
        state: how a layer is quantized; an int8 one is stored in 8 bits, whatever the width of its levels.
    """
    results: List[BitResult] = []
    for name, size in with_progress(layers.items(), "measuring layers"):
        results.append(BitResult(name, FLOAT_BITS, stored_size(*size, FLOAT_BITS), float("inf"), 0.0))
        for width in sorted(set(bits), reverse=True):
            found = run(name, width)
            stored = 8 if state is LayerState.INT8 else width
            results.append(BitResult(name, width, stored_size(*size, stored), sqnr_db(whole.outputs, found.outputs),
                                     found.loss - whole.loss))
            logger.info("%s at %d bits: %.1f dB, loss %+.3g", name, width, results[-1].sqnr_db, results[-1].loss)
    return BitSensitivity(state, whole.loss, tuple(results))


def sensitivity_table(sensitivity: BitSensitivity) -> str:
    """One line per layer: its bytes, and for each width the SQNR of the outputs and what the loss gains, as text."""
    table = Table(box=box.SIMPLE)
    widths = [width for width in sensitivity.widths if width != FLOAT_BITS]
    table.add_column("layer")
    table.add_column("float bytes", justify="right")
    for width in widths:
        table.add_column("%d bits" % width, justify="right")
    by_layer: Dict[str, Dict[int, BitResult]] = {layer: {} for layer in sensitivity.layers}
    for result in sensitivity.results:
        by_layer[result.layer][result.bits] = result
    for layer, results in by_layer.items():
        cells = ["%.1f dB %+.2g" % (results[width].sqnr_db, results[width].loss) for width in widths]
        table.add_row(layer, "{:,}".format(results[FLOAT_BITS].bytes), *cells)
    text = io.StringIO()
    Console(file=text, width=40 + 20 * (1 + len(widths))).print(table)
    return text.getvalue()
