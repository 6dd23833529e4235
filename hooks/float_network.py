"""A float network that is trained in a graph, and its files: a frozen inference graph and MNN's parameter file."""
from __future__ import annotations

import logging
import os
import tempfile
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import replace_all
from slimtrain.hooks.export import float_graph
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.operations import Network, read_network
from slimtrain.hooks.stacking import contributed
from slimtrain.hooks.strip import is_quantized
from slimtrain.proto import save_algorithm, save_parameterless

logger = logging.getLogger(__name__)


class FloatNetwork(NamedTuple):
    """A network as it is in the graph now, before anything else edits it."""

    clean: Any           #: GraphDef
    network: Network
    outputs: Tuple[str, ...]

    @classmethod
    def read(cls, graph: tf.Graph, output_names: Sequence[str]) -> FloatNetwork:
        """Take the network that leads to some outputs.

        Raises:
            ValueError: an output that does not exist.
            TypeError: one string in the place of several.
        """
        if isinstance(output_names, str):
            raise TypeError("output_names must be a sequence of names, got the string {!r}".format(output_names))
        with graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
            network = read_network(graph, output_names)
        return cls(graph.as_graph_def(), network, tuple(output_names))

    def frozen(self, session: tf.Session) -> Any:
        """The GraphDef that computes the network at inference, its variables constants of the same names.

        Raises:
            ConversionError: a part of the graph has no inference form.
        """
        return float_graph(session, self.clean, self.network, self.outputs)

    def export(self, stem: str, session: tf.Session) -> None:
        """Write ``stem.pb`` and ``stem.compress_params.bin``, both or none; neither graph nor session is changed.

        Raises:
            ConversionError: as :meth:`frozen`.
        """
        frozen = self.frozen(session)
        with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
            path = os.path.join(folder, "params.bin")
            save_parameterless(path, append=False)
            for algorithm in contributed(session.graph, session):
                save_algorithm(path, algorithm, append=True)
            with open(path, "rb") as file:
                replace_all([(stem + ".pb", frozen.SerializeToString(deterministic=True)),
                             (stem + ".compress_params.bin", file.read())])


class FloatHook(ExportingHook):
    """Base of the hooks whose result is a float model. Where the graph is quantized too, the quantizer exports.

    Args:
        graph: of the session, with all edits of this hook.
        export_dir, output_names, is_chief: see :class:`ExportingHook`.
    """

    def __init__(self, graph: tf.Graph, export_dir: Optional[str], output_names: Optional[Sequence[str]],
                 is_chief: bool) -> None:
        super().__init__(graph, export_dir, output_names, is_chief)
        self._network = FloatNetwork.read(graph, output_names) if output_names else None

    def begin(self) -> None:
        """Make sure that the session is going to run the graph that this hook was made for."""
        super().begin()
        if self._exports and is_quantized(self.graph):
            logger.info("the graph is quantized too: the quantizer exports, %s does not", type(self).__name__)
            self._exports = False

    def ready(self, session: tf.Session) -> bool:
        """Float weights can be exported at any time."""
        return True

    def export(self, stem: str, session: tf.Session) -> None:
        """Write ``stem.pb`` and ``stem.compress_params.bin``.

        Raises:
            ValueError: the hook was given no ``output_names``.
            ConversionError: a part of the graph has no inference form.
        """
        if self._network is None:
            raise ValueError("export needs output_names: give them to the constructor of the hook")
        self._network.export(stem, session)
