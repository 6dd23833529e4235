"""Bits of single layers: how much each layer minds each width, and the choice that meets a budget.

A layer's cost is what the loss gains when that layer alone is quantized. Costs of layers are added up, as if layers did
not know of each other (as in HAWQ, Dong et al., arXiv 1905.03696, and ZeroQ, Cai et al., arXiv 2001.00281), so the
choice is a multiple-choice knapsack: one width for each layer, the sum of bytes or of costs bounded, the other least.
"""
from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from slimtrain.core.coverage import LayerState

#: the width of a layer that stays float
FLOAT_BITS = 32
_MOST_STATES = 10000


class BitResult(NamedTuple):
    """One layer at one width, all others float."""

    layer: str
    bits: int
    bytes: int        #: of its weights, as stored
    sqnr_db: float    #: of the network's outputs against those of the float network
    loss: float       #: of the network, minus that of the float network


class BitPlan(NamedTuple):
    """A width for each layer."""

    bits: Dict[str, int]   #: by layer; ``FLOAT_BITS`` for one that stays float
    bytes: int             #: of all weights
    loss: float            #: what the loss is expected to gain

    @property
    def layer_bits(self) -> Dict[str, int]:
        """The widths of the quantized layers, for ``WeightQuantizer(layer_bits=...)``."""
        return {layer: bits for layer, bits in self.bits.items() if bits != FLOAT_BITS}

    @property
    def skip_quant_layers(self) -> List[str]:
        """The layers that stay float, for any quantizer's argument of that name."""
        return [layer for layer, bits in self.bits.items() if bits == FLOAT_BITS]


class BitSensitivity(NamedTuple):
    """What was measured of a network."""

    state: LayerState                 #: how layers were quantized: ``WEIGHT_ONLY`` or ``INT8``
    float_loss: float                 #: of the float network
    results: Tuple[BitResult, ...]    #: layer by layer in the order of the network, wide before narrow

    @property
    def layers(self) -> List[str]:
        """Names in the order of the network."""
        return list(dict.fromkeys(result.layer for result in self.results))

    @property
    def widths(self) -> List[int]:
        """The widths that were measured, wide before narrow."""
        return sorted({result.bits for result in self.results}, reverse=True)

    def choose(self, *, largest_bytes: Optional[float] = None, largest_loss: Optional[float] = None) -> BitPlan:
        """The best widths within one budget.

        Args:
            largest_bytes: the least expected loss of all plans whose weights take no more bytes.
            largest_loss: the fewest bytes of all plans that are expected to add no more to the float loss.

        Raises:
            ValueError: not exactly one budget; no plan meets it.
        """
        options: Dict[str, List[BitResult]] = {layer: [] for layer in self.layers}
        for result in self.results:
            options[result.layer].append(result)
        return choose_bits(options, largest_bytes=largest_bytes, largest_loss=largest_loss)


def stored_size(weights: int, channels: int, bits: int) -> int:
    """Bytes of a layer's weights: packed levels and a float32 scale for each output channel; floats at 32 bits."""
    return 4 * weights if bits == FLOAT_BITS else -(-weights * bits // 8) + 4 * channels


def choose_bits(options: Mapping[str, Sequence[BitResult]], *, largest_bytes: Optional[float] = None,
                largest_loss: Optional[float] = None) -> BitPlan:
    """One option for each layer.

    Only states on the front of bytes and loss are carried from layer to layer, so the result is exact; beyond ten
    thousand of them, evenly chosen ones are dropped, which may cost a ten-thousandth of the budget for each layer.

    Args:
        options: by layer. A loss below zero, which is noise of the measurement, counts as zero.
        largest_bytes, largest_loss: the budget, one of the two; see :meth:`BitSensitivity.choose`.

    Raises:
        ValueError: not exactly one budget, a layer without options, or no plan meets the budget.
    """
    if (largest_bytes is None) == (largest_loss is None):
        raise ValueError("give one budget, largest_bytes or largest_loss, got {!r} and {!r}".format(
            largest_bytes, largest_loss))
    front = _Front(np.zeros(1), np.zeros(1))
    steps: List[Tuple[np.ndarray, np.ndarray]] = []
    for layer, results in options.items():
        if not results:
            raise ValueError("layer {!r} has no width to choose from".format(layer))
        front, before, taken = _extended(front, results)
        steps.append((before, taken))
    index = _fitting(front, largest_bytes, largest_loss)
    plan = BitPlan({}, int(front.bytes[index]), float(front.loss[index]))
    for (layer, results), (before, taken) in zip(reversed(list(options.items())), reversed(steps)):
        plan.bits[layer] = results[taken[index]].bits
        index = int(before[index])
    return plan._replace(bits={layer: plan.bits[layer] for layer in options})


class _Front(NamedTuple):
    """Sums over the layers so far that no other sum beats in both, by rising bytes and falling loss."""

    bytes: np.ndarray
    loss: np.ndarray


def _extended(front: _Front, results: Sequence[BitResult]) -> Tuple[_Front, np.ndarray, np.ndarray]:
    """The front with one more layer; for each of its states the one before, and which result was added."""
    size = np.add.outer(front.bytes, [float(result.bytes) for result in results]).ravel()
    loss = np.add.outer(front.loss, [max(result.loss, 0.0) for result in results]).ravel()
    order = np.lexsort((loss, size))
    lowest = np.minimum.accumulate(loss[order])
    kept = order[np.append(True, lowest[1:] < lowest[:-1])]
    if len(kept) > _MOST_STATES:
        kept = kept[np.linspace(0, len(kept) - 1, _MOST_STATES).astype(int)]
    return _Front(size[kept], loss[kept]), kept // len(results), kept % len(results)


def _fitting(front: _Front, largest_bytes: Optional[float], largest_loss: Optional[float]) -> int:
    """The best state within the budget."""
    if largest_bytes is not None:
        fitting, best, budget = front.bytes <= largest_bytes, front.bytes[0], "{:.6g} bytes".format(largest_bytes)
    else:
        assert largest_loss is not None
        fitting, best, budget = front.loss <= largest_loss, front.loss[-1], "a loss of {:.6g}".format(largest_loss)
    indices = np.flatnonzero(fitting)
    if not len(indices):
        raise ValueError("no choice of bits meets the budget of {}: the best is {:.6g}".format(budget, best))
    return int(indices[-1] if largest_bytes is not None else indices[0])
