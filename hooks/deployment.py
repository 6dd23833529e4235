"""The numbers of a quantized layer as they are deployed: folded kernel on its grid, bias, scales.

Batch norm is folded after quantization. The grid of the weights is one per output channel and symmetric, so folding a
factor into a channel only changes its step, and the deployed weights are exactly those that were trained.
"""
from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import SMALLEST_SCALE, Grid, LayerCall, capped_grid, fold_factor, quantize, round_half_away
from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.depthwise import MOST_STEPS
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.state import SCOPE
from slimtrain.proto import LayerParams, QuantMethod

#: the converter truncates a depthwise bias to integer steps; a little more than n steps makes it n, not n - 1
_OVER = 1.0 / 64
#: below this MNN's depthwise kernel computes with 1e-6 instead
_SMALLEST_DEPTHWISE_STEP = 2e-6


class LayerSource(NamedTuple):
    """Where the numbers of one use of a layer are read."""

    layer: Layer
    call: LayerCall
    norm: Optional[BatchNorm]
    kernel: tf.Tensor         #: before quantization
    kernel_scale: tf.Tensor   #: [channels]
    input_scale: tf.Tensor
    output_scale: tf.Tensor
    kernel_grid: Grid
    input_grid: Grid
    output_grid: Grid
    method: QuantMethod

    @property
    def activation(self) -> str:
        """What is fused behind the layer: "relu", "relu6" or nothing."""
        ends = self.call.tensor if self.norm is None else self.norm.output.name
        if self.call.fused == ends:
            return ""
        return str(self.layer.op.graph.get_tensor_by_name(self.call.fused).op.type.lower())


class Numbers(NamedTuple):
    """The values of a source; what a layer does not have is None."""

    kernel: np.ndarray
    kernel_scale: np.ndarray
    input_scale: np.ndarray
    output_scale: np.ndarray
    bias: Optional[np.ndarray] = None
    gamma: Optional[np.ndarray] = None
    beta: Optional[np.ndarray] = None
    mean: Optional[np.ndarray] = None
    variance: Optional[np.ndarray] = None


class DeployedLayer(NamedTuple):
    """One quantized convolution: float32 values that lie on their grids."""

    source: LayerSource
    kernel: np.ndarray           #: [h, w, inputs, outputs]; [h, w, channels, 1] if depthwise
    bias: Optional[np.ndarray]   #: [outputs]
    params: LayerParams


def read_layers(sources: Sequence[LayerSource], session: tf.Session) -> List[DeployedLayer]:
    """Read the trained variables and compute what is deployed."""
    values = session.run([_fetches(source) for source in sources])
    return [deploy(source, Numbers(**numbers)) for source, numbers in zip(sources, values)]


def _fetches(source: LayerSource) -> Dict[str, Any]:
    fetches = {"kernel": source.kernel, "kernel_scale": source.kernel_scale, "input_scale": source.input_scale,
               "output_scale": source.output_scale}
    if source.layer.bias is not None:
        fetches["bias"] = source.layer.bias
    if source.norm is not None:
        fetches.update(gamma=source.norm.gamma, beta=source.norm.beta, mean=source.norm.mean,
                       variance=source.norm.variance)
    return fetches


def deploy(source: LayerSource, numbers: Numbers) -> DeployedLayer:
    """Quantize and fold one layer.

    Raises:
        ValueError: a number of it is not finite.
    """
    layer = source.layer
    _check_finite(layer, numbers)
    kernel = np.moveaxis(numbers.kernel, layer.channel_axis, 0)
    levels = quantize(kernel, numbers.kernel_scale, source.kernel_grid, axis=0)
    factor, bias = _folded(source, numbers)
    levels = levels * _columns(np.sign(factor).astype(np.int32), levels)
    levels, scales = _without_tiny_steps(levels, numbers.kernel_scale * np.abs(factor), layer.kind)
    if layer.kind is LayerKind.DEPTHWISE and bias is not None:
        bias = _whole_steps(bias, np.float64(numbers.input_scale) * scales)
    output_grid = source.output_grid
    if source.activation == "relu6":
        output_grid = capped_grid(output_grid, float(numbers.output_scale))
    params = LayerParams(
        name=layer.name, output_names=_spellings(source, bias is not None),
        input_scale=float(numbers.input_scale), output_scale=float(numbers.output_scale), weight_scales=scales,
        input_grid=source.input_grid, output_grid=output_grid, weight_grid=_flipped(source.kernel_grid, factor),
        method=source.method)
    on_grid = _convolution_kernel(levels.astype(np.float32) * _columns(scales, levels), layer)
    return DeployedLayer(source, on_grid, None if bias is None else bias.astype(np.float32), params)


def _check_finite(layer: Layer, numbers: Numbers) -> None:
    for name, value in numbers._asdict().items():
        broken = 0 if value is None else int(np.sum(~np.isfinite(value)))
        if broken:
            raise ValueError("layer {!r} cannot be deployed: {} of the {} values of its {} are not finite, so training "
                             "diverged: go back to an earlier checkpoint".format(
                                 layer.name, broken, np.size(value), name.replace("_", " ")))


def _spellings(source: LayerSource, has_bias: bool) -> Tuple[str, ...]:
    """The names under which the converter may know the output: in an exported graph, and in one stripped in place.

    There the converter moves an activation behind the last reshape before it, and gives its output the reshape's name.
    """
    names = (exported_name(source), live_name(source, has_bias))
    return names + (deployed_scope(source.layer.name) + "result",) if source.layer.kind is LayerKind.MATMUL else names


def exported_name(source: LayerSource) -> str:
    """How an exported graph calls the last operation that MNN fuses into the convolution."""
    name = source.call.fused.partition(":")[0]
    return name + "/int8" if source.layer.kind is LayerKind.MATMUL else name


def live_name(source: LayerSource, has_bias: bool) -> str:
    """How the same is called in a graph that was stripped in place."""
    return deployed_scope(source.layer.name) + (source.activation or ("biased" if has_bias else "convolution"))


def deployed_scope(layer_name: str) -> str:
    """The scope of a layer's deployed form in a graph."""
    return "{}/{}/deployed/".format(SCOPE, layer_name)


def _folded(source: LayerSource, numbers: Numbers) -> Tuple[np.ndarray, Optional[np.ndarray]]:
    """Factor of each channel and folded bias, float64."""
    channels = source.layer.channels
    bias = None if numbers.bias is None else np.reshape(numbers.bias, -1).astype(np.float64)
    if source.norm is None or numbers.variance is None:
        return np.ones(channels), bias
    factor = fold_factor(numbers.gamma, numbers.variance, source.norm.epsilon)
    offset = (np.zeros(channels) if bias is None else bias) - np.asarray(numbers.mean, np.float64)
    return factor, np.asarray(numbers.beta, np.float64) + offset * factor


def _without_tiny_steps(levels: np.ndarray, steps: np.ndarray, kind: LayerKind) -> Tuple[np.ndarray, np.ndarray]:
    """Raise steps that MNN cannot divide by; the weights are rounded anew, which makes almost all of them 0."""
    smallest = _SMALLEST_DEPTHWISE_STEP if kind is LayerKind.DEPTHWISE else SMALLEST_SCALE
    tiny = steps < smallest
    if tiny.any():
        levels = round_half_away(levels * _columns(np.where(tiny, steps / smallest, 1.0), levels)).astype(np.int32)
    return levels, np.where(tiny, smallest, steps).astype(np.float32)


def _whole_steps(bias: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """A depthwise bias that the converter, which truncates, takes for the nearest whole number of accumulator steps."""
    count = np.minimum(np.floor(np.abs(bias) / unit + 0.5), MOST_STEPS)
    return np.sign(bias) * np.where(count > 0, count + np.maximum(_OVER, count * 2.0 ** -21), 0) * unit


def _columns(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _flipped(grid: Grid, factor: np.ndarray) -> Grid:
    """The grid of the folded weights: a negative factor mirrors it."""
    if not (factor < 0).any():
        return grid
    most = max(-grid.lower, grid.upper)
    return Grid(grid.bits, -most, most)


def _convolution_kernel(kernel: np.ndarray, layer: Layer) -> np.ndarray:
    """From [outputs, ...] to what the deployed convolution reads."""
    if layer.kind is LayerKind.MATMUL:
        return np.ascontiguousarray(kernel.T)[None, None]
    return np.ascontiguousarray(np.moveaxis(kernel, 0, layer.channel_axis))
