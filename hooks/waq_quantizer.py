"""Winograd-aware quantization: LSQ for convolutions that the device computes by Winograd's transforms in int8."""
from __future__ import annotations

import dataclasses
import logging
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import LayerCall, WinogradForm, WinogradScales, same_padding
from slimtrain.core.winograd_choice import WinogradChoice, check_sqnr, choose_form, forms_of_kernel, try_form
from slimtrain.hooks.deployment import DeployedLayer
from slimtrain.hooks.insertion import change_edges
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.rewriting import Rewriting
from slimtrain.hooks.state import SCOPE, Scale, in_units, make_variable, positive, unless
from slimtrain.hooks.winograd import Scales, ratios, winograd_conv
from slimtrain.proto import QuantMethod

logger = logging.getLogger(__name__)

_MOST_IMAGES = 16


class _Transformed(NamedTuple):
    """What belongs to a layer that may be computed by Winograd's transforms."""

    forms: Tuple[WinogradForm, ...]
    learned: tf.Tensor   #: [most positions, 1 + O], readable at any time
    unit: tf.Tensor      #: int32, the unit of the chosen form; 0 for plain int8
    sqnr_db: tf.Tensor   #: [forms]
    ready: tf.Tensor     #: bool
    call: LayerCall


class WAQQuantizer(LSQQuantizer):
    """LSQ that also trains the scales of transformed inputs and weights, one per position of a tile.

    Fernandez-Marques et al., arXiv 2002.10711. When the scales start, every dense convolution of stride 1 is tried as
    F(4, k) and F(2, k): it takes the first of them whose output is near enough to that of plain int8, or stays plain
    int8. ``choices`` says what became of each. Transformed numbers have 8 bits, whatever ``bits`` says.

    Args:
        graph: the forward graph; None for the default graph. It is edited here, so construct the quantizer after the
            model, and before the optimizer and any session.
        is_training: None for a placeholder that has to be fed; a bool for a graph that only trains or only tests.
        skip_quant_layers: names or patterns of operations that stay float.
        skip_quant_flag: operations whose name contains one of these stay float.
        bits: bits of weights and activations, 2 to 8. Tensors that no quantized layer reads keep 8.
        debug_info: log what is quantized.
        retain_sparsity: weights that are zero at the first step stay zero.
        min_sqnr_db: how near the output of a transformed layer must be to that of plain int8 before training, in dB.
        weight_bits, activation_bits: instead of ``bits``.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        output_names: what leaves the network; None if everything in the graph belongs to it.

    Raises:
        ValueError: bad bits or names, nothing to quantize, layers hidden in functions, ``min_sqnr_db`` no number.
        TypeError: an argument of the wrong kind.
        RuntimeError: the graph is finalized, has gradients or a session, or is quantized already.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, min_sqnr_db: float = 25.0,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None) -> None:
        check_sqnr(min_sqnr_db)
        self.min_sqnr_db = min_sqnr_db
        self._transformed: Dict[str, _Transformed] = {}
        super().__init__(graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
                         weight_bits=weight_bits, activation_bits=activation_bits,
                         unsigned_activations=unsigned_activations, output_names=output_names)
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
            self._ratios = {name: self._ratios_of(name) for name in self._transformed}

    def choices(self, sess: tf.Session) -> List[WinogradChoice]:
        """What was decided about each layer that could be computed by Winograd's transforms.

        Raises:
            RuntimeError: another graph's session, or nothing is decided yet.
        """
        self._check_session(sess)
        if not self.ready(sess):
            raise RuntimeError("nothing is decided yet: run at least one training step, or restore a checkpoint")
        values = sess.run({name: (each.unit, each.sqnr_db) for name, each in self._transformed.items()})
        return [choose_form(name, dict(zip(self._transformed[name].forms, map(float, sqnr_db))), self.min_sqnr_db)
                for name, (_, sqnr_db) in values.items()]

    def ready(self, sess: tf.Session) -> bool:
        flags = [each.ready for each in self._transformed.values()]
        return super().ready(sess) and all(sess.run(flags))

    # -- inside

    def _adjust_result(self, layer: Layer, call: LayerCall) -> None:
        forms = _possible_forms(layer)
        if not forms:
            super()._adjust_result(layer, call)
            return

        def change(plain: tf.Tensor) -> tf.Tensor:
            x, kernel = layer.op.inputs[0], layer.op.inputs[1]
            scales = self._scales[call.input], self._weight_scales[layer.name]
            with tf.name_scope("{}/{}/".format(SCOPE, layer.name)):
                learned, unit = self._start(layer, call, forms, scales)
            used = Scales(scales[0].used, scales[1].used, learned)
            result = self._in_form(layer, forms, unit, (x, kernel), used)
            result.set_shape(plain.shape)
            return result

        change_edges(layer.op.outputs[0], layer.name + "/result", change)

    def _in_form(self, layer: Layer, forms: Sequence[WinogradForm], unit: tf.Tensor,
                 operands: Tuple[tf.Tensor, tf.Tensor], scales: Scales) -> tf.Tensor:
        """The layer in the form that ``unit`` names; only that one is computed."""
        x, kernel = operands
        padding = layer.op.get_attr("padding")
        if not forms:
            return tf.nn.conv2d(x, kernel, strides=[1, 1, 1, 1], padding=padding.decode())
        return tf.cond(tf.equal(unit, forms[0].unit),
                       lambda: winograd_conv(x, kernel, scales, forms[0], padding),
                       lambda: self._in_form(layer, forms[1:], unit, operands, scales))

    def _start(self, layer: Layer, call: LayerCall, forms: Tuple[WinogradForm, ...],
               scales: Tuple[Scale, Scale]) -> Tuple[tf.Tensor, tf.Tensor]:
        """The learned scales, and the unit of the chosen form; both are set by the first values that come."""
        x, kernel = layer.op.inputs[0], layer.op.inputs[1]
        shape = [max(form.positions for form in forms), 1 + layer.channels]
        positions = make_variable("winograd_positions", np.ones(shape, np.float32), layer.kernel, trainable=True)
        units = make_variable("winograd_units", np.ones(shape, np.float32), layer.kernel)
        sizes = make_variable("winograd_sizes", np.ones([1, shape[1]], np.float32), layer.kernel)
        unit = make_variable("winograd_unit", np.array(0, np.int32), layer.kernel)
        sqnr = make_variable("winograd_sqnr_db", np.zeros(len(forms), np.float32), layer.kernel)
        flag = make_variable("winograd_initialized", np.array(False), layer.kernel)
        padding = layer.op.get_attr("padding")

        def start(*arrays: np.ndarray) -> Tuple[np.ndarray, ...]:
            return _started(layer.name, forms, self.min_sqnr_db, padding, shape, arrays)

        def initialize() -> tf.Tensor:
            values = [tf.stop_gradient(value) for value in (x, kernel, scales[0].used, scales[1].used)]
            kinds = [tf.float32, tf.float32, tf.float32, tf.int32, tf.float32]
            results = tf.numpy_function(start, values, kinds)
            targets = (positions, units, sizes, unit, sqnr)
            assigns = [tf.assign(target, tf.reshape(value, target.shape)) for target, value in zip(targets, results)]
            with tf.control_dependencies(assigns):
                with tf.control_dependencies([tf.assign(flag, True)]):
                    return tf.constant(True)

        settled = unless(flag.read_value(), self.waiting)
        with tf.control_dependencies([tf.cond(settled, lambda: tf.constant(True), initialize)]):
            moving = positive(in_units(positions.read_value(), sizes.read_value()))
            learned, chosen = moving * units.read_value(), unit.read_value()
        stored = positive(positions.read_value() * sizes.read_value()) * units.read_value()
        self._transformed[layer.name] = _Transformed(forms, stored, unit.read_value(), sqnr.read_value(),
                                                     flag.read_value(), call)
        return learned, chosen

    def _rewriting(self, sess: tf.Session) -> Rewriting:
        rewriting = super()._rewriting(sess)
        values = sess.run({name: (each.unit, self._ratios[name]) for name, each in self._transformed.items()})
        return rewriting._replace(deployed=tuple(
            self._with_form(deployed, *values[deployed.source.layer.name])
            if deployed.source.layer.name in values else deployed for deployed in rewriting.deployed))

    def _ratios_of(self, name: str) -> Dict[int, tf.Tensor]:
        """The ratios of every form that a layer could have, by its unit."""
        each = self._transformed[name]
        before = self._scales[each.call.input].stored, self._weight_scales[name].stored
        joined = tf.concat([tf.reshape(before[0], [1]), before[1]], 0)
        return {form.unit: ratios(each.learned[:form.positions], joined, form) for form in each.forms}

    def _with_form(self, deployed: DeployedLayer, unit: int, by_unit: Dict[int, np.ndarray]) -> DeployedLayer:
        form = next((form for form in self._transformed[deployed.source.layer.name].forms if form.unit == unit), None)
        if form is None:
            return deployed
        found = by_unit[form.unit].astype(np.float64)
        params = dataclasses.replace(deployed.params, method=QuantMethod.WINOGRAD_AWARE,
                                     winograd=WinogradScales(form, found[:, 0], found[:, 1:]))
        return deployed._replace(params=params)


def _possible_forms(layer: Layer) -> Tuple[WinogradForm, ...]:
    """The forms that can compute a layer, the one with the fewest products first; () when none can."""
    if layer.kind is not LayerKind.CONV:
        return ()
    if any(set(layer.op.get_attr(name)) != {1} for name in ("strides", "dilations")):
        return ()
    return forms_of_kernel(layer.kernel.shape.as_list()[:2])


def _started(name: str, forms: Sequence[WinogradForm], min_sqnr_db: float, padding: bytes, shape: Sequence[int],
             arrays: Sequence[np.ndarray]) -> Tuple[np.ndarray, ...]:
    """The start of the learned scales, their units and sizes, the unit of the chosen form, the result of each form."""
    x, kernel, input_scale, weight_scales = arrays
    pads = same_padding(x.shape[1], kernel.shape[0], 1) if padding == b"SAME" else (0, 0)
    images = np.transpose(x[:_MOST_IMAGES], (0, 3, 1, 2)).astype(np.float64)
    weight = np.transpose(kernel, (3, 2, 0, 1)).astype(np.float64)
    trials = {form: try_form(images, weight, form, float(input_scale), weight_scales, (pads, pads)) for form in forms}
    choice = choose_form(name, {form: trial.sqnr_db for form, trial in trials.items()}, min_sqnr_db)
    logger.info("%s: %s (%s)", name, choice.form or "plain int8, because of " + choice.reason,
                ", ".join("{} {:.1f} dB".format(form, value) for form, value in choice.sqnr_db.items()))
    before = np.concatenate([[input_scale], weight_scales]).astype(np.float32)
    sizes = np.exp2(np.round(np.log2(before))).astype(np.float32)[None]
    positions, units = np.tile(before, (shape[0], 1)) / sizes, np.ones(shape, np.float32)
    if choice.form is not None:
        units[:choice.form.positions] = trials[choice.form].scales / before
    results = np.array([trials[form].sqnr_db for form in forms], np.float32)
    return positions, units, sizes, np.array(choice.form.unit if choice.form else 0, np.int32), results
