"""A hook that exports the network beside every checkpoint of a monitored session, and at the end.

The hook itself remembers only which checkpoint it exported last.
"""
from __future__ import annotations

import gc
import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.core import ChosenSpectrum
from slimtrain.proto import ConvertOptions
from slimtrain.proto.conversion_report import LayerNote, convert_command

logger = logging.getLogger(__name__)

#: name of the files of the last export, without suffix
FINAL_NAME = "model"
#: of all files that an export may consist of
_SUFFIXES = (".pb", ".compress_params.bin", ".channels.json")


class ExportingHook(tf.train.SessionRunHook):
    """Base of the hooks that export.

    Args:
        graph: of the session.
        export_dir: where the files go; None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        is_chief: whether this process exports, as given to the session.

    Raises:
        ValueError: ``export_dir`` without ``output_names``.
    """

    def __init__(self, graph: tf.Graph, export_dir: Optional[str], output_names: Optional[Sequence[str]],
                 is_chief: bool) -> None:
        if export_dir is not None and not output_names:
            raise ValueError("export_dir {!r} was given without output_names: name the tensors that leave the network"
                             .format(export_dir))
        self.graph = graph
        self.final_name = FINAL_NAME  #: of the files of the last export, without suffix
        self.exported = ""  #: path without suffix of the last export, once training has ended
        self._export_dir = export_dir
        self._exports = bool(output_names)
        self._is_chief = is_chief
        self._last_checkpoint = ""
        self._written: Dict[str, str] = {}
        self._savers: Optional[List[Any]] = None

    def ready(self, session: tf.Session) -> bool:
        """Whether there is something to export."""
        raise NotImplementedError

    def export(self, stem: str, session: tf.Session) -> None:
        """Write the files that begin with ``stem``."""
        raise NotImplementedError

    def followed(self) -> Dict[str, Any]:
        """What is worth watching in training: tensors and numbers by name."""
        return {}

    def layer_notes(self, session: tf.Session) -> Dict[str, LayerNote]:
        """What was done to each layer, by its name."""
        return {}

    def spectra(self) -> Dict[str, ChosenSpectrum]:
        """Singular values of each layer, and how many were kept."""
        return {}

    def convert_options(self) -> ConvertOptions:
        """What the exported model is converted with."""
        return ConvertOptions()

    def begin(self) -> None:
        """Make sure that the session is going to run the graph that this hook was made for.

        Raises:
            RuntimeError: it is another graph.
        """
        if tf.get_default_graph() is not self.graph:
            raise RuntimeError("the session's graph is not the one that {} was made for: construct the hook in the "
                               "graph of the model".format(type(self).__name__))

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written."""
        self.export_checkpoint(run_context.session)

    def end(self, session: tf.Session) -> None:
        """Export the trained network."""
        if not self._is_chief or not self._exports:
            return
        self.export_checkpoint(session)
        folder = self._export_dir or os.path.dirname(self._last_checkpoint)
        if not folder:
            logger.warning("nothing is exported: there is neither an export_dir nor a checkpoint folder")
        elif self.ready(session):
            stem = os.path.join(folder, self.final_name)
            self._export(stem, session)
            self.exported = stem
            logger.info("to convert it for MNN: %s", convert_command(
                stem + ".pb", stem + ".compress_params.bin", stem + ".mnn", self.convert_options()))
        else:
            logger.warning("nothing is exported by %s: it was not trained long enough", type(self).__name__)

    def export_checkpoint(self, session: tf.Session) -> None:
        """Export beside the newest checkpoint, once.

        A saver saves after a step and before the next one, so now the variables are those of the checkpoint.
        """
        checkpoints = self._checkpoints() if self._is_chief and self._exports else []
        if not checkpoints or checkpoints[-1] == self._last_checkpoint:
            return
        self._last_checkpoint = checkpoints[-1]
        if self.ready(session):
            folder = self._export_dir or os.path.dirname(checkpoints[-1])
            stem = os.path.join(folder, os.path.basename(checkpoints[-1]))
            self._export(stem, session)
            self._written[checkpoints[-1]] = stem
        for gone in set(self._written) - set(checkpoints):
            _remove_export(self._written.pop(gone))

    def _checkpoints(self) -> List[str]:
        """The checkpoints that the session's saver keeps, oldest first."""
        if self._savers is None:
            self._savers = _savers(self.graph)
        return max((list(saver.last_checkpoints) for saver in self._savers), key=len, default=[])

    def _export(self, stem: str, session: tf.Session) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
        self.export(stem, session)
        logger.info("exported %s.pb and %s.compress_params.bin", stem, stem)


def _savers(graph: tf.Graph) -> List[Any]:
    """The savers of ``graph``, that of its session among them."""
    collected = graph.get_collection(tf.GraphKeys.SAVERS)
    # A saver that the user gives to tf.train.Scaffold is in no collection, and nothing leads from a session to it.
    return collected[:1] or [candidate for candidate in gc.get_objects() if issubclass(type(candidate), tf.train.Saver)
                             and _graph_of(candidate) is graph]


def _graph_of(saver: Any) -> Optional[tf.Graph]:
    saved = saver._var_list or ()  # what a saver saves has no public getter
    return next((variable.graph for variable in (saved.values() if isinstance(saved, dict) else saved)
                 if hasattr(variable, "graph")), None)


def _remove_export(stem: str) -> None:
    """An export goes when the saver drops its checkpoint."""
    for suffix in _SUFFIXES:
        if os.path.exists(stem + suffix):
            os.remove(stem + suffix)
