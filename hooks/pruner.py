"""What all pruners of a TensorFlow graph share: scores, pruning events, weights that stay at zero.

What survives is a variable of the graph, so every checkpoint holds it. A decision is one numpy function of the graph;
it is made in the run in which it is due, before that run's weights are set to zero.
"""
from __future__ import annotations

import logging
import os
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    OVERALL,
    PruningSchedule,
    Ramp,
    load_sensitivity,
    read_prune_ratios,
    sparsity_of,
    write_prune_ratios,
)
from slimtrain.hooks.pruning_layers import LayerSparsity, PrunableWeight, PrunableWeights
from slimtrain.hooks.state import make_variable
from slimtrain.proto import PruneType, prune_algorithm, save_algorithm

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]
Keeps = Dict[str, np.ndarray]

#: scope of every operation that pruning added
SCOPE = "MNN_PRUNE"


class Pruner:
    """Prunes the weights whose absence the loss notices least.

    Construct it after the model and before a quantizer; the graph may have gradients and sessions already.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote; None where a hook measures by itself.
        graph: the graph; None for the default graph.
        sparsity: share of the prunable weights to prune in the end, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of ratios by weight name, as an earlier run wrote it; weights it names get these ratios.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: calls of ``do_pruning`` without pruning between two events.
        max_prune_ratio: no layer loses a larger share.
        prune_ratio_result_file: where the ratios found are written, as ``config_file`` takes them; "" for no file.
        found: the weights that can be pruned.
        ramp: how sparsity grows from event to event.

    Raises:
        TypeError: ``ramp`` is not a Ramp.
        ValueError: bad numbers or names; a file that holds no sensitivities, or those of another graph.
        RuntimeError: the graph is finalized.
        OSError: a file cannot be read.
    """

    prune_type: PruneType

    def __init__(self, sensitivity_npy_file: Optional[PathLike], graph: tf.Graph, sparsity: float,
                 total_pruning_iterations: int, config_file: Optional[PathLike], debug_info: bool,
                 prune_finetune_iterations: int, max_prune_ratio: float, prune_ratio_result_file: PathLike, *,
                 found: PrunableWeights, ramp: Ramp) -> None:
        self.graph = graph
        self.schedule = make_schedule(sparsity, total_pruning_iterations, prune_finetune_iterations, max_prune_ratio,
                                      ramp)
        self.found = found
        self.weights: Dict[str, PrunableWeight] = found.weights
        self._config = read_prune_ratios(config_file, list(self.weights)) if config_file else {}
        self._max_prune_ratio = max_prune_ratio
        self._result_file = prune_ratio_result_file
        self._debug = debug_info
        self.given_scores = None if sensitivity_npy_file is None else self._read_scores(sensitivity_npy_file)
        with graph.as_default(), tf.name_scope(None), tf.control_dependencies(None):
            self.keeps = {name: self._variable(name, "keep", variable, tf.ones(variable.shape, tf.float32))
                          for name, variable in self._masked().items()}
            first = next(iter(self.weights.values())).variable
            self.events = make_variable(SCOPE + "/events", np.array(0, np.int64), first, collections=())
            self.sparsity = make_variable(SCOPE + "/sparsity", np.array(0, np.float32), first, collections=())
            self._calls = make_variable(SCOPE + "/calls", np.array(0, np.int64), first, collections=())
            mine = list(self.keeps.values()) + [self.events, self.sparsity, self._calls]
            self._started = tf.reduce_all(tf.stack([tf.is_variable_initialized(variable) for variable in mine]))
            self._start = tf.variables_initializer(mine)
            self._ops = self._object_operations()

    # -- what an algorithm does

    def _masked(self) -> Dict[str, Any]:
        """The variables that lose values, by name; the prunable weights first."""
        return {name: weight.variable for name, weight in self.weights.items()}

    def score_shape(self, weight: PrunableWeight) -> List[int]:
        """The shape in which the sensitivities of a weight are kept."""
        return list(weight.variable.shape.as_list())

    def score(self, weight: PrunableWeight, product: tf.Tensor) -> tf.Tensor:
        """The sensitivities of a weight from ``w * dL/dw`` in its own shape."""
        return tf.abs(product)

    def score_values(self, weight: PrunableWeight, saved: np.ndarray) -> np.ndarray:
        """The same from the means of ``|w * dL/dw|`` that a file holds."""
        return saved

    def decide(self, scores: Mapping[str, np.ndarray], alive: Optional[Keeps], fraction: float) -> Keeps:
        """Keep-masks of all masked variables at a fraction of the final sparsity.

        Args:
            scores: by weight, as :meth:`score` gives them.
            alive: the masks so far; None before the first event.
            fraction: in (0, 1].
        """
        raise NotImplementedError

    def ratios(self, keeps: Keeps) -> Dict[str, float]:
        """The share of each weight that is pruned, as ``config_file`` takes it, and of all of them together."""
        return self._zero_shares(keeps)

    # -- the seed's interface

    def do_pruning(self, sess: tf.Session) -> None:
        """Call after every training step: prunes when it is time, and keeps zeros zero.

        Raises:
            RuntimeError: the session is of another graph, or there are no sensitivities.
        """
        self._check_session(sess)
        if self.given_scores is None:
            raise RuntimeError("do_pruning needs a sensitivity_npy_file; without one a hook measures by itself")
        self._initialize(sess)
        event = self.schedule.event_at(int(sess.run(self._calls)))
        if event is not None:
            sess.run(self._ops["decide"], {self._ops["event"]: event + 1})
        sess.run(self._ops["apply"])

    def save_compress_params(self, filename: PathLike, sess: tf.Session, append: bool = False) -> None:
        """Write the pruning parameters that MNN's converter reads.

        Args:
            filename: the parameter file.
            sess: holds the pruned variables.
            append: keep the other algorithms that the file holds already.

        Raises:
            RuntimeError: another graph's session, or nothing has been pruned yet.
            ParameterFileError: nothing to append to, or an unreadable file.
        """
        algorithm = self.algorithm(sess)
        if algorithm is None:
            raise RuntimeError("nothing has been pruned yet: the first pruning event is at step %d"
                               % (self.schedule.begin_step + 1))
        save_algorithm(filename, algorithm, append)

    def current_prune_ratios(self, sess: tf.Session) -> Dict[str, float]:
        """The share of zeros by weight name, and over all of them under ``overall_prune_ratio``."""
        return self._zero_shares(self.read_keeps(sess))

    def report(self, sess: tf.Session) -> List[LayerSparsity]:
        """Each layer with weights, its share of zeros, and why it has none if it was left alone."""
        ratios = self.current_prune_ratios(sess)
        pruned = {weight.layer.name: name for name, weight in self.weights.items()}
        shared = {weight.layer.kernel.name: name for name, weight in self.weights.items()}
        rows = []
        for name, layer in self.found.layers.items():
            weight = pruned.get(name) or shared.get(layer.kernel.name)
            rows.append(LayerSparsity(name, layer.parameters, ratios[weight] if weight else 0.0,
                                      self.found.left.get(name, "")))
        return rows

    # -- the parts, for hooks

    def candidates(self) -> Collection[str]:
        """The weights that can lose something by themselves."""
        return list(self.weights)

    def needing(self, name: str) -> List[str]:
        """The weights that can only be pruned if zeros in one masked variable can be kept."""
        return [name]

    def leave(self, name: str, reason: str) -> None:
        """Do not prune a weight whose zeros could not be kept, or of which nothing is known; the report says why."""
        logger.warning("%s stays dense: %s", name, reason)
        self.found.left[self.weights[name].layer.name] = reason
        if self.given_scores is not None:
            self.given_scores.pop(name, None)

    def algorithm(self, sess: tf.Session) -> Optional[Any]:
        """The ``CompressionAlgo`` of what is pruned; None before the first event."""
        self._check_session(sess)
        self._initialize(sess)
        if not sess.run(self.events):
            return None
        ratios = self.current_prune_ratios(sess)
        names = list(self.weights)
        blocks = [4] * len(names) if self.prune_type is PruneType.SIMD_OC else []
        return prune_algorithm(self.prune_type, names, [ratios[name] for name in names],
                               [weight.layer.name for weight in self.weights.values()], blocks)

    def read_keeps(self, sess: tf.Session) -> Keeps:
        """The masks, bool, in the layout of their variables."""
        self._check_session(sess)
        self._initialize(sess)
        return {name: value > 0 for name, value in sess.run(self.keeps).items()}

    def zero(self, name: str) -> tf.Operation:
        """Set the pruned values of one variable to zero, NaN and infinity too."""
        variable = self._masked()[name]
        with tf.device(variable.device):
            return tf.assign(variable, tf.math.multiply_no_nan(variable.read_value(), self.keeps[name].read_value())).op

    def decision(self, events: tf.Tensor, scores: Mapping[str, tf.Tensor], device: str) -> tf.Operation:
        """Take the decision of the last of ``events`` events, and remember it.

        Args:
            events: int64, how many events are over afterwards.
            scores: by weight; empty where they were given.
            device: of this process, which runs the numpy function.
        """
        masks, weights = list(self.keeps), list(scores)

        def choose(due: np.ndarray, before: np.ndarray, *arrays: np.ndarray) -> List[np.ndarray]:
            measured = dict(zip(weights, arrays)) or self.given_scores
            alive = {name: values > 0 for name, values in zip(masks, arrays[len(weights):])} if before else None
            keeps = self._decide_event(int(due) - 1, measured, alive)
            overall = np.array(self._zero_shares(keeps)[OVERALL], np.float32)
            # numpy converts bytes in a fraction of the time of bools
            return [overall] + [keeps[name].view(np.uint8).astype(np.float32) for name in masks]

        inputs = [events, self.events.read_value()] + [scores[name] for name in weights]
        with tf.device(device):
            overall, *found = tf.numpy_function(choose, inputs + [self.keeps[name].read_value() for name in masks],
                                                [tf.float32] * (len(masks) + 1))
        changes = [tf.assign(self.keeps[name], tf.reshape(value, self.keeps[name].shape))
                   for name, value in zip(masks, found)]
        changes.append(tf.assign(self.sparsity, tf.reshape(overall, [])))
        changes.append(tf.assign(self.events, events))
        return tf.group(*changes)

    def deployable(self, frozen: Any, sess: tf.Session, outputs: Sequence[str]) -> Tuple[Any, str]:
        """What is deployed of a frozen GraphDef of the network, and a plan of what was taken out of it (or "")."""
        return frozen, ""

    # -- inside

    def _zero_shares(self, keeps: Keeps) -> Dict[str, float]:
        ratios = {name: sparsity_of({name: keeps[name]}) for name in self.weights}
        ratios[OVERALL] = sparsity_of({name: keeps[name] for name in self.weights})
        return ratios

    def _decide_event(self, event: int, scores: Any, alive: Optional[Keeps]) -> Keeps:
        keeps = self.decide(scores, alive, self.schedule.fraction(event))
        if self._debug:
            for name, ratio in self.ratios(keeps).items():
                logger.info("pruning %d of %d, %s: %.4f", event + 1, self.schedule.events, name, ratio)
        last = event + 1 == self.schedule.events
        if self._result_file and (last or alive is None):
            # at the first event, those that the full sparsity would have
            write_prune_ratios(self._result_file, self.ratios(keeps if last else self.decide(scores, alive, 1.0)))
        return keeps

    def _read_scores(self, path: PathLike) -> Dict[str, np.ndarray]:
        measured = load_sensitivity(path)
        lost = [name for name, weight in self.weights.items()
                if name not in measured or list(measured[name].shape) != weight.variable.shape.as_list()]
        if lost:
            raise ValueError("%s holds no sensitivity of the shape of %s: it was measured on another graph, or on "
                             "variables that were not trained" % (os.fspath(path), ", ".join(lost)))
        return {name: self.score_values(weight, measured[name]) for name, weight in self.weights.items()}

    def _variable(self, name: str, kind: str, beside: Any, value: Any) -> Any:
        return make_variable("{}/{}/{}".format(SCOPE, name, kind), value, beside, collections=())

    def _object_operations(self) -> Dict[str, Any]:
        if self.given_scores is None:
            return {}
        layer = next(iter(self.weights.values())).layer
        with tf.name_scope(SCOPE + "/object/"):
            event = tf.placeholder(tf.int64, [], name="event")
            with tf.control_dependencies([self.zero(name) for name in self.keeps]):
                apply = tf.assign_add(self._calls, np.int64(1)).op
            return {"event": event, "decide": self.decision(event, {}, layer.op.device), "apply": apply}

    def _initialize(self, sess: tf.Session) -> None:
        """Start the pruner's variables where neither an initializer nor a checkpoint did, as in a plain session."""
        if not sess.run(self._started):
            sess.run(self._start)

    def _check_session(self, sess: tf.Session) -> None:
        if getattr(sess, "graph", None) is not self.graph:
            raise RuntimeError("the session is not of the graph that is pruned")


def make_schedule(sparsity: float, events: int, finetune: int, max_prune_ratio: float, ramp: Ramp) -> PruningSchedule:
    """The schedule of a plain loop, in calls of ``do_pruning``.

    Raises:
        ValueError, TypeError: numbers out of range.
    """
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
    if sparsity > max_prune_ratio:
        raise ValueError("a sparsity of %r cannot be reached when no layer loses more than max_prune_ratio=%r" %
                         (sparsity, max_prune_ratio))
    if isinstance(finetune, bool) or not isinstance(finetune, int) or finetune < 0:
        raise ValueError("prune_finetune_iterations must be an integer of at least 0, got %r" % (finetune,))
    return PruningSchedule(sparsity, events, finetune + 1, 0, ramp)
