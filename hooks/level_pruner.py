"""Pruning of single weights and of small blocks: the shape of a layer stays, its weight gets zeros."""
from __future__ import annotations

from typing import Collection, Mapping, Optional, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Ramp, global_keep, layer_keep
from slimtrain.hooks.pruner import Keeps, PathLike, Pruner
from slimtrain.hooks.pruning_layers import prunable_weights


class LevelPruner(Pruner):
    """Base of the pruners that rank weights of all layers together, in blocks along the output channels.

    Args:
        output_names: what leaves the network; None to prune every layer of the graph.
        skip_layers: names or patterns of layers (operations) to leave alone.
        skip_first, skip_last: leave the first or last prunable weight alone.
        others: see :class:`slimtrain.hooks.pruner.Pruner`.
    """

    block: int  #: output channels per block

    def __init__(self, sensitivity_npy_file: Optional[PathLike], graph: Optional[tf.Graph], sparsity: float,
                 total_pruning_iterations: int, config_file: Optional[PathLike], debug_info: bool,
                 prune_finetune_iterations: int, max_prune_ratio: float, prune_ratio_result_file: PathLike, *,
                 output_names: Optional[Sequence[str]], skip_layers: Collection[str], skip_first: bool,
                 skip_last: bool, ramp: Ramp) -> None:
        graph = graph_to_prune(graph)
        found = prunable_weights(graph, output_names, skip_layers, skip_first, skip_last)
        super().__init__(sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
                         prune_finetune_iterations, max_prune_ratio, prune_ratio_result_file, found=found, ramp=ramp)

    def decide(self, scores: Mapping[str, np.ndarray], alive: Optional[Keeps], fraction: float) -> Keeps:
        rows = {name: self.weights[name].rows(score) for name, score in scores.items()}
        before = {} if alive is None else {name: self.weights[name].rows(alive[name]) for name in rows}
        free = {name: score for name, score in rows.items() if name not in self._config}
        keeps = {name: layer_keep(rows[name], ratio * fraction, self.block, before.get(name))
                 for name, ratio in self._config.items() if name in rows}
        if free:
            keeps.update(global_keep(free, self.schedule.sparsity * fraction, self.block, self._max_prune_ratio,
                                     {name: before[name] for name in free} if before else None))
        return {name: weight.values(keeps[name]) if name in keeps else np.ones(weight.variable.shape.as_list(), bool)
                for name, weight in self.weights.items()}


def graph_to_prune(graph: Optional[tf.Graph]) -> tf.Graph:
    """The graph given, or the default graph.

    Raises:
        TypeError: it is not a graph.
        RuntimeError: it is finalized.
    """
    graph = tf.get_default_graph() if graph is None else graph
    if not isinstance(graph, tf.Graph):
        raise TypeError("graph must be a tf.Graph, got %s" % type(graph).__name__)
    if graph.finalized:
        raise RuntimeError("the graph is finalized: construct the pruner before a monitored session, or use its hook")
    return graph
