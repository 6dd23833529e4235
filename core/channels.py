"""Which channels of a network live or die together.

Every channel that a layer produces gets a number. Where a network adds, multiplies or otherwise joins two tensors, the
channels at equal positions become one class; a class can be removed only as a whole, from every layer that
produces one of its members and every layer that reads one. Classes that something unknown reads, or that leave the
network, are fixed, with the reason. Frameworks feed a :class:`ChannelGraph` while they walk a network; the rest is
here.
"""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Set, Tuple

import numpy as np


class LayerChannels(NamedTuple):
    """One layer with weights [rows, columns, ...]."""

    rows: np.ndarray      #: int [out_channels]: class of each channel produced
    columns: np.ndarray   #: int [in_channels / groups]: class of each channel read; -1 where none can be removed
    grouped: bool         #: columns are those of the first of several groups (all groups lose the same)
    kernel: int           #: weights per row and column


class ChannelGroup(NamedTuple):
    """Classes that are produced by the same layers: they compete with each other and are aligned together."""

    layers: Tuple[str, ...]
    classes: np.ndarray   #: int


class ChannelClasses(NamedTuple):
    """The finished graph; classes are numbered from 0."""

    layers: Dict[str, LayerChannels]
    vectors: Dict[str, np.ndarray]    #: norm or activation with one parameter per channel -> class of each
    groups: Tuple[ChannelGroup, ...]  #: the removable classes
    fixed: Dict[str, str]             #: layer -> why none, or not all, of its channels can be removed
    size: int                         #: number of classes

    def weights(self, keep: np.ndarray) -> int:
        """Number of weights that are left when the classes with ``keep`` False are removed."""
        total = 0
        for layer in self.layers.values():
            columns = int(np.count_nonzero((layer.columns < 0) | keep[layer.columns]))
            total += int(np.count_nonzero(keep[layer.rows])) * columns * layer.kernel
        return total


class ChannelGraph:
    """Collects layers and joins while a network is walked."""

    def __init__(self) -> None:
        self._parent: List[int] = []
        self._reasons: Dict[int, str] = {}
        self._layers: Dict[str, LayerChannels] = {}
        self._vectors: Dict[str, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """Numbers for ``count`` new channels."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def add_layer(self, name: str, rows: np.ndarray, columns: np.ndarray, kernel: int, grouped: bool = False) -> None:
        """Record a layer; when it is known already, its channels become those of before.

        Raises:
            ValueError: the layer is used with another number of channels than before.
        """
        known = self._layers.setdefault(name, LayerChannels(rows, columns, grouped, kernel))
        if known.rows.shape != rows.shape or known.columns.shape != columns.shape:
            raise ValueError("layer %r is used with %d and with %d input channels" %
                             (name, known.columns.size, columns.size))
        self.join(known.rows, rows)
        one_sided = (known.columns < 0) != (columns < 0)
        self.fix(np.concatenate([known.columns[one_sided], columns[one_sided]]), "is read together with fixed channels")
        self.join(known.columns, columns)

    def add_vector(self, name: str, channels: np.ndarray) -> None:
        """Record parameters that a norm or an activation has for each channel."""
        self.join(self._vectors.setdefault(name, channels), channels)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Channels at equal positions become one class; -1 stands for no channel."""
        pairs = np.stack([first.ravel(), second.ravel()], axis=1)
        pairs = pairs[(pairs >= 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
        for a, b in sorted(set(map(tuple, pairs.tolist()))):
            a, b = self._root(a), self._root(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def fix(self, channels: np.ndarray, reason: str) -> None:
        """These channels must stay."""
        for channel in _distinct(channels):
            self._reasons.setdefault(channel, reason)

    def couple(self, table: np.ndarray) -> None:
        """All rows of a table lose the same columns."""
        for row in table[1:]:
            self.join(table[0], row)
        self.fix(table[:, (table < 0).any(axis=0)], "they go together with channels that stay")

    def roots(self, channels: np.ndarray) -> List[int]:
        """One number for each class that occurs among the channels, in order."""
        return sorted({self._root(channel) for channel in _distinct(channels)})

    def finish(self) -> ChannelClasses:
        """Number the classes and find those that can be removed."""
        roots = np.array([self._root(channel) for channel in range(len(self._parent))], dtype=int)
        unique, classes = np.unique(roots, return_inverse=True)
        reasons = {int(classes[channel]): reason for channel, reason in reversed(list(self._reasons.items()))}
        numbers = np.append(classes, -1)  # so that -1 stays -1
        layers = {name: layer._replace(rows=numbers[layer.rows], columns=numbers[layer.columns])
                  for name, layer in self._layers.items()}
        fixed = {}
        for name, layer in layers.items():
            found = [reasons[row] for row in layer.rows.tolist() if row in reasons]
            if found:
                fixed[name] = found[0] if len(found) == layer.rows.size else "in part: " + found[0]
        vectors = {name: numbers[channels] for name, channels in self._vectors.items()}
        return ChannelClasses(layers, vectors, _groups(layers, set(reasons)), fixed, len(unique))

    def _root(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel


def _distinct(channels: np.ndarray) -> List[int]:
    """The channels that occur, in order and without -1; a count instead of a sort, because shadows are large."""
    found: List[int] = np.flatnonzero(np.bincount(channels[channels >= 0].ravel())).tolist()
    return found


def _groups(layers: Dict[str, LayerChannels], fixed: Set[int]) -> Tuple[ChannelGroup, ...]:
    producers: Dict[int, List[Tuple[str, int]]] = {}
    for name, layer in layers.items():
        for row, times in zip(*(values.tolist() for values in np.unique(layer.rows, return_counts=True))):
            if row not in fixed:
                producers.setdefault(row, []).append((name, times))
    members: Dict[Tuple[Tuple[str, int], ...], List[int]] = {}
    for number, places in sorted(producers.items()):
        members.setdefault(tuple(places), []).append(number)
    return tuple(ChannelGroup(tuple(name for name, _ in places), np.array(numbers))
                 for places, numbers in members.items())
