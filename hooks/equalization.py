"""Cross-layer equalisation of a frozen graph: its chains of layers with at most a batch norm and a ReLU in between."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import ChainLayer, Op, equalizable_chains, equalize_chain, fold_factor
from slimtrain.hooks.batch_norm import FUSED, BatchNorm
from slimtrain.hooks.graph import Edge, connect
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.operations import Network, leaves, translate
from slimtrain.hooks.weight_fake_quant import core_order

logger = logging.getLogger(__name__)

_SCOPE = "slimtrain_equalized"


class _Link(NamedTuple):
    """A layer of a chain and the batch norm behind it."""

    layer: Layer
    norm: Optional[BatchNorm]


def equalize(graph: tf.Graph, network: Network, layers: Mapping[str, Layer]) -> None:
    """Let layers in a row trade the ranges of their channels; the graph computes what it did, but for rounding.

    Each layer gets constants of its own, so others that read the same weights keep theirs. A session that ran before
    does not see them.

    Args:
        graph: frozen, and changed.
        network: what it computes.
        layers: those that may change, by name.
    """
    ops = translate(graph, network, layers.values())
    chains = [[_Link(layers[each.layer], network.norms.get(each.batch_norm)) for each in chain]
              for chain in _chains(ops, network)]
    with tf.Session(graph=graph) as session:
        values = [session.run([_fetches(link) for link in chain]) for chain in chains]
    with graph.as_default(), tf.name_scope(None):
        for chain, numbers in zip(chains, values):
            _equalize(chain, numbers)
            logger.info("equalized %s", ", ".join(link.layer.name for link in chain))


def _chains(ops: Sequence[Op], network: Network) -> Sequence[Sequence[ChainLayer]]:
    def usable(link: ChainLayer) -> bool:
        norm = network.norms.get(link.batch_norm)
        return not link.batch_norm or (norm is not None and norm.output.op.type in FUSED and not norm.training)

    return equalizable_chains(ops, network.outputs or leaves(ops), usable)


def _fetches(link: _Link) -> Dict[str, tf.Tensor]:
    fetches = {"kernel": link.layer.kernel}
    if link.layer.bias is not None:
        fetches["bias"] = link.layer.bias
    if link.norm is not None:
        fetches.update(gamma=link.norm.gamma, beta=link.norm.beta, variance=link.norm.variance)
    return fetches


def _equalize(chain: Sequence[_Link], values: List[Dict[str, Any]]) -> None:
    depthwise = [link.layer.kind is LayerKind.DEPTHWISE for link in chain]
    weights = [np.transpose(numbers["kernel"], core_order(link.layer)).astype(np.float64)
               for link, numbers in zip(chain, values)]
    folded = [_folded(weight, link, numbers) for weight, link, numbers in zip(weights, chain, values)]
    factors = equalize_chain(folded, [None] * len(chain), depthwise).factors
    for index, (link, weight, numbers) in enumerate(zip(chain, weights, values)):
        read = factors[index - 1] if index else np.ones(1)
        made = factors[index] if index + 1 < len(chain) else np.ones(len(weight))
        columns = read.reshape((-1, 1) if depthwise[index] else (1, -1)) if index else read.reshape(1, 1)
        weight = weight * columns.reshape(columns.shape + (1,) * (weight.ndim - 2))
        if link.norm is None:
            weight = weight / made.reshape((-1,) + (1,) * (weight.ndim - 1))
            _divide_bias(link.layer, numbers, made)
        else:
            for position, name in ((1, "gamma"), (2, "beta")):
                _replace(link.norm.output.op, position, numbers[name] / made, link.layer.name + "/" + name)
        kernel = np.transpose(weight, np.argsort(core_order(link.layer)))
        _replace(link.layer.op, 1, kernel, link.layer.name + "/kernel")


def _folded(weight: np.ndarray, link: _Link, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weight that is deployed: with the batch norm behind it."""
    if link.norm is None:
        return weight
    factor = fold_factor(numbers["gamma"], numbers["variance"], link.norm.epsilon)
    return np.asarray(weight * factor.reshape((-1,) + (1,) * (weight.ndim - 1)))


def _divide_bias(layer: Layer, numbers: Mapping[str, np.ndarray], factor: np.ndarray) -> None:
    if layer.bias is None:
        return
    addition, bias = layer.linear.op, numbers["bias"]
    position = next(index for index, tensor in enumerate(addition.inputs) if tensor.name == layer.bias.name)
    _replace(addition, position, (bias.reshape(-1) / factor).reshape(bias.shape), layer.name + "/bias")


def _replace(op: tf.Operation, position: int, value: np.ndarray, name: str) -> None:
    constant = tf.constant(np.ascontiguousarray(value, np.float32), name="{}/{}".format(_SCOPE, name))
    connect([Edge(op, position)], constant)
