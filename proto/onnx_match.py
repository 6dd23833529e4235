"""Finding the layers of a torch model in an ONNX file, by their weights."""
from __future__ import annotations

from enum import Enum
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import onnx

from slimtrain.core import SlimtrainError
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_graph import OnnxGraph, attribute

# an exporter that folds batch norm rounds each weight once more
_TOLERANCE = 1e-4


class Weight(Enum):
    """What a file holds as the weight of a layer."""

    TRAINED = "trained"
    FOLDED = "folded"    #: the exporter has folded the batch norm into it
    ON_GRID = "on grid"  #: the file has been rewritten before


class Match(NamedTuple):
    """A layer and the node that computes it."""

    layer: DeployedLayer
    node: onnx.NodeProto
    weight: Weight

    @property
    def needs_fold(self) -> bool:
        """Whether a batch norm still stands behind the node."""
        return self.layer.folds_batch_norm and self.weight is Weight.TRAINED


def match_layers(graph: OnnxGraph, layers: Sequence[DeployedLayer]) -> List[Match]:
    """Pair each use of a layer with its node, both in execution order.

    Raises:
        SlimtrainError: a layer's weights are not in the file: it was exported from other weights.
    """
    free = [node for node in graph.nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    matches = []
    for layer in layers:
        match = next((found for found in (_match(graph, layer, node) for node in free) if found is not None), None)
        if match is None:
            raise SlimtrainError(
                "the ONNX file holds no Conv, Gemm or MatMul with the weights of layer %r (shape %s): it was exported "
                "from another model or at another time than these scales" % (layer.name, layer.trained_weight.shape))
        free = [node for node in free if node is not match.node]
        matches.append(match)
    return matches


def node_weight(graph: OnnxGraph, node: onnx.NodeProto) -> Optional[np.ndarray]:
    """The constant weight of a node as [out, in / groups, ...]; None when it is computed."""
    weight = graph.constant(node.input[1])
    if weight is None or node.op_type == "Conv":
        return weight
    if weight.ndim != 2 or (node.op_type == "Gemm" and attribute(node, "transA", 0)):
        return None
    return weight if node.op_type == "Gemm" and attribute(node, "transB", 0) else weight.T


def bias_addition(graph: OnnxGraph, node: onnx.NodeProto,
                  channels: int) -> Optional[Tuple[onnx.NodeProto, np.ndarray]]:
    """The node that alone reads a MatMul and adds a constant bias to it, and that bias, float32 [channels]."""
    following = graph.only_consumer(node.output[0])
    if node.op_type != "MatMul" or following is None or following.op_type != "Add":
        return None
    value = next((found for found in map(graph.constant, following.input) if found is not None), None)
    if value is None or value.size != channels or value.shape[-1:] != (channels,):
        return None
    return following, value.reshape(-1).astype(np.float32)


def _match(graph: OnnxGraph, layer: DeployedLayer, node: onnx.NodeProto) -> Optional[Match]:
    weight = node_weight(graph, node)
    if weight is None or _without_ones(weight.shape) != _without_ones(layer.trained_weight.shape):
        return None
    found = weight.astype(np.float64).reshape(len(weight), -1)
    trained = layer.trained_weight.reshape(len(weight), -1)
    if _close(found, trained):
        # a batch norm with a factor close to one may have been folded without a trace in the weights
        folded = layer.folds_batch_norm and not _has_batch_norm(graph, node, len(weight))
        return Match(layer, node, Weight.FOLDED if folded else Weight.TRAINED)
    if _close(found, layer.weight.reshape(found.shape)):
        return Match(layer, node, Weight.ON_GRID)
    if layer.folds_batch_norm:
        squares = np.maximum((trained * trained).sum(axis=1), np.finfo(np.float64).tiny)
        factor = (found * trained).sum(axis=1) / squares
        if _close(found, trained * factor[:, None]):
            return Match(layer, node, Weight.FOLDED)
    return None


def _has_batch_norm(graph: OnnxGraph, node: onnx.NodeProto, channels: int) -> bool:
    addition = bias_addition(graph, node, channels)
    following = graph.only_consumer(node.output[0] if addition is None else addition[0].output[0])
    return following is not None and following.op_type == "BatchNormalization"


def _without_ones(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    """A shape as far as it tells a layer from others: a linear layer may stand as a 1x1 convolution."""
    return shape[:2] + tuple(size for size in shape[2:] if size != 1)


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    size = np.abs(found).max(axis=1) + np.abs(wanted).max(axis=1)
    return bool((np.abs(found - wanted).max(axis=1) <= _TOLERANCE * size).all())
