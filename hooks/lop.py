"""Linear over-parameterization (ExpandNets) of TensorFlow graphs: train a wider network, deploy the small one."""
from __future__ import annotations

import logging
from typing import Any, Collection, List, Optional, Sequence, Tuple

import tensorflow.compat.v1 as tf

from slimtrain.core import ExpandedLine, select
from slimtrain.hooks.expanded_parts import Expansion
from slimtrain.hooks.expansion import State, expand_layer
from slimtrain.hooks.float_network import FloatNetwork
from slimtrain.hooks.graph import ancestors, find_tensor, variables_behind
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.low_rank import PathLike, check_decomposable
from slimtrain.hooks.operations import read_network
from slimtrain.hooks.own_weights import UNREAD, OwnWeight, find_own_weights, is_read
from slimtrain.proto import save_parameterless

logger = logging.getLogger(__name__)

#: name of the placeholder that tells training from testing
STATE_PLACEHOLDER = "LOP_is_training"


class LOP:
    """Expands the convolutions of a forward graph into linear chains for training, and merges them back.

    Args:
        graph: the small network, before its optimizer and without a session; None for the default graph.
        is_training: None for a placeholder that has to be fed; a bool for a graph that only trains or only tests. Only
            batch normalization makes a difference between the two. A graph that only tests can be trained too: the
            statistics stay as a checkpoint has them, and a quantizer may follow in the same graph.

    Raises:
        TypeError: ``graph`` is not a graph, or ``is_training`` no bool.
        RuntimeError: the graph is finalized, quantized, expanded or decomposed already, has gradients or a session.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None) -> None:
        if is_training is not None and not isinstance(is_training, bool):
            raise TypeError("is_training must be None, True or False, got {!r}".format(is_training))
        self.graph = graph if graph is not None else tf.get_default_graph()
        check_decomposable(self.graph)
        self._fixed_state = is_training
        self._state: Optional[tf.Tensor] = None
        self._expanded: Optional[FloatNetwork] = None
        #: every layer with weights and what became of it
        self.report: Tuple[ExpandedLine, ...] = ()

    @staticmethod
    def check(expand_rate: int) -> None:
        """Refuse a bad rate before there is a graph.

        Raises:
            ValueError: ``expand_rate`` is no integer of at least 1.
        """
        if isinstance(expand_rate, bool) or not isinstance(expand_rate, int) or expand_rate < 1:
            raise ValueError("expand_rate must be an integer of at least 1, got {!r}".format(expand_rate))

    @property
    def is_training(self) -> Optional[tf.Tensor]:
        """The placeholder to feed with True in training and False in tests; None where there is nothing to feed."""
        return self._state

    def linear_expand_layers(self, expand_rate: int, compress_params_file: Optional[PathLike],
                             add_batchnorm: bool = True, add_bypass: bool = True, append: bool = False, *,
                             skip_layers: Collection[str] = (), expand_pointwise: bool = False,
                             expand_linear: bool = False, keep_weights: bool = False) -> None:
        """Expand the convolutions of one group with kernels of more than one position, in the graph itself.

        Args:
            expand_rate: channels in between over channels of the layer, at least 1; 2 to 16 are usual.
            compress_params_file: made without an algorithm, so that a later one can append to it; None makes none.
            add_batchnorm: normalize in between.
            add_bypass: add a layer's input to its output where they have one shape.
            append: the file exists already, of an earlier algorithm, and is left as it is.
            skip_layers: names or patterns (``block1/*``) of operations to leave; "" means none.
            expand_pointwise, expand_linear: 1x1 convolutions and matrix products too.
            keep_weights: start from the values that the weights would start from (their initializers, or the
                checkpoint that these were made to read); otherwise expanded layers start at random.

        Raises:
            ValueError: a bad rate, a name that matches no layer, nothing to expand.
            RuntimeError: as the constructor.
            ParameterFileError: there is nothing to append to.
            OSError: the file cannot be written; the graph is as it was.
        """
        self.check(expand_rate)
        check_decomposable(self.graph)
        normalizes = add_batchnorm and self._fixed_state is not False
        layers, own, reasons = find_own_weights(self.graph)
        skip = [name for name in skip_layers if name]
        for name, weight in own.items():
            reason = _why_not(weight, expand_pointwise, expand_linear, add_batchnorm, normalizes)
            if reason:
                reasons[name] = reason
        reasons.update((name, "named in skip_layers") for name in (select(list(layers), skip) if skip else ()))
        chosen = {name: weight for name, weight in own.items() if name not in reasons}
        if not chosen:
            raise ValueError("nothing to expand ({})".format(
                "; ".join("{}: {}".format(*item) for item in reasons.items()) or "no layer with weights was found"))
        if compress_params_file is not None:
            save_parameterless(compress_params_file, append)
        training = self._training() if normalizes else None
        how = Expansion(expand_rate, add_batchnorm, add_bypass, keep_weights)
        made = {name: expand_layer(weight, how, training) for name, weight in chosen.items()}
        self.report = tuple(_line(layer, made.get(name), reasons.get(name, "")) for name, layer in layers.items())
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
            network = read_network(self.graph, None)
        self._expanded = FloatNetwork(self.graph.as_graph_def(), network, ())
        logger.info("expanded %d of %d layers", len(made), len(layers))

    def linear_merge_layers(self, sess: tf.Session, output_names: Sequence[str]) -> Any:
        """The small network that the expanded one equals in evaluation, as a frozen GraphDef under the original names.

        Neither the graph nor the session is changed. :func:`merged_weights` gives the weights alone.

        Args:
            sess: holds the trained variables; the graph may be finalized.
            output_names: tensors or operations that leave the network, made before it was expanded.

        Raises:
            RuntimeError: nothing has been expanded, or ``sess`` is of another graph.
            ValueError: an output that does not exist.
            ConversionError: a part of the graph has no inference form.
        """
        if self._expanded is None:
            raise RuntimeError("nothing is expanded: call linear_expand_layers first")
        if getattr(sess, "graph", None) is not self.graph:
            raise RuntimeError("the session is not of the graph that was expanded")
        outputs = [find_tensor(self.graph, name).op for name in output_names]
        return self._expanded._replace(network=self._expanded.network._replace(within=ancestors(outputs)),
                                       outputs=tuple(output_names)).frozen(sess)

    def _training(self) -> State:
        """1.0 in training, 0.0 in tests."""
        if self._fixed_state:
            return 1.0
        with self.graph.as_default(), tf.name_scope(None), tf.control_dependencies(None):
            self._state = tf.placeholder(tf.bool, [], name=STATE_PLACEHOLDER)
            return tf.cast(self._state, tf.float32)


def _why_not(own: OwnWeight, pointwise: bool, linear: bool, batchnorm: bool, normalizes: bool) -> str:
    """Why a layer is not expanded; "" when it is."""
    layer = own.layer
    if layer.kind is LayerKind.MATMUL:
        if not linear:
            return "matrix products are expanded with expand_linear=True only"
    elif max(own.shape[:2]) == 1 and not pointwise:
        return "1x1 convolutions are expanded with expand_pointwise=True only"
    if not batchnorm:
        return ""
    if layer.bias is not None and len(variables_behind(layer.bias)) != 1:
        return "its bias, which normalization changes, is no variable"
    if not normalizes:
        return ""
    if layer.kind is LayerKind.MATMUL and layer.op.get_attr("transpose_a"):
        return "it transposes its input, which cannot be normalized"
    if layer.kind is LayerKind.CONV and layer.op.get_attr("data_format") != b"NHWC":
        return "its data format is {}, normalization needs NHWC".format(layer.op.get_attr("data_format").decode())
    return "" if is_read(layer) else UNREAD


def _line(layer: Layer, made: Optional[Tuple[List[Any], bool]], reason: str) -> ExpandedLine:
    before = layer.parameters if layer.kernel.shape.is_fully_defined() else 0
    if made is None:
        return ExpandedLine(layer.name, layer.kind.value, (before, before), False, reason)
    after = sum(variable.shape.num_elements() for variable in made[0][:3])
    return ExpandedLine(layer.name, layer.kind.value, (before, after), made[1], "")
