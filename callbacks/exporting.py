"""From a quantized model to files: the float ONNX model on its grid, the parameter file, the int8 .mnn."""
from __future__ import annotations

import logging
import os
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import onnx
from torch import Tensor

from slimtrain.callbacks.operations import tensors_in
from slimtrain.core import ConversionError, Coverage, sqnr_db
from slimtrain.proto import (
    ConvertOptions,
    convert,
    quantize_algorithm,
    run_model,
    save_algorithm,
    save_simulation,
)
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.onnx_graph import OnnxGraph
from slimtrain.proto.onnx_match import match_layers
from slimtrain.proto.onnx_rewrite import all_params

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class Exported(NamedTuple):
    """The files of one exported model."""

    onnx: str
    params: str


class Deployed(NamedTuple):
    """A converted model and what was measured on it."""

    mnn: str
    coverage: Coverage     #: of the layers that the parameters ask for
    sqnr_db: float         #: MNN's outputs against the float64 simulation, on the example input
    bytes: int


def write_params_only(model: onnx.ModelProto, layers: Sequence[DeployedLayer], params_path: PathLike,
                      append: bool) -> List[str]:
    """Write parameters for an ONNX file that must not be changed.

    Returns:
        the layers that stay float in such a file: linear layers only run in int8 as convolutions.
    """
    graph = OnnxGraph(model)
    matches = match_layers(graph, layers)
    params = all_params(graph, {match.node.output[0]: match.layer for match in matches if match.node.op_type == "Conv"})
    save_algorithm(params_path, quantize_algorithm(params), append)
    return [match.layer.name for match in matches if match.node.op_type != "Conv"]


def deploy(exported: Exported, inputs: Mapping[str, np.ndarray], expected: Any, *,
           options: Optional[ConvertOptions] = None) -> Deployed:
    """Convert an exported model, run it in MNN and compare it with its simulation.

    Args:
        exported: the files.
        inputs: the example input by name.
        expected: what the simulation returned for it.

    Raises:
        ConversionError: MNN is not installed, or could not convert or run the model.
        CoverageError: the converted model is compressed less than the parameters ask for.
    """
    target = os.path.splitext(exported.onnx)[0] + ".mnn"
    conversion = convert(exported.onnx, target, exported.params, options or ConvertOptions())
    outputs = run_model(target, dict(inputs))
    wanted = named_outputs(exported.onnx, expected)
    measured = [outputs[name].reshape(value.shape).astype(np.float64) for name, value in wanted.items()]
    reference = np.concatenate([value.astype(np.float64).ravel() for value in wanted.values()])
    result = sqnr_db(reference, np.concatenate([value.ravel() for value in measured]))
    coverage = Coverage(conversion.coverage.layers + conversion.weight_only.layers)
    return Deployed(target, coverage, result, conversion.bytes)


def record(exported: Exported, inputs: Mapping[str, np.ndarray], expected: Any) -> str:
    """Write ``stem.simulation.npz``: an example input and its simulated result, for ``slimtrain verify``."""
    path = os.path.splitext(exported.onnx)[0] + ".simulation.npz"
    save_simulation(path, dict(inputs), named_outputs(exported.onnx, expected))
    return path


def named_inputs(path: PathLike, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An example input as the named inputs of an exported file.

    Raises:
        ConversionError: the file has another number of inputs.
    """
    model = onnx.load(os.fspath(path), load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in constants]
    return _paired(path, "inputs", names, tensors_in([args, dict(kwargs)]))


def named_outputs(path: PathLike, outputs: Any) -> dict[str, np.ndarray]:
    """What a model returned as the named outputs of its exported file.

    Raises:
        ConversionError: the file has another number of outputs.
    """
    model = onnx.load(os.fspath(path), load_external_data=False)
    return _paired(path, "outputs", [value.name for value in model.graph.output], tensors_in(outputs))


def _paired(path: PathLike, what: str, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    if len(names) != len(tensors):
        raise ConversionError("%s has %d %s (%s), the model %d: give the model only what it uses" % (
            os.fspath(path), len(names), what, ", ".join(names), len(tensors)))
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors)}
