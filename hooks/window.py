"""When a graph is quantized: from a step of the training on, and with scales that may move until another one.

A graph is built once, so both moments are variables that a hook sets between two steps: checkpoints hold them, and a
resumed run is where the other one was. Without moments there are no variables, and the graph is what it always was.
"""
from __future__ import annotations

import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import check_window, step_of
from slimtrain.hooks.pruning_step import counting_operation, everything_before, find_updates
from slimtrain.hooks.state import COLLECTION, SCOPE, make_variable

logger = logging.getLogger(__name__)

Moment = Union[int, float, str]

_ASKED = "_slimtrain_window"


class Window(NamedTuple):
    """The two moments as variables of a graph; None where a graph is quantized from its first step, or to its last."""

    begun: Optional[Any] = None    #: bool
    frozen: Optional[Any] = None   #: bool

    def waiting(self) -> Optional[tf.Tensor]:
        """Whether the network is still trained in float."""
        return None if self.begun is None else tf.logical_not(self.begun.read_value())


class Steps(NamedTuple):
    """The moments as global steps; None for one that needs no waiting."""

    begin: Optional[int]
    end: Optional[int]


def window_steps(begin: Moment, end: Moment, train_steps: Optional[int]) -> Steps:
    """The global steps of two moments.

    Args:
        begin, end: global steps (int) or parts of the training (float in [0, 1], with ``train_steps``).
        train_steps: how many steps the whole training takes, where it is known.

    Raises:
        TypeError, ValueError: no moments; parts of a training of unknown length; a begin behind its end.
    """
    check_window(begin, end)
    for name, moment, trivial in (("begin", begin, 0.0), ("end", end, 1.0)):
        if isinstance(moment, float) and moment != trivial and train_steps is None:
            raise ValueError("{}={!r} is a part of the training, whose length a session does not know: give "
                             "train_steps, or a global step".format(name, moment))
    first = step_of(begin, train_steps or 0)
    if train_steps is not None and first and first >= train_steps:
        raise ValueError("begin={!r} is global step {}, and training ends with step {}: quantization would never "
                         "begin".format(begin, first, train_steps))
    last = None if isinstance(end, float) and end == 1.0 else step_of(end, train_steps or 0)
    return Steps(first or None, last)


def ask_window(graph: tf.Graph, steps: Steps) -> None:
    """Let the next quantizer of ``graph`` wait for these steps."""
    setattr(graph, _ASKED, steps)


def make_window(graph: tf.Graph, beside: tf.Tensor) -> Window:
    """The window that was asked for, with variables on the device of the variable behind ``beside``."""
    steps: Steps = getattr(graph, _ASKED, Steps(None, None))
    setattr(graph, _ASKED, Steps(None, None))
    with tf.name_scope(SCOPE + "/window/"):
        return Window(None if steps.begin is None else make_variable("begun", np.array(False), beside),
                      None if steps.end is None else make_variable("frozen", np.array(False), beside))


class Freezer:
    """Holds learned scales where they are, whatever an optimizer still does to them: momentum, for one, goes on.

    Every update is followed by an assignment of the held value, inside the training step and before the global step is
    counted, so each checkpoint holds what training used.

    Args:
        graph: with its optimizer, not finalized.
        frozen: bool variable; whether the scales are held.

    Raises:
        RuntimeError: no operation trains the scales and then counts the global step.
    """

    def __init__(self, graph: tf.Graph, frozen: Any) -> None:
        updates = find_updates(graph)
        learned = {variable.op.name: variable for variable in graph.get_collection(COLLECTION)
                   if variable.op.name in updates}
        with tf.name_scope(SCOPE + "/window/hold/"):
            held = {name: make_variable(name, np.zeros(variable.shape.as_list(), np.float32), variable.op.outputs[0])
                    for name, variable in learned.items()}
            takes = [tf.assign(held[name], variable.read_value()) for name, variable in learned.items()]
            with tf.control_dependencies(takes):
                self.freeze = tf.assign(frozen, True).op  #: takes the scales as they are and holds them from now on
            if not learned:
                return
            count = counting_operation(graph, set(learned), updates)
            before = everything_before(count)
            moved = [updates[name].op for name in sorted(learned) if updates[name].op.name in before]
            with tf.control_dependencies(moved):
                done = tf.cond(frozen.read_value(), lambda: _restore(learned, held), lambda: tf.constant(True))
        count._add_control_inputs([done.op])  # TensorFlow has no public way to add a control edge


class Keeper:
    """Sets the variables of a window when their steps have come; part of a hook.

    Args:
        graph: of the session.
        window: of the quantizer.
        steps: the moments.
    """

    def __init__(self, graph: tf.Graph, window: Window, steps: Steps) -> None:
        self._graph = graph
        self._window = window
        self._steps = steps
        self._settled = False
        self._read: Dict[str, Any] = {}
        self._begin: Any = None
        self._freeze: Any = None

    def build(self) -> None:
        """Add what sets the variables to the graph, once it has its optimizer.

        Raises:
            RuntimeError: there is no global step; nothing trains the scales and counts it.
        """
        if self._window == Window():
            return
        step = tf.train.get_global_step(self._graph)
        if step is None:
            raise RuntimeError("begin and end are global steps, and the graph has none: call "
                               "tf.train.get_or_create_global_step() and give it to the optimizer")
        self._read = {"step": step.read_value()}
        with tf.name_scope(SCOPE + "/window/"):
            if self._window.begun is not None:
                self._read["begun"] = self._window.begun.read_value()
                self._begin = tf.assign(self._window.begun, True).op
            if self._window.frozen is not None:
                self._read["frozen"] = self._window.frozen.read_value()
                self._freeze = Freezer(self._graph, self._window.frozen).freeze

    def restart(self) -> None:
        """A session begins, perhaps at an earlier step than the last one ended."""
        self._settled = False

    def advance(self, session: tf.Session, ready: Callable[[tf.Session], bool]) -> None:
        """Between two steps: begin, or freeze what is ready to be frozen, if it is time."""
        if self._settled or not self._read:
            return
        now = session.run(self._read)
        begun, frozen = now.get("begun", True), now.get("frozen", True)
        if not begun and now["step"] >= (self._steps.begin or 0):
            session.run(self._begin)
            logger.info("the network is quantized from global step %d on", now["step"])
            begun = True
        elif begun and not frozen and now["step"] >= (self._steps.end or 0) and ready(session):
            session.run(self._freeze)
            logger.info("scales stay as they are from global step %d on", now["step"])
            frozen = True
        self._settled = bool(begun and frozen)


def _restore(learned: Dict[str, Any], held: Dict[str, Any]) -> tf.Tensor:
    restored: List[Any] = [tf.assign(variable, held[name].read_value()) for name, variable in learned.items()]
    with tf.control_dependencies(restored):
        return tf.constant(True)
