"""Overflow-aware quantization: LSQ whose levels narrow, layer by layer, until sums of products fit 16 bits."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Grid
from slimtrain.core import Quantizer as Owner
from slimtrain.core.overflow import LARGEST_SUM, Clamp, narrowed_clamp
from slimtrain.hooks.fake_quant import Levels
from slimtrain.hooks.layers import Layer
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.overflow import peak
from slimtrain.hooks.quantized_graph import Grids
from slimtrain.hooks.state import SCOPE, Scale, make_variable
from slimtrain.proto import QuantMethod

logger = logging.getLogger(__name__)


class OAQQuantizer(LSQQuantizer):
    """LSQ with a clamp per layer, shared by its weights and its input, that narrows while 16-bit sums overflow.

    A narrower clamp widens the scale by the same factor, so that the range stays and learning goes on from there.
    The overflow test reads the convolution's own output. A layer that would need a clamp below ``min_clamp_value`` is
    quantized plainly, with sums of 32 bits.

    Args:
        graph: the forward graph; None for the default graph. It is edited here, so construct the quantizer after the
            model, and before the optimizer and any session.
        is_training: None for a placeholder that has to be fed; a bool for a graph that only trains or only tests.
        skip_quant_layers: names or patterns of operations that stay float.
        skip_quant_flag: operations whose name contains one of these stay float.
        bits: bits of weights and activations, 2 to 8. Tensors that no quantized layer reads keep 8.
        min_clamp_value: the smallest clamp, for instance 31 for levels of at least 6 bits.
        debug_info: log what is quantized.
        retain_sparsity: weights that are zero at the first step stay zero.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative an unsigned range.
        output_names: what leaves the network; None if everything in the graph belongs to it.

    Raises:
        ValueError: bad bits, clamp or names, nothing to quantize, or layers hidden in functions.
        TypeError: an argument of the wrong kind.
        RuntimeError: the graph is finalized, has gradients or a session, or is quantized already.
    """

    watches = True

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 min_clamp_value: int = 0, debug_info: bool = False, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None) -> None:
        if not isinstance(min_clamp_value, int) or not 0 <= min_clamp_value <= 127:
            raise ValueError("min_clamp_value must be an integer from 0 to 127, got {!r}".format(min_clamp_value))
        self.min_clamp_value = min_clamp_value
        super().__init__(graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, output_names=output_names)

    def update(self, sess: tf.Session) -> None:
        """Narrow the clamps of layers whose sums overflowed since the last call."""
        super().update(sess)
        if self.window.frozen is not None and sess.run(self.window.frozen):
            return  # a narrower clamp would change the scales; a layer that overflows now is deployed with 32 bits
        peaks, levels, flags = sess.run([self._peaks, self._clamps, self._fits])
        clamps = [Clamp(int(level), bool(flag)) for level, flag in zip(levels, flags)]
        narrowed = [narrowed_clamp(clamp, value, self.min_clamp_value, self._largest)
                    for clamp, value in zip(clamps, peaks)]
        if narrowed != clamps:
            for name, before, after in zip(self.layers, clamps, narrowed):
                if before != after:
                    logger.info("%s: sums overflow 16 bits, clamp %d becomes %d%s", name, before.level, after.level,
                                "" if after.fits_int16 else " with sums of 32 bits")
            sess.run(self._set_clamps, {self._new_clamps: [clamp.level for clamp in narrowed],
                                        self._new_fits: [clamp.fits_int16 for clamp in narrowed]})

    def followed(self) -> Dict[str, Any]:
        """As for LSQ, and the clamp of each layer."""
        return {**super().followed(), **{name + "/clamp": clamp for name, clamp in self._clamp_of.items()}}

    # -- what the algorithm decides

    def prepare(self) -> None:
        """Make the clamps: one vector for all layers, so that they change in one assignment."""
        count, beside = len(self.layers), next(iter(self.layers.values())).kernel
        self._largest = self.weight_grid.upper
        with tf.name_scope(SCOPE + "/overflow/"):
            clamps = make_variable("clamps", np.full(count, self._largest, np.float32), beside)
            fits = make_variable("fits_int16", np.ones(count, np.bool_), beside)
            self._clamps, self._fits = clamps.read_value(), fits.read_value()
            self._peak_variables = [make_variable("peak_{}".format(index), np.array(0, np.float32), beside)
                                    for index in range(count)]
            self._peaks = [variable.read_value() for variable in self._peak_variables]
            self._new_clamps = tf.placeholder(tf.float32, [count], name="new_clamps")
            self._new_fits = tf.placeholder(tf.bool, [count], name="new_fits_int16")
            with tf.control_dependencies([tf.assign(clamps, self._new_clamps), tf.assign(fits, self._new_fits)]):
                self._set_clamps = tf.group(*[tf.assign(variable, 0.0) for variable in self._peak_variables])
            self._clamp_of = dict(zip(self.layers, tf.unstack(self._clamps, num=count)))

    def weight_scale(self, layer: Layer, kernel: tf.Tensor) -> Scale:
        scale = super().weight_scale(layer, kernel)
        return _widened(scale, self._largest / self._clamp_of[layer.name])

    def activation_scale(self, owner: Owner, tensor: tf.Tensor, grid: Grid) -> Scale:
        scale = super().activation_scale(owner, tensor, grid)
        levels = self.activation_levels(owner)
        return _widened(scale, float(grid.upper) / levels.upper) if self._readers(owner) else scale

    def weight_levels(self, layer: Layer) -> Levels:
        clamp = self._clamp_of[layer.name]
        return Levels(-clamp, clamp)

    def activation_levels(self, owner: Owner) -> Levels:
        readers = self._readers(owner)
        if not readers:
            return super().activation_levels(owner)
        clamp = tf.reduce_min(tf.stack([self._clamp_of[name] for name in readers]))
        positive = owner in self._placement.non_negative
        if self._grids[owner].lower == 0:
            return Levels(tf.zeros_like(clamp), self._unsigned_upper(clamp), positive)
        return Levels(-clamp, clamp, positive)

    def watch(self, layer: Layer, result: tf.Tensor) -> tf.Operation:
        """Keep the largest magnitude of the layer's integer sums."""
        variable = self._peak_variables[list(self.layers).index(layer.name)]
        call = next(call for call in self._placement.calls if call.layer == layer.name)
        step = self._scales[call.input].used * self._weight_scales[layer.name].used
        watched = self.is_training if self.waiting is None else tf.logical_and(
            self.is_training, tf.logical_not(self.waiting))
        now = peak(tf.stop_gradient(result), tf.stop_gradient(step)) * tf.cast(watched, tf.float32)
        return tf.assign(variable, tf.maximum(variable.read_value(), now)).op

    def current_grids(self, sess: tf.Session) -> Grids:
        """The levels as they are now, and which layers are known to fit 16 bits."""
        peaks, levels, flags = sess.run([self._peaks, self._clamps, self._fits])
        clamps = {name: int(level) for name, level in zip(self.layers, levels)}
        methods = {name: QuantMethod.OVERFLOW_AWARE if flag and value < LARGEST_SUM + 0.5 else QuantMethod.QAT
                   for name, flag, value in zip(self.layers, flags, peaks)}
        weights = {name: Grid(self.bits.weight, -clamp, clamp) for name, clamp in clamps.items()}
        activations = dict(self._grids)
        for owner in activations:
            readers = self._readers(owner)
            if readers:
                activations[owner] = self._narrowed(activations[owner], min(clamps[name] for name in readers))
        return Grids(weights, activations, methods)

    # -- inside

    def _choose_grids(self) -> Dict[Owner, Grid]:
        """As for LSQ, but symmetric where they are signed: a clamp has one magnitude."""
        largest = self.weight_grid.upper
        self.weight_grid = Grid(self.bits.weight, -largest, largest)
        return {owner: grid if grid.lower == 0 else Grid(grid.bits, -grid.upper, grid.upper)
                for owner, grid in super()._choose_grids().items()}

    def _readers(self, owner: Owner) -> List[str]:
        """The layers whose input ``owner`` quantizes."""
        return [call.layer for call in self._placement.calls if call.input == owner]

    def _unsigned_upper(self, clamp: Any) -> Any:
        """Unsigned ranges keep their ratio to signed ones: 15 of 4 bits where the signed clamp is 7."""
        return 2 * clamp + 1

    def _narrowed(self, grid: Grid, clamp: int) -> Grid:
        if grid.lower == 0:
            return grid._replace(upper=int(self._unsigned_upper(clamp)))
        return grid._replace(lower=-clamp, upper=clamp)


def _widened(scale: Scale, factor: Any) -> Scale:
    return Scale(scale.used * factor, scale.stored * factor, scale.ready)
