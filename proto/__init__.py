"""The wire and the converter: parameter files, driving ``mnnconvert``, coverage, running, verifying."""

from slimtrain.proto.algorithms import PruneType, prune_algorithm, quantize_algorithm
from slimtrain.proto.arrays import Simulation, load_inputs, load_simulation, save_simulation
from slimtrain.proto.converter import Conversion, convert
from slimtrain.proto.layers import LayerParams, QuantMethod, WeightOnlyParams
from slimtrain.proto.mnnfile import MnnLayer, MnnModel, inspect_model
from slimtrain.proto.options import ConvertOptions
from slimtrain.proto.parameterless import save_parameterless
from slimtrain.proto.params import (
    params_from_json,
    params_to_json,
    read_params,
    save_algorithm,
    write_params,
)
from slimtrain.proto.runtime import measure_latency, run_model
from slimtrain.proto.sparsity import SparseEstimate, SparseLayer, estimate_sparse
from slimtrain.proto.verification import OutputDeviation, Verification, verify
from slimtrain.proto.version import VERSION

__all__ = [
    "Conversion",
    "ConvertOptions",
    "LayerParams",
    "MnnLayer",
    "MnnModel",
    "OutputDeviation",
    "PruneType",
    "QuantMethod",
    "Simulation",
    "SparseEstimate",
    "SparseLayer",
    "VERSION",
    "Verification",
    "WeightOnlyParams",
    "convert",
    "estimate_sparse",
    "inspect_model",
    "load_inputs",
    "load_simulation",
    "measure_latency",
    "params_from_json",
    "params_to_json",
    "prune_algorithm",
    "quantize_algorithm",
    "read_params",
    "run_model",
    "save_algorithm",
    "save_parameterless",
    "save_simulation",
    "verify",
    "write_params",
]
