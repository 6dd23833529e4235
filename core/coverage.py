"""What was really compressed: one value per layer, and the share of the weights they make up."""

from __future__ import annotations

from enum import Enum
from typing import List, NamedTuple, Tuple


class LayerState(Enum):
    """How a layer's weights are stored and computed."""

    INT8 = "int8"
    WEIGHT_ONLY = "weight only"
    FLOAT = "float"


class LayerCoverage(NamedTuple):
    """One layer that was asked to be quantized: ``parameters`` counts its weights, ``reason`` says why not."""

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
        """Share of the wanted weights in int8 layers; 1.0 when nothing was wanted."""
        return self.share(LayerState.INT8)

    @property
    def missing(self) -> Tuple[LayerCoverage, ...]:
        """The layers that are not int8."""
        return tuple(layer for layer in self.layers if layer.state is not LayerState.INT8)

    def share(self, state: LayerState) -> float:
        """Share of the wanted weights in layers of ``state``; for INT8 1.0, else 0.0, when nothing was wanted."""
        total = self.parameters
        if not total:
            return 1.0 if state is LayerState.INT8 and not self.missing else 0.0
        return sum(layer.parameters for layer in self.layers if layer.state is state) / total

    def rows(self) -> List[Tuple[str, str, int, float, str, str]]:
        """One plain tuple per layer: name, kind, weights, their share of all, state, reason."""
        total = self.parameters
        return [(layer.name, layer.kind, layer.parameters, layer.parameters / total if total else 0.0,
                 layer.state.value, layer.reason) for layer in self.layers]
