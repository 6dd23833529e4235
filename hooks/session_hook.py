"""A quantizer inside ``tf.train.MonitoredTrainingSession``: the life cycle shared by all quantizer hooks.

Whatever must survive is a variable of the graph, so the session's own saver keeps it.
"""
from __future__ import annotations

import logging
from typing import Any, Dict, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.quantizer import GraphQuantizer
from slimtrain.hooks.reporting import coverage_text, follow
from slimtrain.hooks.training_runs import TrainingRuns
from slimtrain.hooks.window import Keeper, Steps, Window
from slimtrain.proto.conversion_report import LayerNote

logger = logging.getLogger(__name__)


class QuantizerHook(ExportingHook):
    """Trains with a quantizer, and exports with every checkpoint and at the end.

    Give it to ``hooks=`` of ``MonitoredTrainingSession`` on every worker.

    Args:
        quantizer: made from the same graph, before the optimizer.
        export_dir: where the files go; None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        is_chief: whether this process exports and takes decisions, as given to the session.
        steps: when quantization begins, and from when on scales stay as they are.

    Raises:
        ValueError: ``export_dir`` without ``output_names``.
    """

    def __init__(self, quantizer: GraphQuantizer, export_dir: Optional[str], output_names: Optional[Sequence[str]],
                 is_chief: bool, steps: Steps) -> None:
        super().__init__(quantizer.graph, export_dir, output_names, is_chief)
        self.quantizer = quantizer
        self._keeper = Keeper(quantizer.graph, quantizer.window, steps)
        self._runs = TrainingRuns(quantizer.graph)
        follow(quantizer.graph, quantizer.followed())

    @property
    def is_training(self) -> tf.Tensor:
        """The quantizer's training state. A placeholder is fed, unless a run does it: True if the run trains."""
        return self.quantizer.is_training

    def followed(self) -> Dict[str, Any]:
        """The scale of every activation."""
        return {name: value for name, value in self.quantizer.followed().items()
                if not name.endswith(("_bits", "/weight_scale")) and name not in Window._fields}

    def layer_notes(self, session: tf.Session) -> Dict[str, LayerNote]:
        """The bits of each layer, or why it is float."""
        bits = self.quantizer.bits
        narrow = "trained on {}-bit weights, {}-bit activations".format(bits.weight, bits.activation)
        return {row.name: LayerNote(0.0, row.reason or narrow) for row in self.quantizer.coverage().layers}

    def ready(self, session: tf.Session) -> bool:
        """Whether every scale has been set."""
        return self.quantizer.ready(session)

    def begin(self) -> None:
        """Make sure that the session runs this graph, and add what sets the moments.

        Raises:
            RuntimeError: another graph; no operation trains the scales and counts the global step, which ``begin`` and
                ``end`` need.
        """
        super().begin()
        self._keeper.build()

    def after_create_session(self, session: tf.Session, coord: Any) -> None:
        """A session may begin anywhere in the training."""
        self._keeper.restart()

    def export(self, stem: str, session: tf.Session) -> None:
        """Write ``stem.pb`` and ``stem.compress_params.bin``."""
        self.quantizer.export(stem, session)

    def end(self, session: tf.Session) -> None:
        """Export the trained network, and say of each layer what became of it."""
        super().end(session)
        if self._is_chief:
            coverage = self.quantizer.coverage()
            logger.info("%.1f %% of the weights are int8\n%s", 100 * coverage.fraction, coverage_text(coverage))

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written, take the decisions of the last step, and feed the state."""
        super().before_run(run_context)
        if self._is_chief:
            self._keeper.advance(run_context.session, self.ready)
            self.quantizer.update(run_context.session)
        return self._runs.feed(run_context, self.is_training)
