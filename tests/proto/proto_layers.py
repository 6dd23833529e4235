"""Layers for tests."""

import numpy as np

from slimtrain.core import Grid
from slimtrain.proto import LayerParams, quantize_algorithm, save_algorithm

INT8 = Grid(8, -127, 127)


def layer(name="conv", outputs=("y",), channels=2, **changes):
    """Full int8 parameters; ``changes`` replace single fields."""
    fields = {
        "name": name,
        "output_names": outputs,
        "input_scale": 0.5,
        "output_scale": 0.25,
        "weight_scales": np.full(channels, 0.125),
        "input_grid": INT8,
        "output_grid": INT8,
        "weight_grid": INT8,
    }
    fields.update(changes)
    return LayerParams(**fields)


def save_layers(path, *layers):
    """Write the layers to a new parameter file; its path as a string."""
    save_algorithm(path, quantize_algorithm(layers), append=False)
    return str(path)
