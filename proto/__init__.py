"""The wire and the converter: the parameter file, driving ``mnnconvert``, coverage, running and verifying a model."""

from slimtrain.proto.layers import (
    LayerParams,
    PruneType,
    QuantMethod,
    WeightOnlyParams,
    prune_algorithm,
    quantize_algorithm,
)
from slimtrain.proto.params import (
    params_from_json,
    params_to_json,
    read_params,
    save_algorithm,
    write_params,
)

__all__ = [
    "LayerParams",
    "PruneType",
    "QuantMethod",
    "WeightOnlyParams",
    "params_from_json",
    "params_to_json",
    "prune_algorithm",
    "quantize_algorithm",
    "read_params",
    "save_algorithm",
    "write_params",
]
