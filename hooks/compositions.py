"""Weights that are computed from others: products of low-rank factors, and merged over-parameterized layers.

Everybody who read such a weight's variable reads what equals it (regularizers, summaries, an operation fetched by its
old name), so the graph has no stale value. The graph remembers each of them in a collection, which a MetaGraph keeps.
"""
from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple, Set, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import connect, edges_from, variables_by_name

_COLLECTION = "slimtrain_compositions"


class Composition(NamedTuple):
    """What takes the place of one variable; tensors and operations by name."""

    layer: str                 #: the operation that reads the weight
    variable: str              #: the weight's
    kernel: str                #: the tensor that equals the weight at inference, of the variable's shape
    factors: List[List[int]]   #: shapes of low-rank factors; empty where the layer is over-parameterized
    result: str                #: the tensor that is read in the place of the layer's; "" for the layer's own
    bias_variable: str = ""    #: the bias' where it is computed too
    bias: str = ""             #: the tensor that is added in its place
    merged_bias: str = ""      #: the tensor that equals it at inference


def compositions(graph: tf.Graph) -> List[Composition]:
    """All of a graph, in the order in which they were made."""
    return [Composition(**json.loads(item)) for item in graph.get_collection(_COLLECTION)]


def remember(graph: tf.Graph, composition: Composition) -> None:
    """Keep a composition with the graph."""
    graph.add_to_collection(_COLLECTION, json.dumps(composition._asdict(), sort_keys=True))


def replaced_layers(graph: tf.Graph) -> Set[str]:
    """Names of the operations whose work a chain of others does."""
    return {made.layer for made in compositions(graph) if made.factors}


def computing_scopes(graph: tf.Graph) -> Tuple[str, ...]:
    """Scopes of the operations that compute weights, or train an expanded layer: no layers of the network."""
    return tuple(made.kernel[:made.kernel.rindex("/") + 1] for made in compositions(graph))


def is_merged(graph: tf.Graph, kernel: tf.Tensor) -> bool:
    """Whether a layer's weight is computed from an over-parameterized one, and that is what it trains with."""
    merged = {made.kernel for made in compositions(graph) if not made.factors and not made.result}
    while kernel.name not in merged and kernel.op.type in ("Identity", "Reshape", "ExpandDims", "Squeeze", "Transpose"):
        kernel = kernel.op.inputs[0]
    return kernel.name in merged


def check_merged(graph: tf.Graph) -> None:
    """Make sure that every layer trains with the very weight that is deployed, so that it can be quantized.

    Raises:
        RuntimeError: an over-parameterized layer normalizes with the statistics of each batch.
    """
    for made in compositions(graph):
        if not made.factors and made.result:
            raise RuntimeError(
                "layer {!r} is over-parameterized and normalizes with the statistics of each batch, so no one weight "
                "can be quantized while it trains: expand with add_batchnorm=False, or with is_training=False from the "
                "checkpoint of a finished run, or quantize in a second run that starts from the merged weights "
                "(get_op_weight_values, then init_checkpoint)".format(made.layer))


def merged_weights(sess: tf.Session) -> Dict[str, np.ndarray]:
    """The weights of the plain network, as it is before decomposition and over-parameterization, by variable name.

    Low-rank factors are multiplied out; expanded layers are merged, with the bias that then belongs to them. Weights
    that are neither are not here: :func:`get_op_weight_values` saves all together.

    Args:
        sess: holds the trained variables.

    Returns:
        float32 arrays of the shapes of the original variables.
    """
    found = compositions(sess.graph)
    wanted = {made.variable: made.kernel for made in found}
    wanted.update((made.bias_variable, made.merged_bias) for made in found if made.merged_bias)
    values = dict(sess.run(wanted)) if wanted else {}
    known = variables_by_name(sess.graph)
    return {name: value.reshape(known[name].shape.as_list()) if name in known else value  # a bias may be read reshaped
            for name, value in values.items()}


def replace_variable(variable: Any, value: tf.Tensor, parts: List[Any]) -> None:
    """Let everything that reads ``variable`` read ``value``, and put ``parts`` in its place in all collections."""
    graph = value.graph
    reads = [op.outputs[0] for op in variable.op.outputs[0].consumers() if op.type in ("Identity", "ReadVariableOp")]
    for read in reads:
        connect(edges_from(read), value)
    for key in graph.get_all_collection_keys():
        items = graph.get_collection_ref(key)
        if any(item is variable for item in items):
            items[:] = [part for item in items for part in (parts if item is variable else [item])]


def merge_in_copy(copy: tf.Graph, session: tf.Session) -> Dict[str, str]:
    """Turn expanded layers of a copy of the session's graph into plain ones that hold constants.

    Returns:
        the names that operations added here shall have: those of the variables whose place they take.
    """
    renames = {}
    expanded = [made for made in compositions(session.graph) if not made.factors]
    values = session.run([(made.kernel, made.merged_bias or made.kernel) for made in expanded])
    with copy.as_default(), tf.control_dependencies(None):
        for made, (kernel, bias) in zip(expanded, values):
            constant = tf.constant(kernel, name="slimtrain_merged/" + made.variable)
            connect(edges_from(copy.get_tensor_by_name(made.kernel)), constant)
            renames[constant.op.name] = made.variable
            if made.merged_bias:
                constant = tf.constant(bias, name="slimtrain_merged/" + made.bias_variable)
                connect(edges_from(copy.get_tensor_by_name(made.bias)), constant)
                renames[constant.op.name] = made.bias_variable
            if made.result:
                own = copy.get_operation_by_name(made.layer).outputs[0]
                connect(edges_from(copy.get_tensor_by_name(made.result)), own)
    return renames
