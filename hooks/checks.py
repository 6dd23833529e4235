"""Graphs that cannot be edited any more, refused with the sentence that mends it.

TensorFlow accepts an edit at the wrong moment without a word: gradients keep the old tensors, a session that has run
keeps the old edges, and a function body that was already serialised never changes.
"""
from __future__ import annotations

import gc
import itertools
from typing import Any, Dict, Iterator, List, Sequence, Set

import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import is_backward

_LAYERS = frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul", "FusedBatchNorm", "FusedBatchNormV2",
                     "FusedBatchNormV3"})
_CALLS = frozenset({"If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase", "PartitionedCall",
                    "StatefulPartitionedCall"})


def check_editable(graph: tf.Graph) -> None:
    """Make sure that edges of ``graph`` may still be moved.

    Raises:
        TypeError: ``graph`` is not a ``tf.Graph``.
        RuntimeError: the graph is finalized, has gradients, or belongs to an open session.
        ValueError: layers are hidden in function bodies.
    """
    if not isinstance(graph, tf.Graph):
        raise TypeError("graph must be a tf.Graph, got {}".format(type(graph).__name__))
    if graph.finalized:
        raise RuntimeError("the graph is finalized: construct the quantizer before the (monitored) session")
    trained = _gradient_op(graph)
    if trained:
        raise RuntimeError("the graph already has gradients (operation {!r}), which would keep reading the float "
                           "tensors: construct the quantizer before the optimizer's minimize or tf.gradients"
                           .format(trained))
    if any(_open_sessions(graph)):
        raise RuntimeError("the graph already has an open session, which would keep running the float graph: construct "
                           "the quantizer before tf.Session, or close that session first")
    hidden = _hidden_layer(graph)
    if hidden:
        raise ValueError("{} lies in a function body, where nothing can be inserted: call "
                         "tf.compat.v1.disable_control_flow_v2() (or disable_v2_behavior()) before building the model, "
                         "and give batch normalization a Python bool for training".format(hidden))


def _gradient_op(graph: tf.Graph) -> str:
    return next((str(op.name) for op in graph.get_operations() if is_backward(op)), "")


def _open_sessions(graph: tf.Graph) -> Iterator[Any]:
    # TensorFlow keeps no list of a graph's sessions. Types are looked at rather than isinstance, which would wake up
    # every lazy module proxy in the process; there are hundreds of thousands of objects, hence no loop of Python's.
    kinds = {id(kind) for kind in _with_subclasses([tf.Session, tf.InteractiveSession])}
    objects = gc.get_objects()
    for candidate in itertools.compress(objects, map(kinds.__contains__, map(id, map(type, objects)))):
        if candidate.graph is graph and not candidate._closed:
            yield candidate


def _with_subclasses(kinds: Sequence[type]) -> Set[type]:
    found: Set[type] = set()
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting.extend(kind.__subclasses__())
    return found


def _hidden_layer(graph: tf.Graph) -> str:
    called = [op for op in graph.get_operations() if op.type in _CALLS]
    if not called:
        return ""
    functions = {f.signature.name: f for f in graph.as_graph_def().library.function}
    for op in called:
        for function in _functions_of(op.node_def, functions):
            for node in function.node_def:
                if node.op in _LAYERS:
                    return "{} {!r} of {} {!r}".format(node.op, node.name, op.type, op.name)
    return ""


def _functions_of(node: Any, functions: Dict[str, Any]) -> Iterator[Any]:
    """The functions that a node calls, and those which they call in turn."""
    waiting: List[Any] = [node]
    seen: Set[str] = set()
    while waiting:
        for name in _function_names(waiting.pop()):
            if name in functions and name not in seen:
                seen.add(name)
                waiting.extend(functions[name].node_def)
                yield functions[name]


def _function_names(node: Any) -> Iterator[str]:
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        for item in value.list.func:
            yield item.name
