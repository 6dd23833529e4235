"""Cross-layer equalisation of an ONNX model: its chains of convolutions with at most a ReLU in between."""
from __future__ import annotations

import logging
from typing import List, Optional, Set

import numpy as np
import onnx

from slimtrain.core import equalize_chain
from slimtrain.proto.onnx_graph import OnnxGraph, attribute

logger = logging.getLogger(__name__)


def equalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """An equal model whose convolutions in a row share the ranges of their channels; ``model`` is left as it is.

    A chain ends at anything but a convolution, a depthwise convolution or a ReLU that alone reads what comes before
    it: a ReLU6 and a residual branch do not let a factor pass.
    """
    graph = OnnxGraph(model)
    taken: Set[str] = set()
    for node in list(graph.nodes):
        if node.output[0] in taken or not _is_link(graph, node):
            continue
        chain = _chain(graph, node)
        taken.update(str(link.output[0]) for link in chain)
        if len(chain) > 1:
            _equalize(graph, chain)
            logger.info("equalized %s", ", ".join(str(link.output[0]) for link in chain))
    return graph.model()


def _chain(graph: OnnxGraph, start: onnx.NodeProto) -> List[onnx.NodeProto]:
    chain = [start]
    while True:
        following = graph.only_consumer(chain[-1].output[0])
        if following is not None and following.op_type == "Relu":
            following = graph.only_consumer(following.output[0])
        if following is None or not _is_link(graph, following) or len(chain) > len(graph.nodes):
            return chain
        chain.append(following)


def _is_link(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    if node.op_type != "Conv":
        return False
    weight, shared = graph.constant(node.input[1]), graph.consumers.get(node.input[1], [])
    groups = int(attribute(node, "group", 1))
    if weight is None or len(shared) > 1 or (_bias(graph, node) is None and len(node.input) > 2 and node.input[2]):
        return False
    return groups == 1 or (groups == len(weight) and weight.shape[1] == 1)


def _bias(graph: OnnxGraph, node: onnx.NodeProto) -> Optional[np.ndarray]:
    return graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None


def _equalize(graph: OnnxGraph, chain: List[onnx.NodeProto]) -> None:
    weights = [graph.constant(node.input[1]) for node in chain]
    kept = [weight for weight in weights if weight is not None]
    result = equalize_chain(kept, [_bias(graph, node) for node in chain],
                            [int(attribute(node, "group", 1)) > 1 for node in chain])
    for node, weight, bias in zip(chain, result.weights, result.biases):
        node.input[1] = graph.add_constant(weight.astype(np.float32), node.input[1])
        if bias is not None:
            node.input[2] = graph.add_constant(bias.astype(np.float32), node.input[2])
    graph.refresh()
