"""From a trained model to the ONNX file and the parameter file that MNN converts."""
from __future__ import annotations

import inspect
import io
import logging
import os
import warnings
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from slimtrain.callbacks.deployment import DeployedLayer
from slimtrain.callbacks.model_view import evaluation, float_view
from slimtrain.callbacks.onnx_rewrite import Rewritten, rewrite
from slimtrain.callbacks.operations import map_tensors
from slimtrain.core import ConversionError, sqnr_db

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

# two float32 programs for one function; structural mistakes are below 40 dB
_EQUAL_DB = 80.0


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
    args, kwargs = map_tensors(to_cpu, args), map_tensors(to_cpu, dict(kwargs))
    attempts = (True, False) if dynamo is None else (dynamo,)
    errors: List[Exception] = []
    for attempt in attempts:
        try:
            with evaluation(view), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return (_export_dynamo if attempt else _export_torchscript)(_on_cpu(view), args, kwargs, opset)
        except Exception as error:  # exporters raise whatever the model made them raise
            errors.append(error)
            if len(errors) < len(attempts):
                logger.warning("torch.export cannot capture the model, using the TorchScript exporter, which keeps the "
                               "branches that the example input takes: %s", _first_line(error))
    raise ConversionError("the model cannot be exported to ONNX: %s" % _first_line(errors[-1])) from errors[-1]


def _on_cpu(view: nn.Module) -> nn.Module:
    """Exporters run on the CPU: parameters of the view (not of the model) are replaced by copies there."""
    for module in view.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value.device.type != "cpu":
                    store[name] = type(value)(value.detach().cpu()) if isinstance(value, nn.Parameter) else value.cpu()
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
    torch.onnx.export(model, args, buffer, kwargs=kwargs or None, opset_version=opset, dynamo=False, input_names=names)
    return onnx.load_from_string(buffer.getvalue())


def _input_names(model: nn.Module, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> Optional[List[str]]:
    """Names of the forward's own parameters, as the other exporter gives them."""
    if not all(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        return None
    try:
        return list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError:
        return None


def prepare(model: onnx.ModelProto, layers: Sequence[DeployedLayer]) -> Rewritten:
    """Rewrite an exported model for MNN and check with onnxruntime that only the weights' grid has changed.

    Raises:
        ConversionError: the rewritten structure computes something else.
        SlimtrainError: the file is not that of these layers.
    """
    check_same(model, rewrite(model, layers, on_grid=False).model)
    return rewrite(model, layers)


def check_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Compare two float models on random inputs with onnxruntime.

    Raises:
        ConversionError: outputs differ by more than float32 rounding.
    """
    inputs = _random_inputs(before)
    for name, wanted, found in zip([value.name for value in before.graph.output], run_onnx(before, inputs),
                                   run_onnx(after, inputs)):
        if wanted.dtype.kind == "f" and wanted.size and sqnr_db(wanted, found) < _EQUAL_DB and np.any(wanted):
            raise ConversionError("rewriting the ONNX file changed output %r: %.1f dB of agreement, expected %.0f. "
                                  "Please report the model" % (name, sqnr_db(wanted, found), _EQUAL_DB))


def run_onnx(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> List[np.ndarray]:
    """Outputs of an ONNX model, by onnxruntime on the CPU without graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: List[np.ndarray] = session.run(None, dict(inputs))
    return outputs


def _random_inputs(model: onnx.ModelProto) -> Dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.dim_value > 0 else 2 for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        inputs[value.name] = (generator.standard_normal(shape).astype(dtype) if np.dtype(dtype).kind == "f"
                              else np.zeros(shape, dtype))
    return inputs


def _first_line(error: Exception) -> str:
    return ("%s: %s" % (type(error).__name__, error)).splitlines()[0][:300]
