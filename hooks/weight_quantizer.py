"""Low-bit storage of weights, trained or not: computed in float on the device, a quarter to a sixteenth of the size."""
from __future__ import annotations

import functools
import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    Coverage,
    LayerState,
    StoredWeight,
    WeightMode,
    largest_level,
    replace_all,
    select,
    usable_block,
)
from slimtrain.hooks.checks import check_editable
from slimtrain.hooks.compositions import check_merged
from slimtrain.hooks.export import float_graph, network_inputs, params_bytes
from slimtrain.hooks.graph import ancestors
from slimtrain.hooks.insertion import change_edge, strip
from slimtrain.hooks.layers import Layer, LayerKind, layer_coverage
from slimtrain.hooks.operations import read_network
from slimtrain.hooks.stacking import contributed
from slimtrain.hooks.strip import is_quantized
from slimtrain.hooks.weight_fake_quant import core_shape, store_weight, stored_kernel
from slimtrain.hooks.window import make_window
from slimtrain.proto import WeightOnlyParams, quantize_algorithm, save_algorithm

logger = logging.getLogger(__name__)

# what the converter calls the operator that a matrix product becomes
_LINEAR_SUFFIX = "__matmul_converted"


class Storage(NamedTuple):
    """How a weight is stored."""

    bits: int
    mode: WeightMode
    block_size: int   #: 0 for a scale per output channel


class WeightQuantizer:
    """Trains a graph with its weights on the grid that MNN stores them on, or shows what storing does without training.

    The grid is the one that MNN's converter computes from the weights, so the file holds exactly the integers that were
    trained. Activations stay float, and nothing is added to the variables. The constructor edits the forward graph, so
    it has to run after the model is built, and before the optimizer and before any session.

    Args:
        graph: the forward graph; None for the default graph.
        bits: 2 to 8.
        debug_info: log how each layer is stored.
        mode: "symmetric", or "asymmetric" for a minimum and a scale of each channel (zero is then not on the grid: not
            for pruned models).
        layer_bits: bits of layers by name or pattern of the operation (``{"features/*": 4, "head/MatMul": 8}``),
            instead of ``bits``; later patterns win.
        skip_quant_layers: names or patterns of operations that stay float.
        block_size: input channels that share a scale, a multiple of 16; 0 for one scale per output channel. Layers
            that it does not divide have one per output channel.
        output_names: what leaves the network; None if everything in the graph belongs to it.

    Raises:
        ValueError: bits outside 2..8, an unknown mode or layer name, a bad block size, nothing to store, or layers
            hidden in functions.
        TypeError: an argument of the wrong kind.
        RuntimeError: the graph is finalized, has gradients or a session, or is quantized already.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, bits: int = 8, debug_info: bool = False,
                 mode: Union[str, WeightMode] = WeightMode.SYMMETRIC, *, layer_bits: Optional[Mapping[str, int]] = None,
                 skip_quant_layers: Sequence[str] = (), block_size: int = 0,
                 output_names: Optional[Sequence[str]] = None) -> None:
        self.graph = graph if graph is not None else tf.get_default_graph()
        if isinstance(output_names, str):
            raise TypeError("output_names must be a sequence of names, got the string {!r}".format(output_names))
        _check(bits, mode, layer_bits, block_size)
        check_editable(self.graph)
        check_merged(self.graph)
        if is_quantized(self.graph):
            raise RuntimeError("the graph is quantized already: one quantizer per graph")
        self.output_names = tuple(output_names or ())
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
            self._network = read_network(self.graph, output_names)
            self._skipped = set(select(list(self._network.layers), list(skip_quant_layers)))
            self.layers = {name: layer for name, layer in self._network.layers.items()
                           if not layer.reason and name not in self._skipped}
            if not self.layers:
                raise ValueError("there is nothing to store in few bits: {}".format(self._why_nothing()))
            self.storages = self._storages(bits, WeightMode(mode), layer_bits or {}, block_size)
            #: tensors that feed the layers -> the placeholders that an inference graph has for them
            self.inputs = network_inputs(self.graph, self._network.within,
                                         ancestors(layer.input.op for layer in self.layers.values()))
            self.clean = self.graph.as_graph_def()
            self.window = make_window(self.graph, next(iter(self.layers.values())).kernel)
            for name, layer in self.layers.items():
                change_edge(layer.op, 1, name + "/kernel", functools.partial(self._stored, layer))
        if debug_info:
            for name, storage in self.storages.items():
                logger.info("%s: %d bits, %s%s", name, storage.bits, storage.mode.value,
                            ", blocks of %d" % storage.block_size if storage.block_size else "")

    def _storages(self, bits: int, mode: WeightMode, layer_bits: Mapping[str, int],
                  block_size: int) -> Dict[str, Storage]:
        widths = dict.fromkeys(self.layers, bits)
        for pattern, width in layer_bits.items():
            widths.update(dict.fromkeys(select(list(self.layers), [pattern]), width))
        return {name: Storage(widths[name], mode, usable_block(core_shape(layer), block_size))
                for name, layer in self.layers.items()}

    # -- the seed's interface

    def init(self, sess: tf.Session) -> None:
        """Check that ``sess`` can run the graph; there are no variables to initialize.

        Raises:
            RuntimeError: the session is of another graph.
        """
        self._check_session(sess)

    def update(self, sess: tf.Session) -> None:
        """To be called after each training step; the grid follows the weights by itself."""
        self._check_session(sess)

    def strip_wq_ops(self) -> None:
        """Give back the plain float graph, so that a ``GraphDef`` taken next is the one to deploy."""
        strip_wq_ops(self.graph)

    def save_compress_params(self, filename: str, append: bool = False) -> None:
        """Write MNN's parameter file for a frozen graph of the stripped network, or for an exported one.

        Each layer's bits go into it, so that converting needs no further option.

        Args:
            filename: of the file.
            append: keep what the file has from other algorithms, such as pruning.

        Raises:
            ParameterFileError: nothing to append to.
        """
        save_algorithm(filename, quantize_algorithm(self._params()), append)

    def export(self, stem: str, sess: tf.Session, output_names: Optional[Sequence[str]] = None) -> None:
        """Write ``stem.pb``, a frozen inference graph, and ``stem.compress_params.bin``; both or none.

        Neither the graph nor the session is changed.

        Args:
            stem: path without suffix.
            sess: holds the trained variables.
            output_names: what leaves the network; None for those given to the constructor.

        Raises:
            ValueError: no output names.
            RuntimeError: another graph's session.
            ConversionError: a part of the graph has no inference form.
        """
        self._check_session(sess)
        names = tuple(output_names or self.output_names)
        if not names:
            raise ValueError("export needs output_names, here or in the constructor")
        frozen = self._frozen(sess, names)
        params = params_bytes([quantize_algorithm(self._params()), *contributed(self.graph, sess)])
        replace_all([(stem + ".pb", frozen.SerializeToString(deterministic=True)),
                     (stem + ".compress_params.bin", params)])

    # -- results

    def stored_weights(self, sess: tf.Session) -> Dict[str, StoredWeight]:
        """The integers, scales and minimums of each layer, [O, I, ...], from the weights as they are now."""
        self._check_session(sess)
        kernels = sess.run({name: layer.kernel for name, layer in self.layers.items()})
        return {name: stored_kernel(kernels[name], layer, *self.storages[name])[0]
                for name, layer in self.layers.items()}

    def simulate(self, sess: tf.Session, outputs: Sequence[str],
                 feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
        """Run the deployed network, with its stored weights and in float32.

        Args:
            sess: holds the trained variables; neither it nor the graph is changed.
            outputs: names of tensors or operations.
            feed_dict: arrays by tensor or tensor name of the network's inputs.

        Raises:
            RuntimeError: another graph's session.
        """
        self._check_session(sess)
        return _run(self._frozen(sess, outputs), outputs, feed_dict)

    def run_float(self, sess: tf.Session, outputs: Sequence[str],
                  feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
        """Run the network at inference with its weights as they are trained.

        Args:
            sess, outputs, feed_dict: see :meth:`simulate`.

        Raises:
            RuntimeError: another graph's session.
        """
        self._check_session(sess)
        return _run(float_graph(sess, self.clean, self._network, outputs), outputs, feed_dict)

    def coverage(self) -> Coverage:
        """Each layer, its share of the weights, and why it is left float if it is."""
        return layer_coverage(self._network.layers, self._skipped, LayerState.WEIGHT_ONLY)

    # -- inside

    def _stored(self, layer: Layer, kernel: tf.Tensor) -> tf.Tensor:
        """A kernel as it is stored; as it is, while the network is trained in float."""
        stored, waiting = store_weight(kernel, layer, **self.storages[layer.name]._asdict()), self.window.waiting()
        return stored if waiting is None else tf.where(waiting, kernel, stored)

    def _params(self) -> List[WeightOnlyParams]:
        params = []
        for name, layer in self.layers.items():
            operator = str(layer.linear.op.name) + (_LINEAR_SUFFIX if layer.kind is LayerKind.MATMUL else "")
            bits, mode, block_size = self.storages[name]
            params.append(WeightOnlyParams(name, operator, bits, mode is WeightMode.ASYMMETRIC, block_size))
        return params

    def _frozen(self, sess: tf.Session, output_names: Sequence[str]) -> Any:
        """The frozen inference graph with all weights on their grids, where the converter finds them again."""
        kernels = sess.run({name: layer.kernel for name, layer in self.layers.items()})
        stored = {name: stored_kernel(kernels[name], layer, *self.storages[name])[1]
                  for name, layer in self.layers.items()}
        return float_graph(sess, self.clean, self._network, output_names, stored)

    def _check_session(self, sess: tf.Session) -> None:
        if getattr(sess, "graph", None) is not self.graph:
            raise RuntimeError("the session is not of the graph whose weights are quantized")

    def _why_nothing(self) -> str:
        reasons = ["{}: {}".format(name, layer.reason or "skipped") for name, layer in self._network.layers.items()]
        return "; ".join(reasons) or "the graph has no convolution or matrix product with a variable weight"


def strip_wq_ops(graph: Optional[tf.Graph] = None) -> None:
    """Take the quantization of weights off a graph, so that a ``GraphDef`` taken next is the float one to deploy.

    The converter puts the weights on the same grid again: give it the file of ``save_compress_params``, or
    ``--weight-bits``. Sessions that already ran keep running the quantized graph.

    Args:
        graph: None for the default graph.

    Raises:
        RuntimeError: the graph is finalized: export it with a hook or with ``export`` instead.
    """
    graph = graph if graph is not None else tf.get_default_graph()
    if graph.finalized:
        raise RuntimeError("a finalized graph cannot be stripped: use export of the quantizer or of its hook")
    strip(graph)


def _run(frozen: Any, outputs: Sequence[str], feed_dict: Mapping[Any, np.ndarray]) -> List[np.ndarray]:
    feeds = {getattr(key, "name", key): value for key, value in feed_dict.items()}
    with tf.Graph().as_default() as runner:
        tf.import_graph_def(frozen, name="")
        with tf.Session(graph=runner) as run:
            return list(run.run([name if ":" in name else name + ":0" for name in outputs], feeds))


def _check(bits: int, mode: Union[str, WeightMode], layer_bits: Optional[Mapping[str, int]], block_size: int) -> None:
    if mode not in [*WeightMode, *(known.value for known in WeightMode)]:
        raise ValueError("mode must be one of {}, got {!r}".format(
            ", ".join(repr(known.value) for known in WeightMode), mode))
    for width in (bits, *(layer_bits or {}).values()):
        largest_level(width, WeightMode(mode))
    usable_block((1, block_size), block_size)
