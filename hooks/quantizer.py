"""What all quantizers of a TensorFlow graph share: which tensors are quantized, where, and what becomes of them."""
from __future__ import annotations

import functools
import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    Coverage,
    Grid,
    LayerCall,
    LayerCoverage,
    LayerState,
    Role,
    activation_grid,
    place,
    select,
    weight_grid,
)
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.checks import check_editable
from slimtrain.hooks.compositions import check_merged
from slimtrain.hooks.deployment import DeployedLayer, LayerSource, read_layers
from slimtrain.hooks.depthwise import bias_on_grid
from slimtrain.hooks.export import export_model, network_inputs, write_params_file
from slimtrain.hooks.fake_quant import Levels, fake_quantize, levels_of
from slimtrain.hooks.graph import ancestors
from slimtrain.hooks.grids import InputGrid, read_in_float
from slimtrain.hooks.helpers import LAYER_TYPES, get_op_name_of_type
from slimtrain.hooks.insertion import can_change_result, change_edge, change_edges, change_result, place_name
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.operations import Network, leaves, read_network, translate
from slimtrain.hooks.rewriting import Rewriting, int8_safe
from slimtrain.hooks.simulation import simulate_network
from slimtrain.hooks.state import SCOPE, Scale, make_variable, unless
from slimtrain.hooks.strip import STATE_PLACEHOLDER, is_quantized, remember_deployed, strip_MNN_QAT_ops
from slimtrain.hooks.window import make_window
from slimtrain.proto import QuantMethod

logger = logging.getLogger(__name__)

class Bits(NamedTuple):
    """Bit widths, 2 to 8."""

    weight: int
    activation: int


class Grids(NamedTuple):
    """The levels of everything quantized, and how each layer is marked for the runtime."""

    weights: Dict[str, Grid]
    activations: Dict[Owner, Grid]
    methods: Dict[str, QuantMethod]


class GraphQuantizer:
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

    # -- the seed's interface

    @property
    def is_training(self) -> tf.Tensor:
        """The placeholder to feed with True in training and False in tests; a constant when it was given."""
        return self._is_training

    @property
    def only_trains(self) -> bool:
        """Whether the graph was said to be for training alone."""
        return self._fixed_state is True

    def init(self, sess: tf.Session) -> None:
        """Check that ``sess`` can run the quantized graph. Scales start by themselves, from the first batch.

        Raises:
            RuntimeError: the session is of another graph.
        """
        self._check_session(sess)

    def update(self, sess: tf.Session) -> None:
        """To be called after each training step; takes the decisions that an algorithm takes between steps."""
        self._check_session(sess)

    def strip_qat_ops(self) -> None:
        """Take the quantization off the graph, so that a ``GraphDef`` taken next is the one to deploy."""
        strip_MNN_QAT_ops(self.graph)

    def save_compress_params(self, filename: str, sess: tf.Session, append: bool = False) -> None:
        """Write MNN's parameter file for the graph that ``strip_qat_ops`` leaves, or for an exported one.

        Args:
            filename: of the file.
            sess: holds the trained variables.
            append: keep what the file has from other algorithms, such as pruning.

        Raises:
            RuntimeError: another graph's session, or not one training step was made.
            ParameterFileError: nothing to append to.
        """
        self._check_session(sess)
        rewriting = self._rewriting(sess)
        remember_deployed(self.graph, rewriting)
        write_params_file(filename, rewriting.deployed, append)

    def export(self, stem: str, sess: tf.Session, output_names: Optional[Sequence[str]] = None) -> None:
        """Write ``stem.pb``, a frozen inference graph, and ``stem.compress_params.bin``; both or none.

        Neither the graph nor the session is changed.

        Args:
            stem: path without suffix.
            sess: holds the trained variables.
            output_names: what leaves the network; None for those given to the constructor.

        Raises:
            ValueError: no output names.
            RuntimeError: another graph's session, or not one training step was made.
            ConversionError: a part of the graph has no inference form.
        """
        self._check_session(sess)
        names = tuple(output_names or self.output_names)
        if not names:
            raise ValueError("export needs output_names, here or in the constructor")
        export_model(stem, sess, self.clean, self._rewriting(sess), names)

    def simulate(self, sess: tf.Session, outputs: Sequence[str],
                 feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
        """Run the deployed network with the integer arithmetic of ``slimtrain.core``: what a device computes.

        Args:
            sess: holds the trained variables; neither it nor the graph is changed.
            outputs: names of tensors or operations.
            feed_dict: arrays by tensor or tensor name of the network's inputs; no training state is needed.

        Raises:
            RuntimeError: another graph's session, or not one training step was made.
        """
        self._check_session(sess)
        return simulate_network(sess, self.clean, self._rewriting(sess), outputs, feed_dict)

    def run_float(self, sess: tf.Session, outputs: Sequence[str],
                  feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
        """Run the network at inference with its weights as they are trained, without quantization.

        Args:
            sess, outputs, feed_dict: see :meth:`simulate`.

        Raises:
            RuntimeError: another graph's session.
        """
        self._check_session(sess)
        return simulate_network(sess, self.clean, Rewriting(self._network, self._safe, ()), outputs, feed_dict)

    def deployed_layers(self, sess: tf.Session) -> Tuple[DeployedLayer, ...]:
        """Every use of a quantized layer with the integers and scales that go to the device.

        Raises:
            RuntimeError: another graph's session, or not one training step was made.
        """
        self._check_session(sess)
        return self._rewriting(sess).deployed

    def _input_grids(self, sess: tf.Session) -> List[InputGrid]:
        """The grids of the tensors that are quantized without being the result of a quantized layer."""
        produced = {call.fused for call in self._placement.calls}
        owners = {tensor: owner for tensor, owner in self._placement.quantizers.items() if tensor not in produced}
        scales = sess.run({tensor: self._scales[owner].stored for tensor, owner in owners.items()})
        levels = self.current_grids(sess).activations
        return [InputGrid(tensor, float(scales[tensor]), levels[owner], tensor in self._read_in_float)
                for tensor, owner in owners.items()]

    # -- what was done

    def coverage(self) -> Coverage:
        """Each layer, its share of the weights, and why it is left float if it is."""
        rows = []
        for name, layer in self._network.layers.items():
            reason = layer.reason or ("it was skipped" if name in self._skipped else "")
            state = LayerState.FLOAT if reason else LayerState.INT8
            rows.append(LayerCoverage(name, layer.kind.value, layer.parameters, state, reason))
        return Coverage(tuple(rows))

    def ready(self, sess: tf.Session) -> bool:
        """Whether every scale has been set, so that the network can be exported."""
        scales = list(self._scales.values()) + list(self._weight_scales.values())
        return all(sess.run([scale.ready for scale in scales]))

    def followed(self) -> Dict[str, Any]:
        """What is worth watching while the network trains, tensors and numbers by name: scales and bits."""
        values: Dict[str, Any] = {key + "_bits": bits for key, bits in self.bits._asdict().items()}
        values.update(self._phases)
        values.update((name + "/weight_scale", scale.stored) for name, scale in self._weight_scales.items())
        values.update(("{}/{}_scale".format(owner.layer, owner.role.value), scale.stored)
                      for owner, scale in self._scales.items())
        return values

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

    def current_grids(self, sess: tf.Session) -> Grids:
        """The levels as they are now."""
        return Grids(dict.fromkeys(self.layers, self.weight_grid), self._grids,
                     dict.fromkeys(self.layers, QuantMethod.QAT))

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

    def _folded_norm(self, call: LayerCall) -> Any:
        """The batch norm that the converter folds into a layer, if there is one."""
        return next((norm for norm in self._network.norms.values() if norm.input.name == call.tensor
                     and call.fused != call.tensor), None)

    def _rewriting(self, sess: tf.Session) -> Rewriting:
        deployed = tuple(read_layers(self._sources(sess), sess))
        return Rewriting(self._network, self._safe, deployed, tuple(self._input_grids(sess)))

    def _sources(self, sess: tf.Session) -> List[LayerSource]:
        if not self.ready(sess):
            raise RuntimeError("the scales have not been set: run at least one training step, on finite numbers, or "
                               "restore a checkpoint of a quantized run, before saving or exporting")
        grids = self.current_grids(sess)
        return [self._source(call, grids) for call in self._placement.calls]

    def _source(self, call: LayerCall, grids: Grids) -> LayerSource:
        layer = self.layers[call.layer]
        return LayerSource(layer, call, self._folded_norm(call), self._kernels[layer.name],
                           self._weight_scales[layer.name].stored, self._scales[call.input].stored,
                           self._scales[call.output].stored, grids.weights[layer.name],
                           grids.activations[call.input], grids.activations[call.output], grids.methods[layer.name])

    def _check_session(self, sess: tf.Session) -> None:
        if getattr(sess, "graph", None) is not self.graph:
            raise RuntimeError("the session is not of the graph that was quantized")

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
