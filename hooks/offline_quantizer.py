"""Offline quantization of a frozen graph: scales from data that flow through it, without training."""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    ActivationMethod,
    Coverage,
    Grid,
    InputMoments,
    LayerCall,
    LayerState,
    Observation,
    WeightMethod,
    activation_grid,
    calibrated_scale,
    method_of,
    observe_together,
    place,
    select,
    weight_grid,
    weight_scales,
)
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.deployment import LayerSource, read_layers
from slimtrain.hooks.equalization import equalize as equalize_graph
from slimtrain.hooks.export import export_model
from slimtrain.hooks.frozen import PathLike, feeds_of, frozen_graph
from slimtrain.hooks.grids import InputGrid, read_in_float
from slimtrain.hooks.layers import Layer, layer_coverage
from slimtrain.hooks.operations import leaves, read_network, translate
from slimtrain.hooks.rewriting import Rewriting, int8_safe
from slimtrain.hooks.rounded_weights import ChosenWeight, add_layer_moments, rounded_by_data
from slimtrain.hooks.simulation import simulate_network
from slimtrain.hooks.weight_fake_quant import core_order
from slimtrain.proto import QuantMethod
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

_STORED_BITS = 8


class OfflineQuantizer:
    """Quantizes a frozen graph from data: ``calibrate(batches)``, then ``simulate`` or ``export``.

    The graph runs in float, in a session of its own, and each tensor that will carry a scale is observed, in memory
    that does not grow with the number of batches. The graph that was given is left as it is.

    Args:
        graph: a frozen ``GraphDef``, or the path of one (.pb): its weights are constants.
        skip_quant_layers: names or patterns of operations that stay float.
        bits: 2 to 8, for weights and activations.
        debug_info: log the scales when they are chosen.
        method: how activations find their scale: "ema", "kl", "admm", "mse" or "max_abs".
        weight_method: how weights find theirs: "max_abs", "admm" or "mse".
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        equalize: first let layers in a row trade the ranges of their channels (Nagel et al., ICCV 2019): ``clean`` is
            then a graph that computes what was given, but for float rounding.
        correct_bias: give the outputs of quantized layers the mean back that rounding takes (the same, section 4.2).
        adaptive_rounding: round weights by what the layers compute, not to the nearest level (objective of AdaRound,
            Nagel et al., ICML 2020); for few bits.
        output_names: what leaves the network; None for everything that nothing reads.

    Raises:
        ValueError: bad bits, methods or names; nothing to quantize.
        ConversionError: the file is no frozen graph.
    """

    def __init__(self, graph: Union[PathLike, Any], skip_quant_layers: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, *, method: Union[str, ActivationMethod] = ActivationMethod.MSE,
                 weight_method: Union[str, WeightMethod] = WeightMethod.MSE, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True, equalize: bool = False,
                 correct_bias: bool = False, adaptive_rounding: bool = False,
                 output_names: Optional[Sequence[str]] = None) -> None:
        self.method, self.weight_method = method_of(ActivationMethod, method), method_of(WeightMethod, weight_method)
        self.weight_grid = weight_grid(bits if weight_bits is None else weight_bits)
        self._activation_bits = activation_grid(bits if activation_bits is None else activation_bits).bits
        self._unsigned, self._debug = unsigned_activations, debug_info
        self._correct_bias, self._adaptive_rounding = correct_bias, adaptive_rounding
        self._open(frozen_graph(graph), output_names, skip_quant_layers)
        if equalize:
            equalize_graph(self.graph, self._network, self.layers)
            self._open(self.graph.as_graph_def(), output_names, skip_quant_layers)
        self.output_names = tuple(output_names or sorted(self._network.outputs))
        ops = translate(self.graph, self._network, self.layers.values())
        ends = self._network.outputs or leaves(ops)
        self.output_names = self.output_names or tuple(ends)
        self._placement = place(ops, ends)
        self._safe = int8_safe(self._placement, ops)
        self._read_in_float = read_in_float(self.graph, self._network, self._placement, self.layers, self._safe)
        self._watched: Dict[Owner, List[str]] = {}
        for tensor, owner in self._placement.quantizers.items():
            self._watched.setdefault(owner, []).append(tensor)
        self._seen: Dict[Owner, Observation] = {}
        self._scales: Dict[Owner, Tuple[float, Grid]] = {}
        self._weights: Dict[str, ChosenWeight] = {}

    def calibrate(self, batches: Iterable[Any]) -> int:
        """Run the graph on batches and choose all scales; starts from nothing each time.

        Args:
            batches: arrays by name of a placeholder, or one array for a graph with one placeholder.

        Returns:
            how many batches were seen.

        Raises:
            ValueError: there was no batch, or a tensor is not finite.
        """
        seen = {owner: Observation() for owner in self._watched}
        readers = self.layers.values() if self._correct_bias or self._adaptive_rounding else ()
        wanted = sorted({tensor for tensors in self._watched.values() for tensor in tensors}
                        | {layer.input.name for layer in readers})
        moments: Dict[str, InputMoments] = {}
        count = 0
        with tf.Session(graph=self.graph) as session:
            for batch in with_progress(batches, "calibrating"):
                values = dict(zip(wanted, session.run(wanted, feeds_of(self.graph, batch))))
                for owner, tensors in self._watched.items():
                    seen[owner] = _observed(seen[owner], [values[tensor] for tensor in tensors], owner)
                for layer in readers:
                    add_layer_moments(moments, layer, values[layer.input.name])
                count += 1
        if not count:
            raise ValueError("calibration needs at least one batch, got none")
        self._weights = self._choose_weights(moments)
        self._seen = seen
        for owner, state in seen.items():
            grid = self._grid(owner, state)
            self._scales[owner] = calibrated_scale(state, grid, self.method), grid
        logger.log(logging.INFO if self._debug else logging.DEBUG, "chose %d scales by %s from %d batches", len(seen),
                   self.method.value, count)
        return count

    def batches_seen(self) -> Dict[Tuple[str, str], int]:
        """How many batches each observer saw, by layer and role ("input" or "output"); empty before calibration."""
        return {(owner.layer, owner.role.value): state.batches for owner, state in self._seen.items()}

    def export(self, stem: PathLike) -> None:
        """Write ``stem.pb``, a frozen graph on its grid, and ``stem.compress_params.bin``; both or none.

        Raises:
            RuntimeError: the graph has not been calibrated.
            ConversionError: a part of the graph has no inference form.
        """
        os.makedirs(os.path.dirname(os.path.abspath(os.fspath(stem))), exist_ok=True)
        with tf.Session(graph=self.graph) as session:
            export_model(os.fspath(stem), session, self.clean, self._rewriting(session), self.output_names)

    def simulate(self, outputs: Sequence[str], feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
        """Run the deployed network with the integer arithmetic of ``slimtrain.core``: what a device computes.

        Args:
            outputs: names of tensors or operations.
            feed_dict: arrays by tensor or tensor name of the network's inputs.

        Raises:
            RuntimeError: the graph has not been calibrated.
        """
        with tf.Session(graph=self.graph) as session:
            return simulate_network(session, self.clean, self._rewriting(session), outputs, feed_dict)

    def coverage(self) -> Coverage:
        """Each layer, its share of the weights, and why it is left float if it is."""
        return layer_coverage(self._network.layers, self._skipped, LayerState.INT8)

    # -- inside

    def _open(self, graph_def: Any, output_names: Optional[Sequence[str]], skipped: Sequence[str]) -> None:
        """Take a graph, find its layers."""
        self.clean, self.graph = graph_def, tf.Graph()
        with self.graph.as_default():
            tf.import_graph_def(self.clean, name="")
            self._network = read_network(self.graph, output_names)
        layers = self._network.layers
        self._skipped = set(select(list(layers), skipped)) if skipped else set()
        self.layers: Dict[str, Layer] = {name: layer for name, layer in layers.items()
                                         if not layer.reason and name not in self._skipped}
        if not self.layers:
            raise ValueError("there is nothing to quantize: %s" % ("; ".join(
                "%s: %s" % (name, layer.reason or "skipped") for name, layer in layers.items())
                or "the graph has no convolution or matrix product with a constant weight"))

    def _grid(self, owner: Owner, seen: Observation) -> Grid:
        """What no quantized layer reads keeps 8 bits, in which the device stores it anyway."""
        read = {call.input for call in self._placement.calls}
        sources = all(self.graph.get_tensor_by_name(tensor).op.type == "Placeholder"
                      for tensor in self._watched[owner])
        positive = owner in self._placement.non_negative or (sources and seen.lowest >= 0)
        bits = self._activation_bits if owner in read else _STORED_BITS
        return activation_grid(bits, signed=not (positive and self._unsigned))

    def _rewriting(self, session: tf.Session) -> Rewriting:
        if not self._scales:
            raise RuntimeError("the graph has no scales yet: call calibrate(batches) first")
        with self.graph.as_default():
            sources = [self._source(call) for call in self._placement.calls]
        produced = {call.fused for call in self._placement.calls}
        grids = [InputGrid(tensor, *self._scales[owner], tensor in self._read_in_float)
                 for tensor, owner in self._placement.quantizers.items() if tensor not in produced]
        return Rewriting(self._network, self._safe, tuple(read_layers(sources, session)), tuple(grids))

    def _choose_weights(self, moments: Mapping[str, InputMoments]) -> Dict[str, ChosenWeight]:
        chosen = {}
        with tf.Session(graph=self.graph) as session:
            kernels = session.run({name: layer.kernel for name, layer in self.layers.items()})
            biases = session.run({name: layer.bias for name, layer in self.layers.items() if layer.bias is not None})
        for name, layer in self.layers.items():
            rows = np.transpose(kernels[name], core_order(layer))
            weight = ChosenWeight(kernels[name], weight_scales(rows, self.weight_grid, self.weight_method), None)
            chosen[name] = weight if name not in moments else rounded_by_data(
                layer, weight, biases.get(name), self.weight_grid, moments[name], adaptive=self._adaptive_rounding,
                correct_bias=self._correct_bias)
        return chosen

    def _source(self, call: LayerCall) -> LayerSource:
        weight = self._weights[call.layer]
        layer = self.layers[call.layer]
        if weight.bias is not None:
            layer = layer._replace(bias=tf.constant(weight.bias))
        (input_scale, input_grid), (output_scale, output_grid) = self._scales[call.input], self._scales[call.output]
        return LayerSource(
            layer, call, self._folded_norm(call), tf.constant(weight.kernel), tf.constant(weight.scales),
            tf.constant(input_scale), tf.constant(output_scale), self.weight_grid, input_grid, output_grid,
            QuantMethod.QAT)

    def _folded_norm(self, call: LayerCall) -> Optional[BatchNorm]:
        return next((norm for norm in self._network.norms.values() if norm.input.name == call.tensor
                     and call.fused != call.tensor), None)


def _observed(seen: Observation, values: List[np.ndarray], owner: Owner) -> Observation:
    """One batch of all tensors that share a scale."""
    try:
        return observe_together(seen, values)
    except ValueError as error:
        raise ValueError("%s of layer %r: %s" % (owner.role.value, owner.layer, error)) from error
