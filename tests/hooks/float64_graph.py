"""A graph frozen in a session and run in float64.

Assignments and other side effects are left out: only what the wanted values are computed from is kept.
"""
from __future__ import annotations

from typing import Any, List, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.hooks.batch_norm import FUSED
from slimtrain.hooks.graph import find_tensor

_FLOAT, _DOUBLE = tf.float32.as_datatype_enum, tf.float64.as_datatype_enum


def run_in_float64(session: tf.Session, outputs: Sequence[str], feed_dict: Mapping[Any, np.ndarray],
                   constants: Mapping[str, bool]) -> List[np.ndarray]:
    """Values of ``outputs``, float64.

    Args:
        session: holds the variables.
        outputs: names of tensors or operations.
        feed_dict: arrays by tensor or tensor name; floating ones are used in float64.
        constants: values of boolean operations, such as the training state.
    """
    tensors = [find_tensor(session.graph, name) for name in outputs]
    names = [tensor.op.name for tensor in tensors]
    graph_def = _pure(session.graph.as_graph_def(), constants)
    wanted = tf.graph_util.extract_sub_graph(graph_def, names)
    frozen = tf.graph_util.convert_variables_to_constants(session, wanted, names)
    feeds = {getattr(key, "name", key): np.asarray(value) for key, value in feed_dict.items()}
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(_in_double(frozen), name="")
        with tf.Session(graph=graph) as double:
            values = double.run([tensor.name for tensor in tensors], {
                name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in feeds.items()})
    return [np.asarray(value) for value in values]


def _pure(graph_def: Any, constants: Mapping[str, bool]) -> Any:
    """The graph without control dependencies, and with ``constants`` set."""
    pure = tf.GraphDef()
    pure.CopyFrom(graph_def)
    for node in pure.node:
        node.input[:] = [name for name in node.input if not name.startswith("^")]
        node.attr.pop("_class", None)
        node.device = ""
        if node.name in constants:
            node.op = "Const"
            node.attr.clear()
            node.attr["dtype"].type = tf.bool.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(constants[node.name]))
    return pure


def _in_double(graph_def: Any) -> Any:
    double = tf.GraphDef()
    double.versions.CopyFrom(graph_def.versions)
    for node in graph_def.node:
        if node.op in FUSED:
            double.node.extend(_batch_norm(node))
            continue
        fresh = double.node.add()
        fresh.CopyFrom(node)
        fresh.attr.pop("_gradient_op_type", None)
        for value in fresh.attr.values():
            _to_double(value)
    return double


def _to_double(value: Any) -> None:
    kind = value.WhichOneof("value")
    if kind == "type" and value.type == _FLOAT:
        value.type = _DOUBLE
    elif kind == "list":
        value.list.type[:] = [_DOUBLE if item == _FLOAT else item for item in value.list.type]
    elif kind == "tensor" and value.tensor.dtype == _FLOAT:
        value.tensor.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(value.tensor).astype(np.float64)))


def _batch_norm(node: Any) -> List[Any]:
    """The fused operation has no float64 kernel: gamma / sqrt(variance + epsilon) * (x - mean) + beta."""
    x, gamma, beta, mean, variance = node.input[:5]
    epsilon = tf.NodeDef(op="Const", name=node.name + "/epsilon")
    epsilon.attr["dtype"].type = _DOUBLE
    epsilon.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.float64(np.float32(node.attr["epsilon"].f))))
    steps = {"spread": ("AddV2", variance, epsilon.name), "scale": ("Rsqrt", node.name + "/spread"),
             "factor": ("Mul", gamma, node.name + "/scale"), "centred": ("Sub", x, mean),
             "scaled": ("Mul", node.name + "/centred", node.name + "/factor")}  # type: Dict[str, Any]
    nodes = [epsilon] + [tf.NodeDef(op=step[0], name=node.name + "/" + name, input=step[1:])
                         for name, step in steps.items()]
    nodes.append(tf.NodeDef(op="AddV2", name=node.name, input=[node.name + "/scaled", beta]))
    for fresh in nodes[1:]:
        fresh.attr["T"].type = _DOUBLE
    return nodes
