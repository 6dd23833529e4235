"""Telling a run that trains from one that only looks, by what it fetches."""
from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.hooks.graph import is_backward, variables_behind
from slimtrain.hooks.insertion import is_ours

_ASSIGNS = ("Assign", "Scatter", "ResourceScatter")


class TrainingRuns:
    """Whether fetching something computes gradients, or changes trainable variables or the global step.

    The graph must not change any more; answers are kept by the names of what is fetched.

    Args:
        graph: of the session.
    """

    def __init__(self, graph: tf.Graph) -> None:
        self._graph = graph
        self._known: Dict[Tuple[str, ...], bool] = {}

    def trains(self, fetches: Any) -> bool:
        """Whether ``fetches``, as given to ``Session.run``, lead to a training step."""
        ops = list(_operations(self._graph, fetches))
        names = tuple(op.name for op in ops)
        if names not in self._known:
            learned = _learned(self._graph)
            self._known[names] = any(is_backward(op) or _changes(op, learned) for op in _run_with(ops))
        return self._known[names]

    def feed(self, run_context: Any, state: Optional[tf.Tensor]) -> Optional[tf.train.SessionRunArgs]:
        """What ``before_run`` returns so that a training state is fed, unless there is none or a run does it itself."""
        given = run_context.original_args.feed_dict or {}
        if state is None or state.op.type != "Placeholder" or any(
                getattr(key, "name", key) == state.name for key in given):
            return None
        return tf.train.SessionRunArgs(None, feed_dict={state: self.trains(run_context.original_args.fetches)})


def _operations(graph: tf.Graph, fetches: Any) -> Iterator[tf.Operation]:
    if fetches is None:
        return
    if isinstance(fetches, dict):
        fetches = list(fetches.values())
    if isinstance(fetches, (list, tuple)):
        for fetch in fetches:
            yield from _operations(graph, fetch)
        return
    for part in tf.nest.flatten(fetches, expand_composites=True):  # sparse and ragged tensors have several
        element = graph.as_graph_element(part)
        yield element if isinstance(element, tf.Operation) else element.op


def _learned(graph: tf.Graph) -> Set[str]:
    variables = graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES) + graph.get_collection(tf.GraphKeys.GLOBAL_STEP)
    return {variable.op.name for variable in variables}


def _run_with(ops: List[tf.Operation]) -> Iterator[tf.Operation]:
    """``ops`` and everything that runs before them."""
    waiting, seen = list(ops), set()  # type: List[tf.Operation], Set[str]
    while waiting:
        op = waiting.pop()
        if op.name not in seen:
            seen.add(op.name)
            yield op
            waiting.extend(source.op for source in op.inputs)
            waiting.extend(op.control_inputs)


def _changes(op: tf.Operation, learned: Set[str]) -> bool:
    if not op.type.startswith(_ASSIGNS) or is_ours(op.name):
        return False
    return any(name in learned for name in variables_behind(op.inputs[0]))
