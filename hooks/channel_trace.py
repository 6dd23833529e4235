"""Following channels through a graph.

Beside every tensor goes a shadow (see ``channel_rules``). Whatever moves values is run on the shadow too; whatever
computes with values either keeps them in their places, joins channels, begins new ones (a layer), or is unknown, and
then what it reads stays.
"""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, List, NamedTuple, Optional, Sequence, Set

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ChannelClasses, select
from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.channel_rules import (
    IGNORED,
    JOINS,
    KEEPS_PLACES,
    MOVES,
    PADS,
    POOLS,
    REDUCES,
    VIEWS,
    fits,
    narrowed,
    run_on_shadows,
    spread,
    static_shape,
    varying,
    without,
)
from slimtrain.hooks.channel_shadows import ConstantEdge, Shadows
from slimtrain.hooks.graph import ordered_variable
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.operations import Network
from slimtrain.hooks.pruning_layers import PrunableWeight, PrunableWeights

#: moves that are written without any length
_SIZELESS = frozenset({"Transpose", "ConcatV2", "Split", "Pack", "Unpack"})


class ReshapeEdge(NamedTuple):
    """A length of a result's shape that counts channels."""

    op: str
    axis: int
    key: str


class ChannelTrace(NamedTuple):
    """Which channels of a network depend on each other, and where their number is written down."""

    classes: ChannelClasses
    kernels: Dict[str, PrunableWeight]   #: layer operation -> its weight
    constants: List[ConstantEdge]
    reshapes: List[ReshapeEdge]
    variables: Dict[str, str]            #: vector that can be set to zero -> name of its variable


def trace_channels(graph: tf.Graph, network: Network, found: PrunableWeights,
                   skip: Collection[str] = ()) -> ChannelTrace:
    """Find out which channels of a network depend on each other, from its graph alone.

    Args:
        graph: holds the network, not quantized.
        network: its layers, norms and outputs; without outputs whatever nobody reads counts as one.
        found: the layers with weights, depthwise ones included.
        skip: names or patterns of layers that keep all that they produce.

    Raises:
        ValueError: an entry of ``skip`` names no layer.
    """
    tracer = _Tracer(network, found, frozenset(select(list(found.layers), skip)))
    for op in graph.get_operations():
        if op.name in found.within:
            tracer.follow(op)
    tracer.leave(network.outputs)
    return tracer.finish()


class _Tracer(Shadows):
    def __init__(self, network: Network, found: PrunableWeights, skip: Collection[str]) -> None:
        super().__init__()
        self._network = network
        self._found = found
        self._skip = skip
        self._read: Set[str] = set()
        self._hidden = {name for norm in network.norms.values() for name in norm.ops}
        self._kernels: Dict[str, PrunableWeight] = {}
        self._reshapes: List[ReshapeEdge] = []

    # -- the walk

    def follow(self, op: tf.Operation) -> None:
        """Give the results of one operation their shadows."""
        result = op.outputs[0] if op.outputs else None
        if result is not None and result.name in self._network.norms:
            self._normalize(self._network.norms[result.name])
        elif result is not None and result.name in self._network.dropouts:
            self._pass_on(self._network.dropouts[result.name], result)
        elif op.name not in self._hidden and not any(word in op.type for word in IGNORED):
            self._compute(op)

    def leave(self, outputs: Sequence[str]) -> None:
        """What the outputs hold leaves the network; without outputs, what nobody read."""
        for name in outputs or [name for name in self._shadows if name not in self._read]:
            if name in self._shadows:
                self._fix(self._shadows[name], "its channels leave the network")

    def finish(self) -> ChannelTrace:
        return ChannelTrace(self._graph.finish(), self._kernels, self._constants, self._reshapes, self._variables)

    def _compute(self, op: tf.Operation) -> None:
        inputs = [self._shadows[tensor.name] for tensor in op.inputs if tensor.name in self._shadows]
        self._read.update(tensor.name for tensor in op.inputs)
        live = [tensor for tensor in op.outputs if tensor.dtype.is_floating and tensor.name not in self._network.fixed]
        if not inputs:
            self._start(live)
            return
        rule = self._rule(op)
        results = rule(op) if rule is not None else None
        if results is not None and len(results) == len(op.outputs) and all(map(fits, results, op.outputs)):
            self._shadows.update((tensor.name, shadow) for tensor, shadow in zip(op.outputs, results))
            return
        reason = self._found.left.get(op.name)
        for shadow in inputs:
            self._fix(shadow, "a layer that stays reads it: %s" % reason if reason
                      else "its channels go through %s %r" % (op.type, op.name))
        self._start(live)

    def _pass_on(self, source: tf.Tensor, result: tf.Tensor) -> None:
        self._read.add(source.name)
        if source.name in self._shadows:
            self._shadows[result.name] = self._shadows[source.name]

    def _rule(self, op: tf.Operation) -> Optional[Callable[[tf.Operation], Optional[List[np.ndarray]]]]:
        if op.name in self._found.layers:
            return self._layer if op.name not in self._found.left else None
        for types, rule in ((KEEPS_PLACES, self._same), (POOLS, self._pool), (JOINS, self._join), (VIEWS, self._view),
                            (MOVES, self._move), (PADS, self._pad), (REDUCES, self._reduce)):
            if op.type in types:
                return rule
        return None

    # -- layers

    def _layer(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        layer = self._found.layers[op.name]
        weight = self._found.weights[ordered_variable(layer.kernel)]
        shape, kernel = static_shape(op.outputs[0]), layer.kernel.shape.as_list()
        source = self._shadow(op.inputs[0])
        if shape is None or source is None:
            return None
        if layer.kind is LayerKind.MATMUL:
            readable, places = not op.get_attr("transpose_a"), 1
        else:
            readable, places = op.get_attr("data_format") == b"NHWC", kernel[0] * kernel[1]
        if not readable:
            return None
        columns = self._along(source)
        if layer.kind is LayerKind.DEPTHWISE:
            rows, columns = self._depthwise_rows(columns, kernel[3]), np.array([-1])
        else:
            rows = self._graph.new(layer.channels)
        self._graph.add_layer(weight.name, rows, columns, places)
        self._kernels[op.name] = weight
        if op.name in self._skip:
            self._graph.fix(rows, "named in skip_layers")
        return [spread(rows, shape)]

    def _depthwise_rows(self, columns: np.ndarray, multiplier: int) -> np.ndarray:
        rows = np.repeat(columns, multiplier)
        if (rows < 0).any():
            self._graph.fix(rows, "its layer also filters channels that stay")
            rows = self._graph.new(rows.size)
            self._graph.fix(rows, "its layer filters channels that stay")
        return rows

    def _normalize(self, norm: BatchNorm) -> None:
        self._read.add(norm.input.name)
        source = self._shadow(norm.input)
        if source is None:
            return
        channels = self._along(source)
        for index, tensor in enumerate((norm.gamma, norm.beta, norm.mean, norm.variance)):
            # only gamma and beta are zeroed: a variance of zero would be divided by
            self._vector(norm.output.op.name, index + 1, tensor, -1, channels, zero=index < 2)
        self._shadows[norm.output.name] = source

    # -- other operations

    def _same(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        return self._of([op.inputs[0]]) if op.outputs[0].dtype.is_floating else None

    def _pool(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        source, shape = self._shadow(op.inputs[0]), static_shape(op.outputs[0])
        if source is None or shape is None or source.ndim != 4 or len(shape) != 4:
            return None
        attributes = op.node_def.attr
        if attributes["data_format"].s not in (b"", b"NHWC") or list(attributes["ksize"].list.i)[3:] not in ([], [1]):
            return None
        return [spread(self._along(source), shape)]

    def _join(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        shape = static_shape(op.outputs[0])
        moving = [(index, tensor) for index, tensor in enumerate(op.inputs) if tensor.name not in self._network.fixed]
        shadows = self._of([tensor for _, tensor in moving])
        if shape is None or shadows is None or op.node_def.attr["data_format"].s not in (b"", b"NHWC"):
            return None
        try:
            shape = list(np.broadcast(*shadows, np.empty(shape)).shape)
        except ValueError:
            return None
        wide = [np.broadcast_to(shadow, shape) for shadow in shadows]
        dims = {dim for shadow in wide for dim in varying(shadow)}
        # what has one value for all channels is no part of any
        wide = [other for shadow, other in zip(shadows, wide)
                if len(shadows) == 1 or any(_length(shadow.shape, dim - len(shape)) > 1 for dim in dims)] or wide[:1]
        for index, tensor in enumerate(op.inputs):
            if tensor.name in self._network.fixed and not self._join_constant(op, index, tensor, wide[0], dims):
                return None
        first, *others = narrowed(wide)
        for other in others:
            self._graph.join(first, other)
            one_sided = (first < 0) != (other < 0)
            self._graph.fix(np.maximum(first, other)[one_sided], "it is combined with channels that stay")
        return [wide[int(np.argmax([shadow.max() for shadow in wide]))]]

    def _join_constant(self, op: tf.Operation, index: int, tensor: tf.Tensor, shadow: np.ndarray,
                       dims: Collection[int]) -> bool:
        """Record a constant with values of its own for the channels; False when it varies in another way."""
        lengths = static_shape(tensor)
        if lengths is None:
            return False
        axes = [dim - shadow.ndim for dim in dims if _length(lengths, dim - shadow.ndim) > 1]
        if axes and len(dims) > 1:
            return False
        if axes:
            channels = self._along(np.moveaxis(shadow, axes[0], -1))
            self._vector(op.name, index, tensor, axes[0], channels, zero=int(np.prod(lengths)) == channels.size)
        return True

    def _view(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        source, lengths = self._shadow(op.inputs[0]), op.outputs[0].shape
        if source is None or lengths.rank is None or lengths.as_list().count(None) > 1:
            return None
        try:
            moved = source.reshape([-1 if length is None else length for length in lengths.as_list()])
        except ValueError:
            return None
        self._couple_split(moved)
        self._fix_cut([source], [moved])
        if op.type == "Reshape":
            self._note_lengths(op, moved)
        return [moved]

    def _note_lengths(self, op: tf.Operation, moved: np.ndarray) -> None:
        for dim in varying(moved):
            table = np.moveaxis(moved, dim, -1).reshape(-1, moved.shape[dim])
            if self._is_one_class(table):
                key = "reshape %s %d" % (op.name, dim)
                self._graph.add_vector(key, table[0])
                self._reshapes.append(ReshapeEdge(op.name, dim, key))

    def _is_one_class(self, table: np.ndarray) -> bool:
        """Whether all rows lose the same columns."""
        distinct = np.unique(table, axis=0)
        return all(len(self._graph.roots(column)) <= 1 for column in distinct.T)

    def _move(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        inputs: List[Any] = []
        sources = []
        for tensor in op.inputs:
            shadow = self._shadow(tensor)
            if tensor.dtype.is_floating:
                shape = static_shape(tensor)
                if shadow is None and (shape is None or tensor.name not in self._network.fixed):
                    return None
                inputs.append(np.ascontiguousarray(spread(np.array(-1), shape or []) if shadow is None else shadow,
                                                   np.int32))
                sources.append(len(inputs) - 1)
            else:
                value = _static_value(tensor)
                if value is None:
                    return None
                inputs.append(value)
        moved = run_on_shadows(op, inputs)
        if moved is None:
            return None
        before = [inputs[index].astype(np.int64) for index in sources]
        if len(moved) > 1 and op.type in ("Split", "Unpack"):
            self._couple_parts(before[0], moved)
        for part in moved:
            self._couple_split(part)
        self._fix_cut(before, moved)
        return moved if op.type in _SIZELESS or self._survives_removal(op, inputs, sources, moved) else None

    def _pad(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        source, amounts, shape = self._shadow(op.inputs[0]), _static_value(op.inputs[1]), static_shape(op.outputs[0])
        if source is None or amounts is None or shape is None or any(amounts[dim].any() for dim in varying(source)):
            return None
        return [spread(narrowed([source])[0], shape)]

    def _survives_removal(self, op: tf.Operation, inputs: List[Any], sources: Sequence[int],
                          moved: Sequence[np.ndarray]) -> bool:
        """Whether the operation, as it is written, would do the same with fewer channels: tried with one class less."""
        channels = np.unique(np.concatenate([inputs[index].ravel() for index in sources]))
        channels = channels[channels >= 0]
        for root in self._graph.roots(channels[[0, -1]] if channels.size else channels):
            members = [channel for channel in channels.tolist() if self._graph.roots(np.array([channel])) == [root]]
            fewer = [without(value, members) if index in sources else value for index, value in enumerate(inputs)]
            if any(value.size == 0 for index, value in enumerate(fewer) if index in sources):
                continue
            found = run_on_shadows(op, fewer)
            wanted = [without(part, members) for part in moved]
            if found is None or not all(map(np.array_equal, found, wanted)):
                return False
        return True

    def _reduce(self, op: tf.Operation) -> Optional[List[np.ndarray]]:
        axes, source = _static_value(op.inputs[1]), self._shadow(op.inputs[0])
        if axes is None or source is None:
            return None
        over, keep = tuple(int(axis) for axis in np.ravel(axes)), bool(op.get_attr("keep_dims"))
        low, high = source.min(axis=over, keepdims=keep), source.max(axis=over, keepdims=keep)
        return [low] if bool((low == high).all()) else None

def _length(shape: Sequence[int], axis: int) -> int:
    """The length along an axis counted from the end; 1 where there is no such axis."""
    return shape[axis] if -axis <= len(shape) else 1


def _static_value(tensor: tf.Tensor) -> Optional[np.ndarray]:
    """The value of a tensor that is known without running anything."""
    value: Optional[np.ndarray] = tf.get_static_value(tensor)
    return value

