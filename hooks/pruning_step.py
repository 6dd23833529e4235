"""Pruning as a part of the training step: after the optimizer's updates, before the global step is counted.

All of it runs in the session run that trains, so a checkpoint never holds a weight that should be zero, and the
position in the schedule is that of the global step. Whoever runs the training step runs it; nothing else does.
"""
from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Sequence, Set

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import PruningSchedule
from slimtrain.hooks.graph import inside_control_flow, is_update, ordered_variable
from slimtrain.hooks.pruner import SCOPE, Pruner
from slimtrain.hooks.state import make_variable

_COUNTS = frozenset({"AssignAdd", "AssignAddVariableOp"})
_GRADIENTS = ("grad", "delta")


class Update(NamedTuple):
    """How an optimizer changes one variable."""

    op: tf.Operation
    gradient: Optional[tf.Tensor]   #: None where it is sparse


class Sensors(NamedTuple):
    """Running means of sensitivities."""

    scores: Dict[str, Any]   #: weight -> variable
    batches: Any             #: int64 variable, how many were taken in


def make_sensors(pruner: Pruner) -> Optional[Sensors]:
    """The variables in which sensitivities are measured; None where they were given."""
    if pruner.given_scores is not None:
        return None
    with pruner.graph.as_default(), tf.name_scope(None), tf.control_dependencies(None):
        scores = {name: make_variable("{}/{}/sensitivity".format(SCOPE, name),
                                      tf.zeros(pruner.score_shape(weight), tf.float32), weight.variable, collections=())
                  for name, weight in pruner.weights.items()}
        first = next(iter(pruner.weights.values())).variable
        return Sensors(scores, make_variable(SCOPE + "/batches", np.array(0, np.int64), first, collections=()))


def add_to_step(pruner: Pruner, sensors: Optional[Sensors], window: int, decides: bool) -> None:
    """Let the training step look at gradients, take decisions and set weights to zero.

    Args:
        pruner: of the default graph, which is not finalized yet.
        sensors: where sensitivities are kept, if they are to be measured.
        window: steps whose gradients count for an event.
        decides: whether this process takes decisions; the others only keep zeros zero.

    What the step cannot prune is left, with the reason: ``pruner.leave``.

    Raises:
        RuntimeError: there is no global step, or no operation that counts it and trains what can be pruned.
    """
    updates = find_updates(pruner.graph)
    count = counting_operation(pruner.graph, set(pruner.weights), updates)
    before = everything_before(count)
    trained = {name for name in pruner.keeps if name in updates and updates[name].op.name in before}
    _leave_the_rest(pruner, updates, trained, sensors is not None)
    with tf.name_scope(SCOPE + "/step/"):
        # each right after its update, while other gradients are still computed: at the end nothing else would run
        zeroed = [_zero_after([updates[name].op], pruner, name) for name in sorted(trained)]
        with tf.control_dependencies(zeroed):
            step = tf.cast(tf.train.get_global_step(pruner.graph).read_value(), tf.int64)
            done = [tf.no_op()]
            if decides and sensors is not None:
                measured = {name: updates[name] for name, weight in pruner.weights.items()
                            if name in trained and updates[name].gradient is not None
                            and weight.layer.name not in pruner.found.left}
                done = [_look(pruner, sensors, measured, step, window)]
            if decides:
                with tf.control_dependencies(done):
                    done = [_decide(pruner, sensors, step, [] if sensors is None else list(measured), sorted(trained))]
            zeroed = done + [_zero_after(done, pruner, name) for name in pruner.keeps if name not in updates]
    count._add_control_inputs(zeroed)  # TensorFlow has no public way to add a control edge


def find_updates(graph: tf.Graph) -> Dict[str, Update]:
    """The optimizer's operations by the name of the variable that they change."""
    found: Dict[str, Update] = {}
    for op in graph.get_operations():
        if is_update(op) and op.inputs:
            names = [argument.name for argument in op.op_def.input_arg]
            gradient = next((op.inputs[names.index(name)] for name in _GRADIENTS if name in names), None)
            found.setdefault(ordered_variable(op.inputs[0]), Update(op, None if "Sparse" in op.type else gradient))
    return found


def looking(schedule: PruningSchedule, window: int, step: tf.Tensor) -> tf.Tensor:
    """``schedule.looks_at`` in the graph."""
    ahead = schedule.begin_step - step
    ahead = tf.where(ahead > 0, ahead, tf.floormod(ahead, schedule.interval))
    return tf.logical_and(step <= schedule.last_step, ahead < window)


def events_due(schedule: PruningSchedule, step: tf.Tensor) -> tf.Tensor:
    """How many events there are up to and including ``step``."""
    passed = tf.floordiv(step - schedule.begin_step, schedule.interval) + 1
    return tf.clip_by_value(passed, np.int64(0), np.int64(schedule.events))


def counting_operation(graph: tf.Graph, variables: Set[str], updates: Dict[str, Update]) -> tf.Operation:
    """The operation that counts the global step after training most of these variables.

    Args:
        graph: with its optimizer.
        variables: names of variables that are to be changed once more in the step.
        updates: of the graph, see :func:`find_updates`.

    Raises:
        RuntimeError: there is no global step, or no operation that counts it and trains one of the variables.
    """
    step = tf.train.get_global_step(graph)
    if step is None:
        raise RuntimeError("the graph has no global step: call tf.train.get_or_create_global_step() and give it to the "
                           "optimizer")
    for name in sorted(variables):
        if name in updates and inside_control_flow(updates[name].op):
            raise RuntimeError("the update of %r lies inside a cond or while_loop, which cannot be followed" % name)
    best: Any = (None, 0)
    for op in graph.get_operations():
        if op.type in _COUNTS and ordered_variable(op.inputs[0]) == step.op.name:
            before = everything_before(op)
            trained = sum(1 for name in variables if name in updates and updates[name].op.name in before)
            best = max(best, (op, trained), key=lambda found: found[1])
    if not best[1]:
        raise RuntimeError("no operation trains %s and then counts the global step: give global_step to the minimize "
                           "or apply_gradients of one of TensorFlow's version 1 optimizers" % ", ".join(
                               sorted(variables)[:3]))
    return best[0]


def everything_before(op: tf.Operation) -> Set[str]:
    """Names of the operations that run before ``op``."""
    seen: Set[str] = set()
    waiting = [op]
    while waiting:
        current = waiting.pop()
        for source in [tensor.op for tensor in current.inputs] + list(current.control_inputs):
            if source.name not in seen:
                seen.add(source.name)
                waiting.append(source)
    return seen


def _leave_the_rest(pruner: Pruner, updates: Dict[str, Update], trained: Set[str], measures: bool) -> None:
    """Leave what the step can neither keep at zero nor know anything of."""
    for name in sorted(set(pruner.keeps) - trained):
        if name in updates:
            for weight in pruner.needing(name):
                pruner.leave(weight, "%s trains %s, and does not run before the global step is counted" % (
                    updates[name].op.name, name))
        elif name in pruner.weights and measures:
            pruner.leave(name, "no optimizer trains it, and there is no file of sensitivities")
    if all(pruner.weights[name].layer.name in pruner.found.left for name in pruner.candidates()):
        raise RuntimeError("nothing is left to prune: %s" % "; ".join(
            "%s: %s" % item for item in sorted(pruner.found.left.items())))


def _look(pruner: Pruner, sensors: Sensors, measured: Dict[str, Update], step: tf.Tensor,
          window: int) -> tf.Operation:
    """Take in the gradients of this step, if they count for an event."""
    def look() -> tf.Tensor:
        share = 1.0 / tf.cast(tf.minimum(sensors.batches.read_value() + 1, window), tf.float32)
        taken = [_take_in(pruner, sensors.scores[name], name, update, share) for name, update in measured.items()]
        with tf.control_dependencies(taken):
            with tf.control_dependencies([tf.assign_add(sensors.batches, np.int64(1))]):
                return tf.constant(True)

    return tf.cond(looking(pruner.schedule, window, step), look, lambda: tf.constant(False)).op


def _take_in(pruner: Pruner, mean: Any, name: str, update: Update, share: tf.Tensor) -> Any:
    weight = pruner.weights[name]
    with tf.device(weight.variable.device):
        value = weight.variable.read_value() * pruner.keeps[name].read_value()
        score = pruner.score(weight, value * update.gradient)
        # an overflowing batch says nothing
        score = tf.where(tf.is_finite(score), score, tf.zeros_like(score))
        return tf.assign_add(mean, share * (score - mean.read_value()))


def _zero_after(ops: Sequence[tf.Operation], pruner: Pruner, name: str) -> tf.Operation:
    with tf.control_dependencies(ops):
        return pruner.zero(name)


def _decide(pruner: Pruner, sensors: Optional[Sensors], step: tf.Tensor, measured: Sequence[str],
            trained: Sequence[str]) -> tf.Operation:
    """Take the decision of the last event that is due, and set to zero what it prunes of the trained variables."""
    due = events_due(pruner.schedule, step)
    wanted = due > pruner.events.read_value()
    if sensors is not None:
        wanted = tf.logical_and(wanted, sensors.batches.read_value() > 0)
    device = next(iter(pruner.weights.values())).layer.op.device

    def decide() -> tf.Tensor:
        scores = {} if sensors is None else {name: sensors.scores[name].read_value() for name in measured}
        decision = pruner.decision(due, scores, device)
        with tf.control_dependencies([_zero_after([decision], pruner, name) for name in trained]):
            return tf.constant(True)

    return tf.cond(wanted, decide, lambda: tf.constant(False)).op

