"""What all quantizers of a TensorFlow graph share: which tensors are quantized, and how that is put into the graph."""
from __future__ import annotations

import functools
import logging
from typing import Dict, Optional, Sequence, Set

import tensorflow.compat.v1 as tf

from slimtrain.core import Grid, LayerCall, Role, activation_grid, place, select, weight_grid
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.checks import check_editable
from slimtrain.hooks.compositions import check_merged
from slimtrain.hooks.depthwise import bias_on_grid
from slimtrain.hooks.export import network_inputs
from slimtrain.hooks.fake_quant import Levels, fake_quantize, levels_of
from slimtrain.hooks.graph import ancestors
from slimtrain.hooks.grids import read_in_float
from slimtrain.hooks.helpers import LAYER_TYPES, get_op_name_of_type
from slimtrain.hooks.insertion import can_change_result, change_edge, change_edges, change_result, place_name
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.operations import Network, leaves, read_network, translate
from slimtrain.hooks.quantized_graph import Bits, QuantizedGraph
from slimtrain.hooks.rewriting import int8_safe
from slimtrain.hooks.state import SCOPE, Scale, make_variable, unless
from slimtrain.hooks.strip import STATE_PLACEHOLDER, is_quantized
from slimtrain.hooks.window import make_window

logger = logging.getLogger(__name__)


class GraphQuantizer(QuantizedGraph):
    """Simulates a graph as MNN will run it in int8; the base of the LSQ, EMA and OAQ quantizers.

    The constructor edits the forward graph, so it has to run after the model is built, and before the optimizer and
    before any session.

    Args:
        graph: the forward graph; None for the default graph.
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

    #: whether the optimizer learns the scales
    learned = True
    #: whether the results of layers are looked at while they train
    watches = False

    def __init__(self, graph: Optional[tf.Graph], is_training: Optional[bool], skip_quant_layers: Sequence[str],
                 skip_quant_flag: Sequence[str], bits: int, debug_info: bool, retain_sparsity: bool, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None) -> None:
        self.graph = graph if graph is not None else tf.get_default_graph()
        self.bits = Bits(bits if weight_bits is None else weight_bits,
                         bits if activation_bits is None else activation_bits)
        self.weight_grid = weight_grid(self.bits.weight)
        activation_grid(self.bits.activation)
        if is_training is not None and not isinstance(is_training, bool):
            raise TypeError("is_training must be None, True or False, got {!r}".format(is_training))
        if isinstance(output_names, str):
            raise TypeError("output_names must be a sequence of names, got the string {!r}".format(output_names))
        check_editable(self.graph)
        check_merged(self.graph)
        if is_quantized(self.graph):
            raise RuntimeError("the graph is quantized already: one quantizer per graph")
        self.output_names = tuple(output_names or ())
        #: tensors that feed the quantized layers -> the placeholders that an inference graph has for them
        self.inputs: Dict[str, str] = {}
        self._fixed_state = is_training
        self._unsigned = unsigned_activations
        self._retain_sparsity = retain_sparsity
        skipped = _skipped(self.graph, skip_quant_layers, skip_quant_flag)
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
            self._network = read_network(self.graph, output_names)
            self.layers = {name: layer for name, layer in self._network.layers.items()
                           if not layer.reason and name not in skipped}
            if not self.layers:
                raise ValueError("there is nothing to quantize: {}".format(_why_nothing(self._network, skipped)))
            self._skipped = skipped
            ops = translate(self.graph, self._network, self.layers.values())
            self._placement = place(ops, self._network.outputs or leaves(ops))
            self._safe = int8_safe(self._placement, ops)
            self._read_in_float = read_in_float(self.graph, self._network, self._placement, self.layers, self._safe)
            self._inner = ancestors(layer.input.op for layer in self.layers.values())
            self.inputs.update(network_inputs(self.graph, self._network.within, self._inner))
            self.clean = self.graph.as_graph_def()
            self.window = make_window(self.graph, next(iter(self.layers.values())).kernel)
            self.waiting = self.window.waiting()  #: bool tensor, while the network is trained in float; or None
            self._phases = {name: variable.read_value() for name, variable in self.window._asdict().items()
                            if variable is not None}
            self._is_training = self._state_tensor()
            self._grids = self._choose_grids()
            self._scales: Dict[Owner, Scale] = {}
            self._weight_scales: Dict[str, Scale] = {}
            self._kernels: Dict[str, tf.Tensor] = {}
            self._quantize_graph()
        if debug_info:
            self._log_layers()

    @property
    def is_training(self) -> tf.Tensor:
        """The placeholder to feed with True in training and False in tests; a constant when it was given."""
        return self._is_training

    @property
    def only_trains(self) -> bool:
        """Whether the graph was said to be for training alone."""
        return self._fixed_state is True

    # -- what the algorithms decide

    def weight_scale(self, layer: Layer, kernel: tf.Tensor) -> Scale:
        """The scale of a layer's weights, one per output channel."""
        raise NotImplementedError

    def activation_scale(self, owner: Owner, tensor: tf.Tensor, grid: Grid) -> Scale:
        """The scale of an activation, whose values are ``tensor``."""
        raise NotImplementedError

    def weight_levels(self, layer: Layer) -> Levels:
        """The levels of a layer's weights."""
        return levels_of(self.weight_grid)

    def activation_levels(self, owner: Owner) -> Levels:
        """The levels of an activation."""
        return levels_of(self._grids[owner], owner in self._placement.non_negative)

    def prepare(self) -> None:
        """Called before the graph is edited."""

    def watch(self, layer: Layer, result: tf.Tensor) -> tf.Operation:
        """What has to run whenever ``layer`` computed ``result`` from quantized values; only if ``watches``."""
        raise NotImplementedError

    # -- inside

    def _state_tensor(self) -> tf.Tensor:
        if self._fixed_state is None:
            return tf.placeholder(tf.bool, shape=[], name=STATE_PLACEHOLDER)
        return tf.constant(self._fixed_state, name=STATE_PLACEHOLDER)

    def _choose_grids(self) -> Dict[Owner, Grid]:
        read = {call.input for call in self._placement.calls}
        grids = {}
        for owner in set(self._placement.quantizers.values()):
            signed = owner not in self._placement.non_negative or not self._unsigned
            grids[owner] = activation_grid(self.bits.activation if owner in read else 8, signed)
        return grids

    def _quantize_graph(self) -> None:
        self.prepare()
        for layer in self.layers.values():
            change_edge(layer.op, 1, layer.name + "/kernel", functools.partial(self._weights, layer))
        for op in list(self.graph.get_operations()):
            for tensor in op.outputs:
                owner = self._placement.quantizers.get(tensor.name)
                if owner is not None:
                    self._quantize_activation(tensor, owner)
        for call in self._placement.calls:
            self._adjust_result(self.layers[call.layer], call)

    def _weights(self, layer: Layer, kernel: tf.Tensor) -> tf.Tensor:
        with tf.name_scope("{}/{}/".format(SCOPE, layer.name)):
            if self._retain_sparsity:
                kernel = kernel * self._keep(layer, kernel)
            scale = self.weight_scale(layer, kernel)
            self._kernels[layer.name] = kernel
            self._weight_scales[layer.name] = scale
        return fake_quantize(kernel, scale.used, self.weight_levels(layer), layer.channel_axis, self.learned,
                             self.waiting)

    def _keep(self, layer: Layer, kernel: tf.Tensor) -> tf.Tensor:
        keep = make_variable("keep", tf.ones(kernel.shape), kernel)
        flag = make_variable("keep_initialized", tf.constant(False), kernel)

        def initialize() -> tf.Tensor:
            with tf.control_dependencies([tf.assign(keep, tf.cast(tf.not_equal(kernel, 0), tf.float32))]):
                with tf.control_dependencies([tf.assign(flag, True)]):
                    return tf.constant(True)

        settled = unless(flag.read_value(), self.waiting)
        with tf.control_dependencies([tf.cond(settled, lambda: tf.constant(True), initialize)]):
            return keep.read_value()

    def _quantize_activation(self, tensor: tf.Tensor, owner: Owner) -> None:
        def change(values: tf.Tensor) -> tf.Tensor:
            if owner not in self._scales:
                with tf.name_scope("{}/{}/".format(SCOPE, owner.layer)):
                    self._scales[owner] = self.activation_scale(owner, values, self._grids[owner])
            return fake_quantize(values, self._scales[owner].used, self.activation_levels(owner), None, self.learned,
                                 self.waiting)

        if owner.role is not Role.OUTPUT or not self._is_end(tensor):
            change_edges(tensor, place_name(tensor), change)
        elif can_change_result(tensor):
            change_result(tensor, change)
        elif tensor.consumers():
            level = logging.WARNING if tensor.name in self._network.outputs else logging.INFO
            logger.log(level, "what is built on %s from now on reads it before its last quantization: put a "
                       "tf.identity behind it before the quantizer, and go on from there", tensor.op.name)
            change_edges(tensor, place_name(tensor), change)
        else:
            raise ValueError("the network ends at {!r}, a {}, behind which no quantization can be put that a loss "
                             "built later would read: put a tf.identity behind it before the quantizer, and go on "
                             "from there".format(tensor.op.name, tensor.op.type))

    def _is_end(self, tensor: tf.Tensor) -> bool:
        """Whether somebody may yet read ``tensor``, of whom the graph does not know."""
        return tensor.name in self._network.outputs or tensor.op.name not in self._inner

    def _adjust_result(self, layer: Layer, call: LayerCall) -> None:
        """Watch what a layer computes, and put the bias of a depthwise layer where MNN puts it."""
        norm = self._folded_norm(call)
        shifted = layer.kind is LayerKind.DEPTHWISE and not self.only_trains and (layer.bias is not None or norm)
        if not (shifted or self.watches):
            return

        def change(values: tf.Tensor) -> tf.Tensor:
            watcher = [self.watch(layer, values)] if self.watches else []
            if shifted:
                step = self._scales[call.input].used * self._weight_scales[layer.name].used
                values = bias_on_grid(values, step, layer.bias, norm, unless(self._is_training, self.waiting))
            with tf.control_dependencies(watcher):
                return tf.identity(values)

        change_edges(layer.op.outputs[0], layer.name + "/result", change)

    def _log_layers(self) -> None:
        for row in self.coverage().layers:
            logger.info("%s %s: %s%s", row.kind, row.name, row.state.value, row.reason and " because " + row.reason)


def _skipped(graph: tf.Graph, names: Sequence[str], flags: Sequence[str]) -> Set[str]:
    if isinstance(flags, str):
        raise TypeError("skip_quant_flag must be a sequence of strings, got the string {!r}".format(flags))
    known = get_op_name_of_type(graph, LAYER_TYPES)
    for flag in flags:
        if not any(flag in name for name in known):
            logger.warning("skip_quant_flag %r skips nothing: it is part of no layer's name", flag)
    return set(select(known, names)) | {name for name in known if any(flag in name for flag in flags)}


def _why_nothing(network: Network, skipped: Set[str]) -> str:
    reasons = ["{}: {}".format(name, layer.reason or "skipped") for name, layer in network.layers.items()]
    return "; ".join(reasons) or "the graph has no convolution or matrix product with a variable weight"
