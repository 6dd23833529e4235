"""Offline quantization of a frozen graph: scales from data that flow through it, without training."""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    ActivationMethod,
    ConversionError,
    Coverage,
    Grid,
    LayerCall,
    LayerCoverage,
    LayerState,
    Observation,
    WeightMethod,
    activation_grid,
    calibrated_scale,
    method_of,
    observe_sample,
    place,
    sample_stride,
    select,
    weight_grid,
    weight_scales,
)
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.batch_norm import BatchNorm
from slimtrain.hooks.deployment import LayerSource, read_layers
from slimtrain.hooks.export import export_model
from slimtrain.hooks.layers import Layer
from slimtrain.hooks.operations import leaves, read_network, translate
from slimtrain.hooks.rewriting import Rewriting, int8_safe
from slimtrain.hooks.simulation import InputGrid, simulate_network
from slimtrain.proto import QuantMethod
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

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
        output_names: what leaves the network; None for everything that nothing reads.

    Raises:
        ValueError: bad bits, methods or names; nothing to quantize.
        ConversionError: the file is no frozen graph.
    """

    def __init__(self, graph: Union[PathLike, Any], skip_quant_layers: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, *, method: Union[str, ActivationMethod] = ActivationMethod.MSE,
                 weight_method: Union[str, WeightMethod] = WeightMethod.MSE, weight_bits: Optional[int] = None,
                 activation_bits: Optional[int] = None, unsigned_activations: bool = True,
                 output_names: Optional[Sequence[str]] = None) -> None:
        self.method, self.weight_method = method_of(ActivationMethod, method), method_of(WeightMethod, weight_method)
        self.weight_grid = weight_grid(bits if weight_bits is None else weight_bits)
        self._activation_bits = activation_grid(bits if activation_bits is None else activation_bits).bits
        self._unsigned, self._debug = unsigned_activations, debug_info
        self.clean = graph if isinstance(graph, tf.GraphDef) else _read(graph)
        self.graph = tf.Graph()
        with self.graph.as_default():
            tf.import_graph_def(self.clean, name="")
            self._network = read_network(self.graph, output_names)
        self.output_names = tuple(output_names or sorted(self._network.outputs))
        known = {name: layer for name, layer in self._network.layers.items() if not layer.reason}
        self._skipped = set(select(list(self._network.layers), skip_quant_layers)) if skip_quant_layers else set()
        self.layers: Dict[str, Layer] = {name: layer for name, layer in known.items() if name not in self._skipped}
        if not self.layers:
            raise ValueError("there is nothing to quantize: %s" % ("; ".join(
                "%s: %s" % (name, layer.reason or "skipped") for name, layer in self._network.layers.items())
                or "the graph has no convolution or matrix product with a constant weight"))
        ops = translate(self.graph, self._network, self.layers.values())
        ends = self._network.outputs or leaves(ops)
        self.output_names = self.output_names or tuple(ends)
        self._placement = place(ops, ends)
        self._safe = int8_safe(self._placement, ops)
        self._watched: Dict[Owner, List[str]] = {}
        for tensor, owner in self._placement.quantizers.items():
            self._watched.setdefault(owner, []).append(tensor)
        self._seen: Dict[Owner, Observation] = {}
        self._scales: Dict[Owner, Tuple[float, Grid]] = {}

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
        wanted = sorted({tensor for tensors in self._watched.values() for tensor in tensors})
        count = 0
        with tf.Session(graph=self.graph) as session:
            for batch in with_progress(batches, "calibrating"):
                values = dict(zip(wanted, session.run(wanted, self._feeds(batch))))
                for owner, tensors in self._watched.items():
                    seen[owner] = _observed(seen[owner], [values[tensor].reshape(-1) for tensor in tensors], owner)
                count += 1
        if not count:
            raise ValueError("calibration needs at least one batch, got none")
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
        produced = {call.fused for call in self._placement.calls}
        with tf.Session(graph=self.graph) as session:
            rewriting = self._rewriting(session)
            grids = [InputGrid(tensor, *self._scales[owner]) for tensor, owner in self._placement.quantizers.items()
                     if tensor not in produced]
            return simulate_network(session, self.clean, rewriting, grids, outputs, feed_dict)

    def coverage(self) -> Coverage:
        """Each layer, its share of the weights, and why it is left float if it is."""
        rows = []
        for name, layer in self._network.layers.items():
            reason = layer.reason or ("it was skipped" if name in self._skipped else "")
            state = LayerState.FLOAT if reason else LayerState.INT8
            rows.append(LayerCoverage(name, layer.kind.value, layer.parameters, state, reason))
        return Coverage(tuple(rows))

    # -- inside

    def _feeds(self, batch: Any) -> Dict[str, np.ndarray]:
        if isinstance(batch, Mapping):
            return {name if ":" in name else name + ":0": value for name, value in batch.items()}
        inputs = [op.outputs[0].name for op in self.graph.get_operations() if op.type == "Placeholder"]
        if len(inputs) != 1:
            raise ValueError("the graph has the placeholders %s: give each batch as a dict by name" % inputs)
        return {inputs[0]: np.asarray(batch)}

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
        kernels = session.run({name: layer.kernel for name, layer in self.layers.items()})
        with self.graph.as_default():
            sources = [self._source(call, kernels[call.layer]) for call in self._placement.calls]
        return Rewriting(self._network, self._safe, tuple(read_layers(sources, session)))

    def _source(self, call: LayerCall, kernel: np.ndarray) -> LayerSource:
        layer = self.layers[call.layer]
        rows = np.moveaxis(kernel, layer.channel_axis, 0)
        steps = tf.constant(weight_scales(rows, self.weight_grid, self.weight_method))
        (input_scale, input_grid), (output_scale, output_grid) = self._scales[call.input], self._scales[call.output]
        return LayerSource(layer, call, self._folded_norm(call), layer.kernel, steps, tf.constant(input_scale),
                           tf.constant(output_scale), self.weight_grid, input_grid, output_grid, QuantMethod.QAT)

    def _folded_norm(self, call: LayerCall) -> Optional[BatchNorm]:
        return next((norm for norm in self._network.norms.values() if norm.input.name == call.tensor
                     and call.fused != call.tensor), None)


def _observed(seen: Observation, flat: List[np.ndarray], owner: Owner) -> Observation:
    """One batch of all tensors that share a scale."""
    part = np.concatenate([value[::sample_stride(value.size)] for value in flat])
    try:
        return observe_sample(seen, min(float(value.min()) for value in flat),
                              max(float(value.max()) for value in flat), part)
    except ValueError as error:
        raise ValueError("%s of layer %r: %s" % (owner.role.value, owner.layer, error)) from error


def _read(path: PathLike) -> Any:
    graph_def = tf.GraphDef()
    try:
        with open(os.fspath(path), "rb") as file:
            graph_def.ParseFromString(file.read())
    except Exception as error:  # protobuf's errors have no class that all its versions share
        raise ConversionError("cannot read the frozen graph %s: %s" % (os.fspath(path), error)) from error
    if not graph_def.node:
        raise ConversionError("%s holds no graph" % os.fspath(path))
    return graph_def
