"""The wire and the converter: the parameter file, driving ``mnnconvert``, coverage, running and verifying a model."""

from slimtrain.proto.converter import Conversion, ConvertOptions, convert
from slimtrain.proto.layers import (
    LayerParams,
    PruneType,
    QuantMethod,
    WeightOnlyParams,
    prune_algorithm,
    quantize_algorithm,
)
from slimtrain.proto.mnnfile import MnnLayer, MnnModel, inspect_model
from slimtrain.proto.params import (
    params_from_json,
    params_to_json,
    read_params,
    save_algorithm,
    write_params,
)

__all__ = [
    "Conversion",
    "ConvertOptions",
    "LayerParams",
    "MnnLayer",
    "MnnModel",
    "PruneType",
    "QuantMethod",
    "WeightOnlyParams",
    "convert",
    "inspect_model",
    "params_from_json",
    "params_to_json",
    "prune_algorithm",
    "quantize_algorithm",
    "read_params",
    "save_algorithm",
    "write_params",
]
