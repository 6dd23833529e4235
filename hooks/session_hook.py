"""A quantizer inside ``tf.train.MonitoredTrainingSession``: the life cycle shared by all quantizer hooks.

Whatever must survive is a variable of the graph, so the session's own saver keeps it. The hook itself remembers only
which checkpoint it exported last.
"""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.quantizer import GraphQuantizer

logger = logging.getLogger(__name__)

#: name of the files of the last export, without suffix
FINAL_NAME = "model"


class QuantizerHook(tf.train.SessionRunHook):
    """Trains with a quantizer, and exports with every checkpoint and at the end.

    Give it to ``hooks=`` of ``MonitoredTrainingSession`` on every worker.

    Args:
        quantizer: made from the same graph, before the optimizer.
        export_dir: where the files go; None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError: ``export_dir`` without ``output_names``.
    """

    def __init__(self, quantizer: GraphQuantizer, export_dir: Optional[str], output_names: Optional[Sequence[str]],
                 is_chief: bool) -> None:
        if export_dir is not None and not output_names:
            raise ValueError("export_dir {!r} was given without output_names: name the tensors that leave the network"
                             .format(export_dir))
        self.quantizer = quantizer
        self._export_dir = export_dir
        self._exports = bool(output_names)
        self._is_chief = is_chief
        self._last_checkpoint = ""
        self._written: Dict[str, str] = {}

    @property
    def is_training(self) -> tf.Tensor:
        """The quantizer's training state. A placeholder is fed with True unless a run feeds it itself."""
        return self.quantizer.is_training

    def begin(self) -> None:
        """Make sure that the session is going to run the quantized graph.

        Raises:
            RuntimeError: it is another graph.
        """
        if tf.get_default_graph() is not self.quantizer.graph:
            raise RuntimeError("the session's graph is not the one that {} quantized: construct the hook in the graph "
                               "of the model".format(type(self).__name__))

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written, take the decisions of the last step, and feed the state."""
        session = run_context.session
        if self._is_chief:
            self._export_checkpoint(session)
            self.quantizer.update(session)
        state = self.is_training
        given = run_context.original_args.feed_dict or {}
        if state.op.type != "Placeholder" or any(getattr(key, "name", key) == state.name for key in given):
            return None
        return tf.train.SessionRunArgs(None, feed_dict={state: True})

    def end(self, session: tf.Session) -> None:
        """Export the trained network."""
        if not self._is_chief or not self._exports:
            return
        self._export_checkpoint(session)
        folder = self._export_dir or os.path.dirname(self._last_checkpoint)
        if not folder:
            logger.warning("nothing is exported: there is neither an export_dir nor a checkpoint folder")
        elif self.quantizer.ready(session):
            self._export(os.path.join(folder, FINAL_NAME), session)
        else:
            logger.warning("nothing is exported: not one training step was made")

    def _export_checkpoint(self, session: tf.Session) -> None:
        """Export beside the newest checkpoint, once.

        A saver saves after a step and before the next one, so now the variables are those of the checkpoint.
        """
        checkpoints = _checkpoints(self.quantizer.graph)
        if not self._exports or not checkpoints or checkpoints[-1] == self._last_checkpoint:
            return
        self._last_checkpoint = checkpoints[-1]
        if self.quantizer.ready(session):
            folder = self._export_dir or os.path.dirname(checkpoints[-1])
            stem = os.path.join(folder, os.path.basename(checkpoints[-1]))
            self._export(stem, session)
            self._written[checkpoints[-1]] = stem
        for gone in set(self._written) - set(checkpoints):
            _remove_export(self._written.pop(gone))

    def _export(self, stem: str, session: tf.Session) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
        self.quantizer.export(stem, session)
        logger.info("exported %s.pb and %s.compress_params.bin", stem, stem)


def _checkpoints(graph: tf.Graph) -> List[str]:
    """The checkpoints that the session's saver keeps, oldest first."""
    savers = graph.get_collection(tf.GraphKeys.SAVERS)
    return list(savers[0].last_checkpoints) if savers else []


def _remove_export(stem: str) -> None:
    """An export goes when the saver drops its checkpoint."""
    for suffix in (".pb", ".compress_params.bin"):
        if os.path.exists(stem + suffix):
            os.remove(stem + suffix)
