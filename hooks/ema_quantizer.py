"""Quantization by range tracking: activations keep a moving average of their range, weights their present one."""
from __future__ import annotations

import functools
from typing import Any, Callable, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Grid
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.layers import Layer
from slimtrain.hooks.quantizer import GraphQuantizer
from slimtrain.hooks.state import Scale, make_variable, max_abs, scale_to

#: share of the past in the moving average of a range
_DECAY = 0.99


class EMAQuantizer(GraphQuantizer):
    """Scales from ranges: the largest weight of each output channel, and a moving average of the largest activation.

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

    learned = False

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True,
                 output_names: Optional[Sequence[str]] = None) -> None:
        super().__init__(graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, output_names=output_names)

    def weight_scale(self, layer: Layer, kernel: tf.Tensor) -> Scale:
        axes = [axis for axis in range(kernel.shape.rank) if axis != layer.channel_axis]
        scale = max_abs(kernel, self.weight_grid, axes)
        return Scale(scale, scale, tf.constant(True))

    def activation_scale(self, owner: Owner, tensor: tf.Tensor, grid: Grid) -> Scale:
        name = owner.role.value + "_scale"
        beside = self.layers[owner.layer].kernel
        variable = make_variable(name, np.array(1.0, np.float32), beside)
        flag = make_variable(name + "_initialized", np.array(False), beside)

        def track() -> tf.Tensor:
            largest = tf.reduce_max(tf.abs(tf.stop_gradient(tensor)))
            now = scale_to(largest, grid)
            before, started = variable.read_value(), flag.read_value()
            averaged = tf.where(started, _DECAY * before + (1 - _DECAY) * now, now)
            usable = tf.is_finite(largest)  # one bad batch, or an empty one, would spoil the average for good
            after = tf.where(usable, averaged, before)
            with tf.control_dependencies([after]):
                with tf.control_dependencies([tf.assign(variable, after),
                                              tf.assign(flag, tf.logical_or(started, usable))]):
                    return tf.constant(True)

        with tf.control_dependencies([self._when_tracking(flag, track)]):
            used = tf.identity(variable.read_value())
        return Scale(used, variable.read_value(), flag.read_value())

    def _when_tracking(self, flag: Any, track: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Track in training, and at the very first run; in the window alone, where there is one."""
        rests = [] if self.only_trains else [tf.logical_and(flag.read_value(), tf.logical_not(self.is_training))]
        if self.window.frozen is not None:
            rests.append(tf.logical_and(flag.read_value(), self.window.frozen.read_value()))
        if self.waiting is not None:
            rests.append(self.waiting)
        if not rests:
            return track()
        return tf.cond(functools.reduce(tf.logical_or, rests), lambda: tf.constant(True), track)
