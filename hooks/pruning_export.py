"""From a session that prunes to files: a frozen inference graph and the parameters that MNN's converter reads."""
from __future__ import annotations

from typing import List, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import replace_all
from slimtrain.hooks.export import params_bytes
from slimtrain.hooks.float_network import FloatNetwork
from slimtrain.hooks.pruner import Pruner
from slimtrain.hooks.stacking import contributed


def export_pruned(stem: str, session: tf.Session, pruner: Pruner, network: FloatNetwork) -> None:
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
    frozen = network.frozen(session)
    params = params_bytes(contributed(session.graph, session))
    files: List[Tuple[str, bytes]] = [(stem + ".compress_params.bin", params)]
    frozen, plan = pruner.deployable(frozen, session, network.outputs)
    if plan:
        files.append((stem + ".channels.json", plan.encode("utf-8")))
    replace_all(files + [(stem + ".pb", frozen.SerializeToString(deterministic=True))])
