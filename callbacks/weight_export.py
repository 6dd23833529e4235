"""Writing trained low-bit weights into an ONNX file, so that MNN's converter stores exactly these integers."""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import onnx

from slimtrain.core import SlimtrainError, StoredWeight, WeightMode
from slimtrain.proto import WeightOnlyParams
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_match import node_weight

# an exporter that folds a batch norm rounds each weight once more
_TOLERANCE = 1e-5
# what the converter calls the operator that a matrix product becomes
_LINEAR_SUFFIX = "__matmul_converted"


class StoredLayer(NamedTuple):
    """A layer that is stored in few bits."""

    name: str
    weight: np.ndarray     #: float32 [O, I / groups, ...] as trained, to recognise it in a file
    stored: StoredWeight
    bits: int
    mode: WeightMode
    block_size: int        #: 0 for a scale per output channel
    groups: int


def write_stored(model: onnx.ModelProto,
                 layers: Sequence[StoredLayer]) -> Tuple[onnx.ModelProto, List[WeightOnlyParams]]:
    """Put the weights of a model onto their grids and name the operators that hold them.

    The grid is recomputed by the converter from the weights it finds: weights that lie on it come back unchanged, also
    after a batch norm has been folded into them.

    Args:
        model: exported from the model with its present weights; it is left as it is.
        layers: the layers to store.

    Raises:
        SlimtrainError: the weights of a layer are not in the file.
    """
    graph = OnnxGraph(model)
    uses: Dict[str, int] = {}
    params: List[WeightOnlyParams] = []
    for node in graph.nodes:
        weight = node_weight(graph, node) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        layer = None if weight is None else _layer_of(weight, layers, uses)
        if weight is None or layer is None:
            continue
        factor = _factor(weight, layer.weight)
        assert factor is not None
        values = layer.stored.values.reshape(len(weight), -1) * factor[:, None]
        _write(graph, node, values.astype(np.float32).reshape(weight.shape), layer.name)
        uses[layer.name] = uses.get(layer.name, 0) + 1
        params += _params(graph, node, layer, uses[layer.name])
    missing = [layer.name for layer in layers if layer.name not in uses]
    if missing:
        raise SlimtrainError("the ONNX file does not hold the weights of %s: it was exported from another model or at "
                             "another time" % ", ".join(map(repr, missing)))
    graph.refresh()
    return graph.model(), params


def _layer_of(weight: np.ndarray, layers: Sequence[StoredLayer], uses: Dict[str, int]) -> Optional[StoredLayer]:
    """The layer with these weights; of several (one weight per channel fits any) the first unused."""
    candidates = [layer for layer in layers if _factor(weight, layer.weight) is not None]
    unused = [layer for layer in candidates if layer.name not in uses]
    return next(iter(unused + candidates), None)


def _factor(found: np.ndarray, trained: np.ndarray) -> Optional[np.ndarray]:
    """What each channel of ``trained`` was multiplied with to give ``found``, float64 [O]; None if it was not."""
    if found.shape[:2] != trained.shape[:2] or found.size != trained.size:
        return None
    rows = found.reshape(len(found), -1).astype(np.float64)
    wanted = trained.reshape(len(found), -1).astype(np.float64)
    squares = (wanted * wanted).sum(axis=1)
    factor = np.where(squares > 0, (rows * wanted).sum(axis=1) / np.maximum(squares, np.finfo(float).tiny), 1.0)
    error = np.abs(rows - wanted * factor[:, None]).max(axis=1)
    if np.any(error > _TOLERANCE * np.abs(rows).max(axis=1)):
        return None
    exact = np.abs(rows - wanted).max(axis=1) <= _TOLERANCE * np.abs(wanted).max(axis=1)
    return np.where(exact, 1.0, factor)


def _write(graph: OnnxGraph, node: onnx.NodeProto, weight: np.ndarray, name: str) -> None:
    """Replace the weight of a node, given as [O, I / groups, ...]."""
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    node.input[1] = graph.add_constant(weight.T if transposed else weight, name + ".weight")


def _params(graph: OnnxGraph, node: onnx.NodeProto, layer: StoredLayer, use: int) -> List[WeightOnlyParams]:
    operator, name = str(node.output[0]), layer.name if use == 1 else "%s#%d" % (layer.name, use)
    following = graph.only_consumer(operator)
    if node.op_type == "MatMul" and following is not None and following.op_type == "Add":
        operator = str(following.output[0])
    names = [(name, operator if node.op_type == "Conv" else operator + _LINEAR_SUFFIX)]
    if layer.groups > 1 and layer.weight.shape[:2] != (layer.groups, 1):  # depthwise ones stay whole
        names = [("%s[group %d]" % (name, group), "%s__group__%d" % (operator, group)) for group in range(layer.groups)]
    return [WeightOnlyParams(label, op_name, layer.bits, layer.mode is WeightMode.ASYMMETRIC, layer.block_size)
            for label, op_name in names]
