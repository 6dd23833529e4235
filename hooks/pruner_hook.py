"""A pruner inside ``tf.train.MonitoredTrainingSession``: the life cycle shared by all pruner hooks."""
from __future__ import annotations

import logging
from typing import Any, Dict, Optional, Sequence, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import PruningSchedule, schedule_between, step_of
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.float_network import FloatNetwork
from slimtrain.hooks.pruner import Pruner
from slimtrain.hooks.pruning_export import export_pruned
from slimtrain.hooks.pruning_step import add_to_step, make_sensors
from slimtrain.hooks.stacking import contribute
from slimtrain.hooks.strip import is_quantized
from slimtrain.proto import ConvertOptions
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)

Moment = Union[int, float, str]


class PrunerHook(ExportingHook):
    """Prunes in the training step, and exports with every checkpoint and at the end.

    Give it to ``hooks=`` of ``MonitoredTrainingSession`` on every worker. Where the graph is quantized too, the
    quantizer exports, and this hook adds its parameters to those files.

    Args:
        pruner: of the graph, without a file of sensitivities or with one.
        sensitivity_steps: steps whose gradients count for an event, where there is no file.
        begin, end: the first event, and the step by which the last is over: global steps (int) or parts of the training
            (float in [0, 1], with ``train_steps``).
        prune_finetune_iterations: steps without pruning between two events; None spreads them from begin to end.
        train_steps: how many steps the whole training takes.
        export_dir: where the files go; None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError: ``export_dir`` without ``output_names``, moments that cannot be told in steps, an end that is
            missing or too early.
    """

    def __init__(self, pruner: Pruner, sensitivity_steps: int, begin: Moment, end: Optional[Moment],
                 prune_finetune_iterations: Optional[int], train_steps: Optional[int], export_dir: Optional[str],
                 output_names: Optional[Sequence[str]], is_chief: bool) -> None:
        super().__init__(pruner.graph, export_dir, output_names, is_chief)
        if isinstance(sensitivity_steps, bool) or not isinstance(sensitivity_steps, int) or sensitivity_steps < 1:
            raise ValueError("sensitivity_steps must be an integer of at least 1, got %r" % (sensitivity_steps,))
        self.pruner = pruner
        self._window = sensitivity_steps
        self._sensors = make_sensors(pruner)
        first = 0 if self._sensors is None else sensitivity_steps - 1
        pruner.schedule = _schedule(pruner.schedule, first, begin, end, prune_finetune_iterations, train_steps)
        self._network = FloatNetwork.read(pruner.graph, output_names) if output_names else None
        self._quantized = False  # until the session begins
        contribute(pruner.graph, pruner.algorithm)

    def begin(self) -> None:
        """Add pruning to the training step.

        Raises:
            RuntimeError: another graph; no operation trains the weights and counts the global step.
        """
        super().begin()
        self._quantized = is_quantized(self.graph)
        add_to_step(self.pruner, self._sensors, self._window, self._is_chief)
        tf.summary.scalar("sparsity", self.pruner.sparsity.read_value())

    def followed(self) -> Dict[str, Any]:
        """The sparsity."""
        return {"sparsity": self.pruner.sparsity}

    def layer_notes(self, session: tf.Session) -> Dict[str, LayerNote]:
        """The sparsity of each layer, or why it was left."""
        return {row.name: LayerNote(row.ratio, row.reason or "pruned %.1f %%" % (100 * row.ratio))
                for row in self.pruner.report(session)}

    def convert_options(self) -> ConvertOptions:
        """Weights in 8 bits, zeros left out."""
        return ConvertOptions(weight_bits=8, sparse=True)

    def ready(self, session: tf.Session) -> bool:
        """Whether something was pruned."""
        return bool(session.run(self.pruner.events))

    def export(self, stem: str, session: tf.Session) -> None:
        """Write ``stem.pb``, ``stem.compress_params.bin`` and, for pruned channels, ``stem.channels.json``.

        Raises:
            ValueError: the hook was given no ``output_names``.
        """
        if self._network is None:
            raise ValueError("export needs output_names: give them to the constructor of the hook")
        export_pruned(stem, session, self.pruner, self._network)

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written."""
        if not self._quantized:
            super().before_run(run_context)

    def end(self, session: tf.Session) -> None:
        """Say what was pruned, and export it."""
        events, sparsity = session.run([self.pruner.events, self.pruner.sparsity])
        asked = self.pruner.schedule
        if events < asked.events:
            logger.warning("training ended before pruning did: the sparsity is %.4f, asked for was %.4f", sparsity,
                           asked.sparsity)
        for row in self.pruner.report(session):
            logger.info("%s: %d weights, %.4f pruned %s", row.name, row.parameters, row.ratio, row.reason)
        logger.info("pruned %.4f of the weights (asked for %.4f)", sparsity, asked.sparsity)
        if not self._quantized:
            super().end(session)


def _schedule(asked: PruningSchedule, first: int, begin: Moment, end: Optional[Moment],
              prune_finetune_iterations: Optional[int], train_steps: Optional[int]) -> PruningSchedule:
    if train_steps is None and (isinstance(begin, float) or isinstance(end, float)):
        raise ValueError("begin=%r and end=%r are parts of the training, whose length a session does not know: give "
                         "train_steps, or global steps" % (begin, end))
    total = train_steps or 0
    start = max(step_of(begin, total), first)
    if prune_finetune_iterations is not None:
        return PruningSchedule(asked.sparsity, asked.events, asked.interval, start, asked.ramp)
    if end is None:
        raise ValueError("prune_finetune_iterations=None spreads the events up to end, which is missing")
    return schedule_between(asked.sparsity, asked.events, start, step_of(end, total), asked.ramp)
