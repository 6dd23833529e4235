"""Pruning of single weights by connection sensitivity."""
from __future__ import annotations

from typing import Collection, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.core import Ramp
from slimtrain.hooks.level_pruner import LevelPruner
from slimtrain.hooks.pruner import PathLike
from slimtrain.proto import PruneType


class SNIPLevelPruner(LevelPruner):
    """Prunes single weights (SNIP, Lee et al., arXiv 1810.02340).

    The finest grain: it shrinks files (``slimtrain convert --sparse``), and computes faster only from about 80 % zeros
    on devices with sparse kernels.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote.
        graph: the graph, with or without gradients; None for the default graph.
        sparsity: share of the weights to prune, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of ratios by weight name, found by an earlier run and edited.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: calls of ``do_pruning`` without pruning between two events.
        max_prune_ratio: no layer loses a larger share.
        prune_ratio_result_file: where the ratios found are written, as ``config_file`` takes them; "" for no file.
        output_names: what leaves the network; None to prune every layer of the graph.
        skip_layers: names or patterns of layers (operations) to leave alone.
        skip_first, skip_last: leave the first or last prunable weight alone.
        ramp: how sparsity grows from event to event.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: see :class:`slimtrain.hooks.pruner.Pruner`.
    """

    block = 1
    prune_type = PruneType.RANDOM

    def __init__(self, sensitivity_npy_file: Optional[PathLike], graph: Optional[tf.Graph] = None,
                 sparsity: float = 0.5, total_pruning_iterations: int = 1, config_file: Optional[PathLike] = None,
                 debug_info: bool = False, prune_finetune_iterations: int = 0, max_prune_ratio: float = 0.99,
                 prune_ratio_result_file: PathLike = "SNIPLevelPruner_found_prune_ratios.yml", *,
                 output_names: Optional[Sequence[str]] = None, skip_layers: Collection[str] = (),
                 skip_first: bool = False, skip_last: bool = False, ramp: Ramp = Ramp.CUBIC) -> None:
        super().__init__(
            sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
            prune_finetune_iterations, max_prune_ratio, prune_ratio_result_file, output_names=output_names,
            skip_layers=skip_layers, skip_first=skip_first, skip_last=skip_last, ramp=ramp)
