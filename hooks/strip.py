"""The way of the seed's guide: strip the live graph, then freeze it in the session that trained it.

The session keeps running the quantized graph, but a ``GraphDef`` taken after the strip shows the float one: with
weights on their grid, matrix products as 1x1 convolutions and safe poolings if ``save_compress_params`` was called
before, and otherwise the plain float network.
"""
from __future__ import annotations

import logging
from typing import Any, List, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.grids import put_on_grid
from slimtrain.hooks.insertion import SUMS, can_change_result, is_inserted, is_ours, pass_through, strip
from slimtrain.hooks.rewriting import Rewriting, add_float_operations, add_layers, redirect
from slimtrain.hooks.state import COLLECTION

logger = logging.getLogger(__name__)

#: name of the placeholder that tells training from testing
STATE_PLACEHOLDER = "MNN_QAT_is_training"
_DEPLOYED = "_slimtrain_deployed"


def get_qat_state_placeholder(graph: Optional[tf.Graph] = None) -> tf.Tensor:
    """The tensor to feed with True in training and False in tests, found by name.

    Raises:
        ValueError: the graph is not quantized.
    """
    graph = graph if graph is not None else tf.get_default_graph()
    try:
        return graph.get_tensor_by_name(STATE_PLACEHOLDER + ":0")
    except KeyError as error:
        raise ValueError("the graph has no quantizer: construct one, or import the graph of a quantized run") from error


def is_quantized(graph: tf.Graph) -> bool:
    """Whether a quantizer has edited ``graph``."""
    return any(op.name == STATE_PLACEHOLDER or is_inserted(op.name) for op in graph.get_operations())


def MNN_QAT_variables() -> List[Any]:  # noqa: N802 - the name of the seed's interface
    """The variables that quantization added to the default graph."""
    return list(tf.get_collection(COLLECTION))


def strip_MNN_QAT_ops(graph: tf.Graph) -> None:  # noqa: N802 - the name of the seed's interface
    """Take the quantization off ``graph``, so that a ``GraphDef`` taken next is the one to deploy.

    Raises:
        RuntimeError: the graph is finalized: export it with a hook or with ``export`` instead.
        TypeError: ``graph`` is not a ``tf.Graph``.
    """
    if not isinstance(graph, tf.Graph):
        raise TypeError("graph must be a tf.Graph, got {}".format(type(graph).__name__))
    if graph.finalized:
        raise RuntimeError("a finalized graph cannot be stripped: use export of the quantizer or of its hook")
    strip(graph)
    rewriting = getattr(graph, _DEPLOYED, None)
    if rewriting is None:
        logger.warning("the stripped graph holds plain float weights, which MNN rounds by itself; matrix products with "
                       "65536 weights or more, or followed by an activation, stay float: call save_compress_params "
                       "first, or use export")
        return
    put_on_grid(graph, rewriting.grids)
    layers = add_layers(graph, rewriting.deployed)
    ends = [name for name in layers if _is_end(graph.get_tensor_by_name(name), rewriting.network.outputs)]
    redirect(graph, {**add_float_operations(graph, rewriting), **layers})
    with graph.as_default():
        for name, value in layers.items():
            tensor = graph.get_tensor_by_name(name)
            if can_change_result(tensor):
                # for whoever freezes by this name; the converter would pull a plain sum into the convolution
                pass_through(tensor, value * 2.0 * 0.5 if tensor.op.type in SUMS else value)
            elif name in ends:
                logger.warning("frozen by the name %s, its layer stays float: use export, or name what follows it (an "
                               "identity, a softmax)", tensor.op.name)


def _is_end(tensor: tf.Tensor, outputs: Sequence[str]) -> bool:
    return tensor.name in outputs or not [op for op in tensor.consumers() if not is_ours(op.name)]


def remember_deployed(graph: tf.Graph, rewriting: Rewriting) -> None:
    """Keep what was last saved with the graph it belongs to, for the strip that follows."""
    setattr(graph, _DEPLOYED, rewriting)
