"""Taking pruned channels out of a frozen graph: the same outputs from smaller dense layers."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ChannelPlan, ConversionError, LayerPlan, channel_plan, sqnr_db
from slimtrain.hooks.channel_trace import ChannelTrace, ReshapeEdge
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.pruning_layers import PrunableWeight

logger = logging.getLogger(__name__)

# two float32 programs for one function; a channel too many or too few is below 40 dB
_EQUAL_DB = 80.0
_GUESSED_LENGTH = 32


class Shrunk(NamedTuple):
    """A smaller network."""

    graph_def: Any       #: frozen
    plan: ChannelPlan    #: what is left of it, by names of variables


def shrink_graph(frozen: Any, trace: ChannelTrace, keep: np.ndarray, outputs: Sequence[str]) -> Shrunk:
    """Remove channels from a frozen GraphDef.

    Args:
        frozen: of the network that was traced, with weights of zero for all that belongs to a removed channel.
        trace: of that network.
        keep: bool per class, True = stays.
        outputs: names of operations or tensors that leave the network.

    Raises:
        ConversionError: the smaller network computes something else.
    """
    plan = channel_plan(trace.classes, keep)
    smaller = tf.GraphDef()
    smaller.CopyFrom(frozen)
    nodes = {node.name: node for node in smaller.node}
    cuts = _cuts(trace, plan, nodes)
    for (op, index), value in zip(cuts, _constants(frozen, cuts)):
        _replace(smaller, nodes, op, index, cuts[op, index].apply(value))
    for name in sorted({edge.op for edge in trace.reshapes} & set(nodes)):
        _reshape(smaller, nodes, frozen, [edge for edge in trace.reshapes if edge.op == name], plan)
    for node in smaller.node:
        node.attr.pop("_output_shapes", None)
    names = [name.partition(":")[0] for name in outputs]
    smaller = tf.graph_util.extract_sub_graph(smaller, names)
    _check_same(frozen, smaller, names)
    vectors = {name: kept for name, kept in plan.vectors.items() if name not in {edge.key for edge in trace.reshapes}}
    return Shrunk(smaller, ChannelPlan(plan.layers, vectors))


class _Cut(NamedTuple):
    """What is left of a constant: indices by axis."""

    kept: Mapping[int, Sequence[int]]

    def apply(self, value: np.ndarray) -> np.ndarray:
        for axis, indices in self.kept.items():
            value = value.take(list(indices), axis=axis)
        return value


def _cuts(trace: ChannelTrace, plan: ChannelPlan, nodes: Mapping[str, Any]) -> Dict[Tuple[str, int], _Cut]:
    """By operation and number of its input."""
    cuts = {}
    for op, weight in trace.kernels.items():
        if op in nodes and weight.name in plan.layers:
            cuts[op, 1] = _Cut(_kernel_axes(weight, plan.layers[weight.name]))
    for edge in trace.constants:
        if edge.op in nodes and edge.key in plan.vectors:
            cuts[edge.op, edge.position] = _Cut({edge.axis: plan.vectors[edge.key]})
    return cuts


def _kernel_axes(weight: PrunableWeight, layer: LayerPlan) -> Dict[int, Sequence[int]]:
    axis = weight.layer.channel_axis
    if weight.layer.kind is LayerKind.MATMUL:
        return {axis: layer.rows, 1 - axis: layer.columns}
    if weight.layer.kind is LayerKind.DEPTHWISE:
        multiplier = weight.layer.kernel.shape.as_list()[3]
        return {2: [row // multiplier for row in layer.rows[::multiplier]]}
    return {3: layer.rows, 2: layer.columns}


def _constants(frozen: Any, edges: Any) -> List[np.ndarray]:
    """The values that operations of a frozen graph read at these inputs."""
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen, name="")
        with tf.Session(graph=graph) as session:
            values: List[np.ndarray] = session.run([graph.get_operation_by_name(op).inputs[index]
                                                    for op, index in edges])
    return values


def _replace(graph_def: Any, nodes: Dict[str, Any], op: str, index: int, value: np.ndarray) -> None:
    """Let an input read a constant of its own; equal reads of one tensor share it."""
    source = nodes[op].input[index]
    name = "{}/kept".format(source.replace(":", "_"))
    while name in nodes and not _holds(nodes[name], value):
        name += "_"
    if name not in nodes:
        nodes[name] = graph_def.node.add(op="Const", name=name)
        nodes[name].attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        nodes[name].attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    nodes[op].input[index] = name


def _holds(node: Any, value: np.ndarray) -> bool:
    return node.op == "Const" and np.array_equal(tf.make_ndarray(node.attr["value"].tensor), value)


def _reshape(graph_def: Any, nodes: Dict[str, Any], frozen: Any, edges: Sequence[ReshapeEdge],
             plan: ChannelPlan) -> None:
    """Write the shape of a result anew where it counts channels."""
    changed = {edge.axis: len(plan.vectors[edge.key]) for edge in edges if edge.key in plan.vectors}
    if not changed:
        return
    op = edges[0].op
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen, name="")
        found = graph.get_operation_by_name(op)
        known: Optional[np.ndarray] = tf.get_static_value(found.inputs[1])
        lengths = [-1 if length is None else length for length in found.outputs[0].shape.as_list()] if (
            known is None) else known.tolist()
    lengths = [changed.get(axis, length) if length >= 0 else -1 for axis, length in enumerate(lengths)]
    _replace(graph_def, nodes, op, 1, np.array(lengths, np.int32 if known is None else known.dtype))
    nodes[op].attr["Tshape"].type = (tf.int32 if known is None else tf.as_dtype(known.dtype)).as_datatype_enum


def _check_same(frozen: Any, smaller: Any, names: Sequence[str]) -> None:
    feeds, before = _outputs(frozen, names, None)
    if before is None:
        logger.warning("the smaller graph was not compared with the masked one: no input could be made up")
        return
    try:
        _, after = _outputs(smaller, names, feeds)
    except (ValueError, tf.errors.OpError) as error:
        raise ConversionError("the network does not run without its pruned channels, something in it depends on their "
                              "number; name the layers before that in skip_layers: {}".format(error)) from error
    for name, wanted, found in zip(names, before, after or ()):
        if wanted.shape != found.shape or (np.any(wanted) and sqnr_db(wanted, found) < _EQUAL_DB):
            raise ConversionError("{} is not the same without the pruned channels: something depends on their number. "
                                  "Nothing was written".format(name))


def _outputs(graph_def: Any, names: Sequence[str], feeds: Any) -> Tuple[Any, Optional[List[np.ndarray]]]:
    """The outputs on random inputs, and these inputs by name; None when the network does not take them."""
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        made = feeds or {}
        if feeds is None:
            for op in graph.get_operations():
                if op.type == "Placeholder":
                    made[op.outputs[0].name] = _made_up(op.outputs[0])
        with tf.Session(graph=graph) as session:
            try:
                values = session.run([graph.get_operation_by_name(name).outputs[0] for name in names], made)
            except tf.errors.OpError:
                if feeds is not None:
                    raise
                return made, None
    return made, [np.asarray(value, np.float64) for value in values]


def _made_up(tensor: tf.Tensor) -> np.ndarray:
    lengths = tensor.shape.as_list() if tensor.shape.rank is not None else [2]
    shape = [length or (2 if axis == 0 else _GUESSED_LENGTH) for axis, length in enumerate(lengths)]
    random = np.random.RandomState(0)
    if tensor.dtype.is_floating:
        return random.standard_normal(shape).astype(tensor.dtype.as_numpy_dtype)
    return np.zeros(shape, tensor.dtype.as_numpy_dtype)
