"""Bringing any float ONNX file into the one form that quantization works on.

Batch norms, constant offsets and Gemm's factors are folded into the layers before them, old operator sets are
converted, and constants are initializers that are no inputs. What cannot be folded stays as it is.
"""
from __future__ import annotations

import logging
import os
from typing import List, Optional, Tuple, Union

import numpy as np
import onnx
from onnx import helper, version_converter

from slimtrain.core import ConversionError, fold_batch_norm
from slimtrain.proto.onnx_geometry import conv_geometry
from slimtrain.proto.onnx_graph import OnnxGraph, attribute
from slimtrain.proto.onnx_match import node_weight

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

# the nodes that rewriting inserts are of this operator set or later
_OLDEST_OPSET = 11
_CONVERTED_OPSET = 13


def load_onnx(path: PathLike) -> onnx.ModelProto:
    """A model with its external weights.

    Raises:
        ConversionError: no such file, or no ONNX model.
    """
    try:
        model = onnx.load(os.fspath(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker have errors of their own
        raise ConversionError("cannot read the ONNX model %s: %s" % (os.fspath(path), error)) from error
    return model


def normal_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """An equal model in normal form; ``model`` itself is left as it is.

    Raises:
        ConversionError: the operator set is too old and cannot be converted.
    """
    graph = OnnxGraph(_without_constant_inputs(_recent(model)))
    _drop_dead_nodes(graph)
    _constants_to_initializers(graph)
    for node in list(graph.nodes):
        if node.op_type in ("Conv", "MaxPool", "AveragePool"):
            _write_padding(graph, node)
        if node.op_type in ("MaxPool", "AveragePool") and not attribute(node, "strides"):
            # without them MNN divides by zero
            node.attribute.append(helper.make_attribute("strides", [1] * len(attribute(node, "kernel_shape"))))
        if node.op_type == "Gemm":
            _fold_gemm_factors(graph, node)
        if node.op_type in ("Conv", "Gemm"):
            while _fold_following(graph, node):
                pass
    return graph.model()


def _recent(model: onnx.ModelProto) -> onnx.ModelProto:
    if OnnxGraph(model).opset >= _OLDEST_OPSET:
        return model
    try:
        return version_converter.convert_version(model, _CONVERTED_OPSET)
    except Exception as error:  # it raises whatever its C++ parts raise
        raise ConversionError("the model has operator set %d, older than %d, and onnx cannot convert it: %s" % (
            OnnxGraph(model).opset, _OLDEST_OPSET, error)) from error


def _without_constant_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Old files list their weights among the inputs."""
    constants = {tensor.name for tensor in model.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.input[:]
    result.graph.input.extend(value for value in model.graph.input if value.name not in constants)
    result.ir_version = max(model.ir_version, 4)
    return result


def _drop_dead_nodes(graph: OnnxGraph) -> None:
    """Drop what leads to no output, as the converter does."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if needed & set(node.output):
            needed.update(_read(node))
    graph.nodes = [node for node in graph.nodes if needed & set(node.output)]
    graph.refresh()


def _read(node: onnx.NodeProto) -> List[str]:
    """What a node reads, branches and loops included."""
    names = list(node.input)
    for item in node.attribute:
        for inner in (item.g, *item.graphs):
            names += [name for child in inner.node for name in _read(child)]
            names += [value.name for value in inner.output]
    return names


def _constants_to_initializers(graph: OnnxGraph) -> None:
    for node in list(graph.nodes):
        value = graph.constant(node.output[0]) if node.op_type == "Constant" else None
        if value is not None and node.output[0] not in graph.outputs:
            graph.replace([node], [])
            graph.initializers[node.output[0]] = onnx.numpy_helper.from_array(value, node.output[0])


def _write_padding(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Write SAME padding as numbers where MNN has it otherwise.

    It puts an odd one of SAME_LOWER on the other side, and begins a convolution elsewhere whose kernel is shorter than
    its stride by two or more, so that SAME asks for less than none: nothing is padded then.
    """
    mode = attribute(node, "auto_pad", b"NOTSET")
    weight = graph.constant(node.input[1]) if node.op_type == "Conv" else None
    window = list(attribute(node, "kernel_shape", []) if weight is None else weight.shape[2:])
    strides = list(attribute(node, "strides", [1] * len(window)))
    extents = [(size - 1) * step + 1 for size, step in zip(window, attribute(node, "dilations", [1] * len(window)))]
    skips = node.op_type == "Conv" and any(stride - extent > 1 for stride, extent in zip(strides, extents))
    if not window or not (mode == b"SAME_LOWER" or (mode == b"SAME_UPPER" and skips)):
        return
    shape = graph.shapes().get(node.input[0], [])[2:]
    if all(stride == 1 or extent == 1 for stride, extent in zip(strides, extents)):
        shape = [1] * len(strides)  # the padding does not depend on it
    if len(shape) != len(strides) or None in shape:
        logger.warning("%s is padded by %s and the size of its input is not known: MNN may put the padding elsewhere",
                       node.output[0], mode.decode())
        return
    padding = conv_geometry(node, [1, 1, *window], [int(size or 1) for size in shape]).padding[-len(strides):]
    kept = [item for item in node.attribute if item.name not in ("auto_pad", "pads")]
    del node.attribute[:]
    node.attribute.extend(kept)
    pads = [before for before, _ in padding] + [after for _, after in padding]
    node.attribute.append(helper.make_attribute("pads", pads))


def _fold_gemm_factors(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Multiply alpha and beta into weight and bias."""
    factors = {"alpha": float(attribute(node, "alpha", 1.0)), "beta": float(attribute(node, "beta", 1.0))}
    for index, name in ((1, "alpha"), (2, "beta")):
        value = graph.constant(node.input[index]) if len(node.input) > index else None
        if factors[name] == 1.0 or (value is None and len(node.input) > index):
            continue
        if value is not None:
            node.input[index] = graph.add_constant((value * factors[name]).astype(value.dtype), node.input[index])
        for item in list(node.attribute):
            if item.name == name:
                node.attribute.remove(item)
    graph.refresh()


def _fold_following(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Fold the batch norm or constant offset that alone reads a layer; False if there is none."""
    following = graph.only_consumer(node.output[0])
    weight = node_weight(graph, node)
    if following is None or weight is None:
        return False
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(len(weight))
    if bias is None or bias.size not in (1, len(weight)):
        return False
    bias = np.broadcast_to(bias.reshape(-1), (len(weight),))
    folded = _folded(graph, node, following, weight.astype(np.float64), bias.astype(np.float64))
    if folded is None:
        return False
    transposed = node.op_type == "Gemm" and not attribute(node, "transB", 0)
    new = folded[0].T if transposed else folded[0]
    name = node.input[1]
    inputs = [node.input[0], graph.add_constant(new.astype(np.float32), name),
              graph.add_constant(folded[1].astype(np.float32), name + "/bias")]
    del node.input[:]
    node.input.extend(inputs)
    output = following.output[0]
    graph.replace([following], [])
    node.output[0] = output
    graph.refresh()
    return True


def _folded(graph: OnnxGraph, node: onnx.NodeProto, following: onnx.NodeProto, weight: np.ndarray,
            bias: np.ndarray) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    if following.op_type == "BatchNormalization" and len(following.output) == 1:
        numbers = [graph.constant(name) for name in following.input[1:5]]
        if any(value is None for value in numbers):
            return None
        gamma, beta, mean, variance = numbers
        assert mean is not None and variance is not None
        return fold_batch_norm(weight, bias, gamma, beta, mean, variance, float(attribute(following, "epsilon", 1e-5)))
    if following.op_type == "Add":
        offset = _channel_offset(graph, node, following, len(weight))
        return None if offset is None else (weight, bias + offset)
    return None


def _channel_offset(graph: OnnxGraph, node: onnx.NodeProto, addition: onnx.NodeProto,
                    channels: int) -> Optional[np.ndarray]:
    """The constant that an addition adds to each channel of a layer, [channels]."""
    value = next((found for found in map(graph.constant, addition.input) if found is not None), None)
    if value is None or len(set(addition.input)) == 1:
        return None
    shape: List[int] = list(value.shape)
    if node.op_type == "Conv":
        rank = len(graph.constant(node.input[1]).shape)  # type: ignore[union-attr]
        shape = [1] * (rank - len(shape)) + shape
        fits = len(shape) == rank and shape[0] == 1 and all(size == 1 for size in shape[2:])
        fits = fits and shape[1] in (1, channels)
    else:
        fits = len(shape) <= 2 and value.size in (1, channels) and (not shape or shape[-1] == value.size)
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,)) if fits else None


def graph_inputs(model: onnx.ModelProto) -> List[onnx.ValueInfoProto]:
    """The true inputs of a model: those that are no weights."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def input_dtype(value: onnx.ValueInfoProto) -> np.dtype:
    """The dtype of an input."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def input_shape(value: onnx.ValueInfoProto) -> Tuple[Optional[int], ...]:
    """The shape of an input, None for sizes that are not fixed."""
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)
