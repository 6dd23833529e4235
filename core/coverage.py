"""What was really compressed: one value per layer, and the share of the weights that it makes up."""

from __future__ import annotations

from enum import Enum
from typing import List, NamedTuple, Tuple


class LayerState(Enum):
    """How a layer's weights are stored and computed."""

    INT8 = "int8"
    WEIGHT_ONLY = "weight only"
    FLOAT = "float"


class LayerCoverage(NamedTuple):
    """A layer that was to be quantized; ``parameters`` counts its weights, ``reason`` says why it is not."""

    name: str
    kind: str
    parameters: int
    state: LayerState
    reason: str = ""


class Coverage(NamedTuple):
    """All wanted layers, in the order of the model."""

    layers: Tuple[LayerCoverage, ...]

    @property
    def parameters(self) -> int:
        """Number of weights of all wanted layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def fraction(self) -> float:
        """Share of the wanted weights that is in int8 layers; 1.0 when nothing was wanted."""
        return self.share(LayerState.INT8)

    @property
    def missing(self) -> Tuple[LayerCoverage, ...]:
        """The wanted layers that are not int8."""
        return tuple(layer for layer in self.layers if layer.state is not LayerState.INT8)

    def share(self, state: LayerState) -> float:
        """Share of the wanted weights in layers of ``state``; all of nothing counts as int8."""
        total = self.parameters
        if not total:
            return float(state is LayerState.INT8)
        return sum(layer.parameters for layer in self.layers if layer.state is state) / total

    def rows(self) -> List[Tuple[str, str, int, float, str, str]]:
        """One plain tuple per layer: name, kind, weights, their share of all, state, reason."""
        total = self.parameters or 1
        return [(layer.name, layer.kind, layer.parameters, layer.parameters / total,
                 layer.state.value, layer.reason) for layer in self.layers]
