"""A 1x1 convolution quantized by hand in float64: the oracle for what an int8 model computes."""

from typing import NamedTuple

import numpy as np

from proto_layers import layer, save_layers
from sample_models import HAS_ONNX, Sample, pointwise
from slimtrain.core import Grid
from slimtrain.proto import convert


class Deployed(NamedTuple):
    """A converted model, the float model it was made of, and what it must compute for the inputs of ``sample``."""

    path: str
    sample: Sample
    outputs: dict
    scale: float


def deploy(folder):
    """8 to 4 channels, 4-bit weights, 8-bit activations; scales are powers of two times odd numbers."""
    rng = np.random.RandomState(1)
    steps = np.float32([3 / 256, 5 / 256, 7 / 256, 9 / 256])
    input_step, output_step = np.float32(0.02), np.float32(0.015)
    weight = (rng.randint(-8, 8, (4, 8, 1, 1)) * steps.reshape(-1, 1, 1, 1)).astype(np.float32)
    bias = rng.randn(4).astype(np.float32)
    x = rng.randn(2, 8, 5, 5).astype(np.float32)
    sample = pointwise(folder, weight, bias, x)
    names = (sample.convs[0].tensor,)
    params = save_layers(
        str(folder / "pointwise.bin"),
        layer(
            "pointwise",
            names,
            input_scale=float(input_step),
            output_scale=float(output_step),
            weight_scales=steps,
            weight_grid=Grid(4, -8, 7),
        ),
    )
    path = str(folder / "pointwise.mnn")
    convert(sample.path, path, params)
    wanted = quantized(quantized(x, input_step), output_step, weight, bias)
    wanted = wanted if HAS_ONNX else wanted.transpose(0, 2, 3, 1)
    return Deployed(path, sample, {"y": wanted.astype(np.float32)}, float(output_step))


def quantized(x, step, weight=None, bias=None):
    """Fake quantization in float64 to [-127, 127], of the convolution of ``x`` where a weight is given."""
    values = x.astype(np.float64)
    if weight is not None:
        values = np.einsum("ncyx,oc->noyx", values, weight[:, :, 0, 0].astype(np.float64))
        values += bias.reshape(1, -1, 1, 1)
    levels = values / np.float64(step)
    return np.clip(np.sign(levels) * np.floor(np.abs(levels) + 0.5), -127, 127) * np.float64(step)
