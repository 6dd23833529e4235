"""The channels that are left, as a value that can be written down and applied to a fresh model."""
from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, NamedTuple

import numpy as np

from slimtrain.core.channels import ChannelClasses

_FORMAT = "slimtrain channels 1"


class LayerPlan(NamedTuple):
    """What is left of one layer's weight."""

    rows: List[int]      #: output channels that stay
    columns: List[int]   #: input channels (of one group) that stay
    out_channels: int    #: before
    in_channels: int     #: before, of one group


class ChannelPlan(NamedTuple):
    """What is left of a network; layers that lose nothing are not mentioned."""

    layers: Dict[str, LayerPlan]
    vectors: Dict[str, List[int]]  #: norm or activation with parameters per channel -> channels that stay

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps({"format": _FORMAT, "vectors": self.vectors,
                           "layers": {name: layer._asdict() for name, layer in self.layers.items()}}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: another format.
        """
        try:
            values: Any = json.loads(text)
            if values["format"] != _FORMAT:
                raise ValueError("format %r" % values["format"])
            layers = {str(name): LayerPlan(**layer) for name, layer in values["layers"].items()}
            vectors = {str(name): [int(channel) for channel in kept] for name, kept in values["vectors"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError("not a channel plan: %s" % error) from error
        return cls(layers, vectors)


def channel_plan(classes: ChannelClasses, keep: np.ndarray) -> ChannelPlan:
    """Turn a choice of classes (bool [classes.size]) into rows and columns."""
    layers = {}
    for name, layer in classes.layers.items():
        rows, columns = keep[layer.rows], (layer.columns < 0) | keep[layer.columns]
        if not (rows.all() and columns.all()):
            layers[name] = LayerPlan(np.flatnonzero(rows).tolist(), np.flatnonzero(columns).tolist(),
                                     len(rows), len(columns))
    vectors = {name: np.flatnonzero(keep[channels]).tolist() for name, channels in classes.vectors.items()
               if not keep[channels].all()}
    return ChannelPlan(layers, vectors)


def plan_keeps(classes: ChannelClasses, keep: np.ndarray) -> Mapping[str, np.ndarray]:
    """For each layer a bool array [out_channels, in_channels / groups]: the weights that survive."""
    return {name: keep[layer.rows][:, None] & ((layer.columns < 0) | keep[layer.columns])[None, :]
            for name, layer in classes.layers.items()}
