"""Pruning of whole channels by the first-order change of the loss."""
from __future__ import annotations

from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import (
    OVERALL,
    ChannelClasses,
    ChannelPlan,
    Ramp,
    channel_plan,
    choose_channels,
    plan_keeps,
)
from slimtrain.hooks.channel_trace import ChannelTrace, trace_channels
from slimtrain.hooks.graph import variables_by_name
from slimtrain.hooks.layers import LayerKind
from slimtrain.hooks.level_pruner import graph_to_prune
from slimtrain.hooks.operations import read_network
from slimtrain.hooks.pruner import Keeps, PathLike, Pruner
from slimtrain.hooks.pruning_layers import LayerSparsity, PrunableWeight, PrunableWeights, prunable_weights
from slimtrain.hooks.shrinking import shrink_graph
from slimtrain.proto import PruneType


class TaylorFOChannelPruner(Pruner):
    """Prunes channels with all that belongs to them (Taylor-FO, Molchanov et al., arXiv 1906.10771).

    A channel is its filters in all layers whose outputs meet (residual adds, depthwise convolutions behind them), their
    biases and norms, and the weights that read it. All of it is set to zero; an export takes it out. The ``sparsity``
    is that of the weights which are then gone.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote.
        graph: the graph, with or without gradients; None for the default graph.
        sparsity: share of the weights to prune, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of shares of output channels by weight name, found by an earlier run and edited.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: calls of ``do_pruning`` without pruning between two events.
        max_prune_ratio: no layer loses a larger share.
        prune_ratio_result_file: where the ratios found are written, as ``config_file`` takes them; "" for no file.
        align_channels: a layer keeps a multiple of this many channels (or all).
        output_names: what leaves the network; None to take everything that gradients did not bring.
        skip_layers: names or patterns of layers (operations) that keep all they produce.
        ramp: how sparsity grows from event to event.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: see :class:`slimtrain.hooks.pruner.Pruner`; no channel of the
            network can be removed.
    """

    # FILTER would let the converter remove channels itself, which it does wrongly where a depthwise convolution follows
    prune_type = PruneType.RANDOM

    def __init__(self, sensitivity_npy_file: Optional[PathLike], graph: Optional[tf.Graph] = None,
                 sparsity: float = 0.5, total_pruning_iterations: int = 1, config_file: Optional[PathLike] = None,
                 debug_info: bool = False, prune_finetune_iterations: int = 0, max_prune_ratio: float = 0.99,
                 prune_ratio_result_file: PathLike = "TaylorFOChannelPruner_found_prune_ratios.yml",
                 align_channels: int = 4, *, output_names: Optional[Sequence[str]] = None,
                 skip_layers: Collection[str] = (), ramp: Ramp = Ramp.CUBIC) -> None:
        if isinstance(align_channels, bool) or not isinstance(align_channels, int) or align_channels < 1:
            raise ValueError("align_channels must be an integer of at least 1, got %r" % (align_channels,))
        graph = graph_to_prune(graph)
        self._align = align_channels
        found = prunable_weights(graph, output_names, depthwise=True)
        self._trace = _traced(graph, output_names, found, skip_layers)
        if not self.classes.groups:
            raise ValueError("no channel of the network can be removed (%s)" % "; ".join(
                "%s: %s" % item for item in self.classes.fixed.items()))
        self._variables = variables_by_name(graph)
        super().__init__(sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
                         prune_finetune_iterations, max_prune_ratio, prune_ratio_result_file, found=found, ramp=ramp)

    # -- results

    @property
    def classes(self) -> ChannelClasses:
        """Which channels of the network depend on each other; layers go by the names of their weights."""
        return self._trace.classes

    def plan(self, sess: tf.Session) -> ChannelPlan:
        """The channels that are left, by names of variables; ``to_json`` writes them down.

        Raises:
            RuntimeError: another graph's session, or nothing has been pruned yet.
        """
        if self.algorithm(sess) is None:
            raise RuntimeError("nothing has been pruned yet: there is no plan of channels")
        return channel_plan(self.classes, self._alive(self.read_keeps(sess)))

    def shrink(self, frozen: Any, sess: tf.Session, output_names: Sequence[str]) -> Any:
        """The frozen GraphDef of the network without its pruned channels, checked to compute the same.

        Args:
            frozen: as ``tf.graph_util.convert_variables_to_constants`` makes it from the pruned session.
            sess: holds the pruned variables.
            output_names: operations or tensors that leave the network.

        Raises:
            ConversionError: the network depends on a number of channels.
        """
        return shrink_graph(frozen, self._trace, self._alive(self.read_keeps(sess)), output_names).graph_def

    def deployable(self, frozen: Any, sess: tf.Session, outputs: Sequence[str]) -> Tuple[Any, str]:
        shrunk = shrink_graph(frozen, self._trace, self._alive(self.read_keeps(sess)), outputs)
        return shrunk.graph_def, shrunk.plan.to_json()

    def report(self, sess: tf.Session) -> List[LayerSparsity]:
        names = {op: weight.name for op, weight in self._trace.kernels.items()}
        return [row._replace(reason=row.reason or self.classes.fixed.get(names.get(row.name, ""), ""))
                for row in super().report(sess)]

    # -- what this algorithm does

    def _masked(self) -> Dict[str, Any]:
        masked = super()._masked()
        for key, variable in self._trace.variables.items():
            if key in self.classes.vectors and variable in self._variables:
                masked[key] = self._variables[variable]
        return masked

    def score_shape(self, weight: PrunableWeight) -> List[int]:
        return [int(np.prod(_rows_shape(weight)))]

    def score(self, weight: PrunableWeight, product: tf.Tensor) -> tf.Tensor:
        # each weight by itself: behind a filter with a batch norm, the sum of the products is zero whatever they do
        kernel = tf.reshape(tf.abs(product), weight.layer.kernel.shape.as_list())
        return tf.reshape(tf.reduce_sum(kernel, axis=_summed_axes(weight)), [-1])

    def score_values(self, weight: PrunableWeight, saved: np.ndarray) -> np.ndarray:
        return np.asarray(weight.rows(saved).sum(axis=(1, 2)), np.float32)

    def candidates(self) -> Collection[str]:
        return {name for group in self.classes.groups for name in group.layers}

    def needing(self, name: str) -> List[str]:
        if name in self.classes.vectors:
            held = self.classes.vectors[name]
        else:
            layer = self.classes.layers[name]
            held = np.concatenate([layer.rows, layer.columns])
        return [other for other, layer in self.classes.layers.items() if np.isin(layer.rows, held).any()]

    def decide(self, scores: Mapping[str, np.ndarray], alive: Optional[Keeps], fraction: float) -> Keeps:
        totals = np.zeros(self.classes.size)
        for name, layer in self.classes.layers.items():
            if name in scores:
                np.add.at(totals, layer.rows, scores[name].astype(np.float64))
        # of what is not trained nothing is known: its groups stay whole
        shares = {name: 0.0 for name in self.classes.layers if name not in scores}
        shares.update((name, share * fraction) for name, share in self._config.items() if name in scores)
        before = None if alive is None else self._alive(alive)
        keep = choose_channels(self.classes, totals, self.schedule.sparsity * fraction, self._align,
                               self._max_prune_ratio, before, shares).keep
        return self._keeps_of(keep)

    def ratios(self, keeps: Keeps) -> Dict[str, float]:
        """Shares of the layers' output channels, as ``config_file`` takes them."""
        alive = self._alive(keeps)
        ratios = {name: 1.0 - float(np.mean(alive[layer.rows])) for name, layer in self.classes.layers.items()}
        ratios[OVERALL] = 1.0 - self.classes.weights(alive) / self.classes.weights(np.ones_like(alive))
        return ratios

    def _keeps_of(self, keep: np.ndarray) -> Keeps:
        """Masks for everything that belongs to a channel."""
        keeps = {name: np.ones(variable.shape.as_list(), bool) for name, variable in self._masked().items()}
        for name, pairs in plan_keeps(self.classes, keep).items():
            weight = self.weights[name]
            places = weight.rows(keeps[name]).shape
            keeps[name] = weight.values(np.broadcast_to(pairs[:, :, None], places))
        for name in keeps:
            if name in self.classes.vectors:
                keeps[name] = keep[self.classes.vectors[name]].reshape(keeps[name].shape)
        return keeps

    def _alive(self, keeps: Keeps) -> np.ndarray:
        """The classes that survive, from the masks."""
        alive = np.ones(self.classes.size, bool)
        for name, layer in self.classes.layers.items():
            alive[layer.rows] &= self.weights[name].rows(keeps[name]).any(axis=(1, 2))
        return alive


def _traced(graph: tf.Graph, output_names: Optional[Sequence[str]], found: PrunableWeights,
            skip: Collection[str]) -> ChannelTrace:
    with graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
        network = read_network(graph, output_names)
    return trace_channels(graph, network, found, skip)


def _rows_shape(weight: PrunableWeight) -> List[int]:
    shape = weight.layer.kernel.shape.as_list()
    return shape[2:] if weight.layer.kind is LayerKind.DEPTHWISE else [shape[weight.layer.channel_axis]]


def _summed_axes(weight: PrunableWeight) -> List[int]:
    if weight.layer.kind is LayerKind.DEPTHWISE:
        return [0, 1]
    return [axis for axis in range(weight.layer.kernel.shape.rank) if axis != weight.layer.channel_axis]
