"""From a session that prunes to files: a frozen inference graph and the parameters that MNN's converter reads."""
from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import replace_all
from slimtrain.hooks.export import float_graph, params_bytes
from slimtrain.hooks.operations import Network, read_network
from slimtrain.hooks.pruner import Pruner
from slimtrain.hooks.stacking import contributed


class PrunedNetwork(NamedTuple):
    """A network as it was built, before anything else edits its graph."""

    clean: Any           #: GraphDef
    network: Network
    outputs: Tuple[str, ...]

    @classmethod
    def read(cls, graph: tf.Graph, output_names: Sequence[str]) -> PrunedNetwork:
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


def export_pruned(stem: str, session: tf.Session, pruner: Pruner, network: PrunedNetwork) -> None:
    """Write ``stem.pb`` and ``stem.compress_params.bin``, and ``stem.channels.json`` for pruned channels; all or none.

    Channels that were pruned are not in ``stem.pb`` any more. The training graph is not touched.

    Args:
        stem: path without suffix.
        session: holds the pruned variables.
        pruner: after its first event.
        network: what to export.

    Raises:
        ConversionError: a part of the graph has no inference form, or depends on a number of channels.
    """
    frozen = float_graph(session, network.clean, network.network, network.outputs)
    params = params_bytes(contributed(session.graph, session))
    files: List[Tuple[str, bytes]] = [(stem + ".compress_params.bin", params)]
    frozen, plan = pruner.deployable(frozen, session, network.outputs)
    if plan:
        files.append((stem + ".channels.json", plan.encode("utf-8")))
    replace_all(files + [(stem + ".pb", frozen.SerializeToString(deterministic=True))])
