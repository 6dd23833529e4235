"""Writing a quantized ONNX model, converting it with MNN, and comparing what MNN computes."""
from __future__ import annotations

import importlib.util
import os
from typing import Mapping, NamedTuple, Optional, Union

import numpy as np
import onnx

from slimtrain.core import sqnr_db
from slimtrain.proto.converter import Conversion, convert
from slimtrain.proto.onnx_check import run_onnx
from slimtrain.proto.onnx_files import write_rewritten
from slimtrain.proto.onnx_observation import Arrays
from slimtrain.proto.onnx_rewrite import Rewritten
from slimtrain.proto.onnx_simulation import simulate_onnx
from slimtrain.proto.runtime import reshaped, run_model

PathLike = Union[str, "os.PathLike[str]"]


class DeployedOnnx(NamedTuple):
    """What was written and what was measured."""

    onnx: str
    params: str
    mnn: Optional[str]                    #: None where MNN is not installed
    conversion: Optional[Conversion]      #: with the coverage of the .mnn
    bytes: int                            #: size of the .mnn, or of the .onnx
    simulation_sqnr_db: Optional[float]   #: MNN's outputs against the integer simulation
    reference_sqnr_db: float              #: the simulation against the model that was given


def deploy_onnx(reference: onnx.ModelProto, rewritten: Rewritten, example: Arrays, stem: PathLike) -> DeployedOnnx:
    """Write ``stem.onnx``, ``stem.compress_params.bin`` and, with MNN, ``stem.mnn``; run and compare it.

    Args:
        reference: the model that was given.
        rewritten: what quantization made of it.
        example: inputs by name.
        stem: path without suffix; its folder is made.

    Raises:
        CoverageError: MNN did not quantize a layer that should be int8.
        ConversionError: MNN could not convert or run the model.
    """
    name = os.fspath(stem)
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    paths = name + ".onnx", name + ".compress_params.bin"
    write_rewritten(rewritten, *paths, append=False)
    simulated = simulate_onnx(rewritten, example)
    expected = dict(zip([value.name for value in reference.graph.output], run_onnx(reference, example)))
    against = _sqnr(expected, simulated)
    if importlib.util.find_spec("MNN") is None:
        return DeployedOnnx(*paths, None, None, os.path.getsize(paths[0]), None, against)
    conversion = convert(paths[0], name + ".mnn", paths[1])
    found = run_model(name + ".mnn", example)
    return DeployedOnnx(*paths, name + ".mnn", conversion, conversion.bytes, _sqnr(simulated, found), against)


def _sqnr(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Over all outputs that hold real numbers together."""
    names = [name for name in wanted if wanted[name].dtype.kind == "f"]
    values = [reshaped(name, np.asarray(found[name]), wanted[name].shape).astype(np.float64).ravel() for name in names]
    return sqnr_db(np.concatenate([wanted[name].astype(np.float64).ravel() for name in names]), np.concatenate(values))
