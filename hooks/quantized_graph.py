"""What a quantized TensorFlow graph gives once it is trained: its simulation, its files, and what was done to it."""
from __future__ import annotations

from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Coverage, Grid, LayerCall, LayerState, Placement
from slimtrain.core import Quantizer as Owner
from slimtrain.hooks.deployment import DeployedLayer, LayerSource, read_layers
from slimtrain.hooks.export import export_model, write_params_file
from slimtrain.hooks.grids import InputGrid
from slimtrain.hooks.layers import Layer, layer_coverage
from slimtrain.hooks.operations import Network
from slimtrain.hooks.rewriting import Rewriting
from slimtrain.hooks.simulation import simulate_network
from slimtrain.hooks.state import Scale
from slimtrain.hooks.strip import remember_deployed, strip_MNN_QAT_ops
from slimtrain.proto import QuantMethod


class Bits(NamedTuple):
    """Bit widths, 2 to 8."""

    weight: int
    activation: int


class Grids(NamedTuple):
    """The levels of everything quantized, and how each layer is marked for the runtime."""

    weights: Dict[str, Grid]
    activations: Dict[Owner, Grid]
    methods: Dict[str, QuantMethod]


class QuantizedGraph:
    """What is known of a graph that :class:`slimtrain.hooks.quantizer.GraphQuantizer` quantized."""

    graph: tf.Graph
    clean: Any                           #: the GraphDef of the network before it was quantized
    bits: Bits
    weight_grid: Grid
    output_names: Tuple[str, ...]
    layers: Dict[str, Layer]             #: those that are quantized
    _network: Network
    _skipped: Set[str]
    _placement: Placement
    _safe: Tuple[str, ...]               #: see ``int8_safe``
    _read_in_float: FrozenSet[str]       #: see ``read_in_float``
    _grids: Dict[Owner, Grid]
    _scales: Dict[Owner, Scale]
    _weight_scales: Dict[str, Scale]
    _kernels: Dict[str, tf.Tensor]       #: what is quantized of each layer
    _phases: Dict[str, tf.Tensor]        #: the state of the window in which quantization works

    # -- the seed's interface

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
        return layer_coverage(self._network.layers, self._skipped, LayerState.INT8)

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

    def current_grids(self, sess: tf.Session) -> Grids:
        """The levels as they are now."""
        return Grids(dict.fromkeys(self.layers, self.weight_grid), self._grids,
                     dict.fromkeys(self.layers, QuantMethod.QAT))

    # -- inside

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
