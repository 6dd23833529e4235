"""The channels behind the values of a graph's tensors: what is known of them, and which of them must stay together."""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ChannelGraph
from slimtrain.hooks.channel_rules import narrowed, spread, static_shape, varying
from slimtrain.hooks.graph import ordered_variable


class ConstantEdge(NamedTuple):
    """An input that has a value of its own for each channel."""

    op: str        #: name of the operation that reads it
    position: int  #: of the input
    axis: int      #: of its channels, from the end (-1: the last)
    key: str       #: its channels among the vectors of the classes


class Shadows:
    """A shadow for every tensor that was walked past (see ``channel_rules``), and what they say of the channels."""

    def __init__(self) -> None:
        self._graph = ChannelGraph()
        self._shadows: Dict[str, np.ndarray] = {}
        self._constants: List[ConstantEdge] = []
        self._variables: Dict[str, str] = {}

    def _start(self, tensors: Sequence[tf.Tensor]) -> None:
        """Values that belong to no channel."""
        for tensor in tensors:
            shape = static_shape(tensor)
            if shape is not None:
                self._shadows[tensor.name] = spread(np.array(-1), shape)

    def _shadow(self, tensor: tf.Tensor) -> Optional[np.ndarray]:
        return self._shadows.get(tensor.name)

    def _of(self, tensors: Sequence[tf.Tensor]) -> Optional[List[np.ndarray]]:
        found = [self._shadows[tensor.name] for tensor in tensors if tensor.name in self._shadows]
        return found if len(found) == len(tensors) else None

    def _vector(self, op: str, index: int, tensor: tf.Tensor, axis: int, channels: np.ndarray, zero: bool) -> None:
        variable = ordered_variable(tensor)
        key = variable or tensor.name
        if not (channels >= 0).any():
            return
        self._graph.add_vector(key, channels)
        self._constants.append(ConstantEdge(op, index, axis, key))
        if variable and zero:
            self._variables[key] = variable

    def _along(self, shadow: np.ndarray) -> np.ndarray:
        """The channel at each place of the last dimension; -1, and fixed, where it is not the same everywhere."""
        flat = narrowed([shadow])[0]
        flat = np.broadcast_to(flat, flat.shape[:-1] + shadow.shape[-1:]).reshape(-1, shadow.shape[-1])
        low, high = flat.min(axis=0), flat.max(axis=0)
        mixed = low != high
        if mixed.any():
            self._fix(flat[:, mixed], "its channels are spread over other dimensions")
        return np.where(mixed, -1, low)

    def _fix(self, shadow: np.ndarray, reason: str) -> None:
        self._graph.fix(narrowed([shadow])[0], reason)

    def _couple_parts(self, source: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """A tensor is cut into equal parts: they must stay equal."""
        if not (parts[0] == parts[1]).all():  # else the cut is along another dimension
            self._graph.couple(np.stack([part.ravel() for part in parts]))

    def _couple_split(self, moved: np.ndarray) -> None:
        """Channels that were split over two dimensions are removed along the longer one only."""
        dims = varying(moved)
        if len(dims) == 2:
            fixed, free = sorted(dims, key=lambda dim: moved.shape[dim])
            if moved.shape[fixed] < moved.shape[free]:
                table = np.moveaxis(moved, (fixed, free), (0, 1)).reshape(moved.shape[fixed], moved.shape[free], -1)
                self._graph.couple(table[:, :, 0])
                return
        if len(dims) >= 2:
            self._fix(moved, "its channels are split over several dimensions")

    def _fix_cut(self, shadows: Sequence[np.ndarray], moved: Sequence[np.ndarray]) -> None:
        """Channels that a slice leaves behind were cut at fixed positions."""
        before, after = (self._graph.roots(np.concatenate([narrowed([part])[0].ravel() for part in parts]))
                         for parts in (shadows, moved))
        if before != after:
            for shadow in shadows:
                self._fix(shadow, "its channels are cut at fixed positions")
