"""Learned step size quantization: scales are trained by the optimizer, together with the weights."""
from __future__ import annotations

from typing import Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Grid, mse_scale
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.layers import Layer
from slimtrain.hooks.quantizer import GraphQuantizer
from slimtrain.hooks.state import Scale, started_scale


class LSQQuantizer(GraphQuantizer):
    """LSQ (Esser et al., arXiv 1902.08153): trainable scales, per output channel for weights, one per activation.

    Scales start at the least squared error of the first weights and activations that they see.

    Args:
        graph: the forward graph; None for the default graph. It is edited here, so construct the quantizer after the
            model, and before the optimizer and any session.
        is_training: None for a placeholder that has to be fed; a bool for a graph that only trains or only tests.
        skip_quant_layers: names or patterns of operations that stay float.
        skip_quant_flag: operations whose name contains one of these stay float.
        bits: bits of weights and activations, 2 to 8. Tensors that no quantized layer reads keep 8.
        debug_info: log what is quantized.
        retain_sparsity: weights that are zero at the first step stay zero.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        output_names: what leaves the network; None if everything in the graph belongs to it.

    Raises:
        ValueError: bad bits or names, nothing to quantize, or layers hidden in functions.
        TypeError: an argument of the wrong kind.
        RuntimeError: the graph is finalized, has gradients or a session, or is quantized already.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True,
                 output_names: Optional[Sequence[str]] = None) -> None:
        super().__init__(graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, output_names=output_names)

    def weight_scale(self, layer: Layer, kernel: tf.Tensor) -> Scale:
        axis, grid = layer.channel_axis, self.weight_grid
        return started_scale("weight_scale", [layer.channels], kernel, kernel,
                             lambda values: mse_scale(values, grid, axis), self.waiting)

    def activation_scale(self, owner: Owner, tensor: tf.Tensor, grid: Grid) -> Scale:
        return started_scale(owner.role.value + "_scale", [], self.layers[owner.layer].kernel, tensor,
                             lambda values: np.asarray(mse_scale(values, grid)), self.waiting)
