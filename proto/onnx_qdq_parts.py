"""A quantized ONNX model taken apart: the float model inside, and the grids that the file has for its tensors."""
from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from slimtrain.core import ConversionError, Grid, capped_grid
from slimtrain.proto.onnx_deciding import TensorScale
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_normal import graph_inputs

# What selects, moves or averages values cannot make negative ones of positive ones.
_KEEPS_SIGN = ("Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax",
               "Max", "Min", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split",
               "Gather", "Identity", "Pad", "Clip")
_NON_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp")


class FileGrid(NamedTuple):
    """The grid of an activation in the file."""

    scale: float
    lower: int   #: smallest level, after the zero point
    upper: int

    def as_it_is(self) -> TensorScale:
        """The grid of the file, which has a zero point in MNN unless it fits int8 without one."""
        return TensorScale(self.scale, Grid(8, self.lower, self.upper))

    def symmetric(self) -> TensorScale:
        """The symmetric grid over the same range."""
        return TensorScale(float(np.float32(max(-self.lower, self.upper) * self.scale / 127)), Grid(8, -127, 127))

    @property
    def is_symmetric(self) -> bool:
        """Whether the levels fit int8 without a zero point."""
        return self.lower >= -128 and self.upper <= 127

    @property
    def is_symmetric_below_6(self) -> bool:
        """Whether the levels up to 6 do, which are those that a ReLU6 leaves."""
        return self._replace(upper=capped_grid(Grid(8, self.lower, self.upper), self.scale).upper).is_symmetric


class StrippedQdq(NamedTuple):
    """The float model without its Q and DQ nodes."""

    graph: OnnxGraph
    ranges: Dict[str, FileGrid]                #: tensor -> grid
    weights: Dict[str, np.ndarray]             #: name of a weight -> its scales, broadcast against it
    remarks: List[str]

    def layers(self) -> Set[Tuple[str, str, int]]:
        """Nodes with a quantized weight, by what folding does not change."""
        return {node_key(self.graph, node) for node in self.graph.nodes
                if len(node.input) > 1 and node.input[1] in self.weights}


def node_key(graph: OnnxGraph, node: onnx.NodeProto) -> Tuple[str, str, int]:
    """What folding does not change of a layer: its name, what it reads, the size of its weight."""
    weight = graph.constant(node.input[1])
    return str(node.name), str(node.input[0]), 0 if weight is None else int(weight.size)


def strip_qdq(model: onnx.ModelProto) -> StrippedQdq:
    """Take the Q and DQ nodes out; ``model`` is left as it is.

    Raises:
        ConversionError: there is none, or one that MNN cannot represent.
    """
    graph = OnnxGraph(model)
    result = StrippedQdq(graph, {}, {}, [])
    found = [node for node in graph.nodes if node.op_type == "DequantizeLinear"]
    if not found:
        raise ConversionError("the model has no DequantizeLinear: it is not quantized in this form")
    for node in found:
        if graph.constant(node.input[0]) is not None:
            _dequantize_constant(result, node)
        else:
            _drop_pair(result, node)
    left = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    if left:
        graph.replace(left, [])
    _restore_activations(result)
    return result


def _numbers(graph: OnnxGraph, node: onnx.NodeProto) -> Tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a Q or DQ node, float64 and int64."""
    scale = graph.constant(node.input[1])
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, np.uint8)
    if scale is None or zero is None:
        raise ConversionError("the scale of %s is computed by the model; MNN needs constant scales" % node.input[0])
    return scale.astype(np.float64), zero


def _dequantize_constant(stripped: StrippedQdq, node: onnx.NodeProto) -> None:
    graph = stripped.graph
    levels = graph.constant(node.input[0])
    assert levels is not None
    scale, zero = _numbers(graph, node)
    if scale.size > 1:
        shape = [1] * levels.ndim
        shape[int(attribute(node, "axis", 1))] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    whole = levels.astype(np.int64) - zero.astype(np.int64)
    name = node.output[0]
    graph.replace([node], [])
    graph.initializers[name] = numpy_helper.from_array((whole * scale).astype(np.float32), name)
    stripped.weights[name] = np.broadcast_to(scale.astype(np.float32), levels.shape)


def _drop_pair(stripped: StrippedQdq, node: onnx.NodeProto) -> None:
    graph = stripped.graph
    quantize_node = graph.producer.get(node.input[0])
    if quantize_node is None or quantize_node.op_type != "QuantizeLinear":
        raise ConversionError("%s is dequantized but not quantized by the model itself: expected QuantizeLinear before "
                              "DequantizeLinear" % node.input[0])
    scale, zero = _numbers(graph, node)
    if scale.size != 1:
        raise ConversionError("the activation %s has a scale per channel, MNN has one per tensor" % node.input[0])
    limits = np.iinfo(zero.dtype)
    source, level = str(quantize_node.input[0]), int(zero.reshape(-1)[0])
    stripped.ranges[source] = FileGrid(float(scale.reshape(-1)[0]), limits.min - level, limits.max - level)
    output = str(node.output[0])
    for reader in graph.consumers.get(output, []):
        for index, read in enumerate(reader.input):
            if read == output:
                reader.input[index] = source
    if output not in graph.outputs:
        graph.replace([node], [])
        return
    producer = graph.producer.get(source)
    if producer is None or source in graph.outputs:
        graph.replace([node], [helper.make_node("Identity", [source], [output])])
        return
    graph.replace([node], [])
    for other in graph.nodes:
        other.input[:] = [output if read == source else read for read in other.input]
        other.output[:] = [output if made == source else made for made in other.output]
    graph.refresh()
    stripped.ranges[output] = stripped.ranges.pop(source)


def _restore_activations(stripped: StrippedQdq) -> None:
    """Tools drop a ReLU where the grid behind it begins at zero; a symmetric grid needs it back."""
    graph = stripped.graph
    sources = {value.name for value in graph_inputs(graph.model())}
    for name, grid in list(stripped.ranges.items()):
        producer = graph.producer.get(name)
        if grid.lower < 0 or producer is None or producer.op_type in _NON_NEGATIVE:
            if grid.lower >= 0 and name in sources:
                stripped.remarks.append("the input %s is cut off below zero in the file, here it is not" % name)
            continue
        if not _may_be_negative(graph, name, {**stripped.ranges, name: None}):
            continue
        output = graph.new_name(name + "/relu")
        graph.insert_behind(name, [helper.make_node("Relu", [name], [output])], output)
        if name not in graph.outputs:
            stripped.ranges[output] = stripped.ranges.pop(name)


def _may_be_negative(graph: OnnxGraph, name: str, grids: Mapping[str, Optional[FileGrid]]) -> bool:
    """Whether a tensor may hold values below zero, seen from the grids of the tensors that it is made of."""
    grid = grids.get(name)
    if grid is not None:
        return grid.lower < 0
    node = graph.producer.get(name)
    if node is None or node.op_type not in _KEEPS_SIGN:
        return node is None or node.op_type not in _NON_NEGATIVE
    values = node.input if node.op_type in ("Concat", "Max", "Min") else node.input[:1]
    return any(_may_be_negative(graph, read, grids) for read in values)
