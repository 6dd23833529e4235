"""From a trained model to the ONNX file and the parameter file that MNN converts."""
from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from slimtrain.callbacks.model_view import evaluation, float_view
from slimtrain.callbacks.operations import map_tensors
from slimtrain.core import ConversionError
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_reductions import write_reductions

logger = logging.getLogger(__name__)


def export_float(model: nn.Module, args: Tuple[Any, ...], kwargs: Mapping[str, Any], *,
                 opset: Optional[int] = None, dynamo: Optional[bool] = None) -> onnx.ModelProto:
    """Export the float model in evaluation mode; the model itself is not touched.

    Args:
        model: the model, with or without quantization attached.
        args, kwargs: an example input.
        opset: version of the operator set; the exporter's own choice when None.
        dynamo: True for the exporter over ``torch.export``, False for the TorchScript one; None takes the first and,
            where the model cannot be captured by it (a branch on data), the second.

    Raises:
        ConversionError: the model cannot be exported.
    """
    view = float_view(model)
    to_cpu = lambda value: value.detach().cpu()  # noqa: E731
    args, named = map_tensors(to_cpu, args), dict(map_tensors(to_cpu, dict(kwargs)))
    attempts = (True, False) if dynamo is None else (dynamo,)
    errors: List[Exception] = []
    for attempt in attempts:
        try:
            with evaluation(view), torch.no_grad(), _without_fast_paths(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                export = _export_dynamo if attempt else _export_torchscript
                return readable(free_batch(export(_on_cpu(view), args, named, opset)))
        except Exception as error:  # exporters raise whatever the model made them raise
            errors.append(error)
            if len(errors) < len(attempts):
                logger.warning("torch.export cannot capture the model, using the TorchScript exporter, which keeps the "
                               "branches that the example input takes: %s", _first_line(error))
    raise ConversionError("the model cannot be exported to ONNX: %s" % _first_line(errors[-1])) from errors[-1]


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let reshapes keep any number of samples; exporters write down that of the example input.

    ``Reshape(x, [64, 512])`` in a model whose inputs hold 64 samples becomes ``Reshape(x, [-1, 512])``, which is the
    same for 64 and right for others. Reshapes that have another open axis stay as they are.
    """
    graph = OnnxGraph(model)
    sizes = {value.type.tensor_type.shape.dim[0].dim_value for value in model.graph.input
             if value.name not in graph.initializers and len(value.type.tensor_type.shape.dim)}
    for node in graph.nodes:
        target = graph.constant(node.input[1]) if node.op_type == "Reshape" else None
        if target is None or not target.size or graph.constant(node.input[0]) is not None:
            continue
        if sizes == {int(target[0])} and -1 not in target:
            node.input[1] = graph.add_constant(np.array([-1, *target[1:]], np.int64), node.output[0] + "/shape")
            graph.refresh()
    return graph.model()


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with norms and the like written so that MNN reads them as they are meant."""
    graph = OnnxGraph(model)
    return graph.model() if write_reductions(graph) else model


@contextlib.contextmanager
def _without_fast_paths() -> Iterator[None]:
    """In evaluation torch runs a transformer layer as one operation, which ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _on_cpu(view: nn.Module) -> nn.Module:
    """Exporters run on the CPU: parameters of the view (not of the model) are replaced by copies there."""
    for module in view.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "cpu":
                module._parameters[name] = nn.Parameter(parameter.detach().cpu(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "cpu":
                module._buffers[name] = buffer.cpu()
    return view


def _export_dynamo(model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any],
                   opset: Optional[int]) -> onnx.ModelProto:
    program = torch.onnx.export(model, args, kwargs=kwargs or None, opset_version=opset, dynamo=True, verbose=False)
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _export_torchscript(model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any],
                        opset: Optional[int]) -> onnx.ModelProto:
    buffer = io.BytesIO()
    names = _input_names(model, args, kwargs)
    torch.onnx.export(model, args, buffer, kwargs=kwargs or None,  # type: ignore[arg-type]  # a file object will do
                      opset_version=opset, dynamo=False, input_names=names)
    return onnx.load_from_string(buffer.getvalue())


def _input_names(model: nn.Module, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> Optional[List[str]]:
    """Names of the forward's own parameters, as the other exporter gives them."""
    if not all(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        return None
    try:
        return list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError:
        return None


def _first_line(error: Exception) -> str:
    return ("%s: %s" % (type(error).__name__, error)).splitlines()[0][:300]
