"""Running ONNX models with onnxruntime, and checking that a rewritten one still computes the same."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import onnx

from slimtrain.core import ConversionError, sqnr_db
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_rewrite import Rewritten, rewrite

# two float32 programs for one function; structural mistakes are below 40 dB
_EQUAL_DB = 80.0


def prepare(model: onnx.ModelProto, layers: Sequence[DeployedLayer]) -> Rewritten:
    """Rewrite an exported model for MNN and check with onnxruntime that only the weights' grid has changed.

    Raises:
        ConversionError: the rewritten structure computes something else.
        SlimtrainError: the file is not that of these layers.
    """
    check_same(model, rewrite(model, layers, on_grid=False).model)
    return rewrite(model, layers)


def check_same(before: onnx.ModelProto, after: onnx.ModelProto, inputs: Optional[Mapping[str, np.ndarray]] = None
               ) -> None:
    """Compare two float models with onnxruntime, on random inputs where none are given.

    Raises:
        ConversionError: outputs differ by more than float32 rounding.
    """
    inputs = _random_inputs(before) if inputs is None else inputs
    for name, wanted, found in zip([value.name for value in before.graph.output], run_onnx(before, inputs),
                                   run_onnx(after, inputs)):
        if wanted.dtype.kind == "f" and wanted.size and sqnr_db(wanted, found) < _EQUAL_DB and np.any(wanted):
            raise ConversionError("rewriting the ONNX file changed output %r: %.1f dB of agreement, expected %.0f. "
                                  "Please report the model" % (name, sqnr_db(wanted, found), _EQUAL_DB))


def run_onnx(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> List[np.ndarray]:
    """Outputs of an ONNX model, by onnxruntime on the CPU without graph optimizations.

    Raises:
        ConversionError: as ``open_session`` and ``run_session``.
    """
    return run_session(open_session(model.SerializeToString(), optimize=False), None, inputs)


def run_session(session: Any, names: Optional[Sequence[str]], inputs: Mapping[str, np.ndarray]) -> List[np.ndarray]:
    """The outputs of a session called ``names``, None for all.

    Raises:
        ConversionError: the inputs do not fit the model.
    """
    try:
        return list(session.run(names, dict(inputs)))
    except Exception as error:  # its exceptions have no common class of their own
        shapes = ", ".join("%s %s" % (name, np.shape(value)) for name, value in inputs.items())
        raise ConversionError("onnxruntime cannot run the model on %s: %s" % (
            shapes, " ".join(str(error).split()))) from error


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


def open_session(model: bytes, optimize: bool = True) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: a serialized ONNX model.
        optimize: let onnxruntime fuse operations, which is faster and rounds otherwise.

    Raises:
        ConversionError: onnxruntime is not installed, or cannot run the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError("running ONNX needs onnxruntime: run python -m pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise ConversionError("onnxruntime cannot load the model: %s" % error) from error
