"""Pruning of single weights and of small blocks: the shape of a layer stays, its weight gets zeros."""
from __future__ import annotations

from typing import Collection, Dict, List, Mapping, Optional

import numpy as np
from torch import nn

from slimtrain.callbacks.pruner import PathLike, Pruner
from slimtrain.callbacks.pruning_layers import LayerSparsity, prunable_layers
from slimtrain.core import Ramp, global_keep, layer_keep


class LevelPruner(Pruner):
    """Base of the pruners that rank weights of all layers together, in blocks along the output channels.

    Args:
        skip_first, skip_last: leave the first or last prunable layer alone.
        others: see :class:`slimtrain.callbacks.pruner.Pruner`.
    """

    block: int  #: output channels per block

    def __init__(self, model: nn.Module, sparsity: float = 0.5, total_pruning_iterations: int = 1,
                 config_file: Optional[PathLike] = None, debug_info: bool = False, prune_finetune_iterations: int = 0,
                 max_prune_ratio: float = 0.99, *, skip_layers: Collection[str] = (), skip_first: bool = False,
                 skip_last: bool = False, sensitivity_steps: int = 10, ramp: Ramp = Ramp.CUBIC) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        self._found = prunable_layers(model, skip_layers, skip_first, skip_last)
        super().__init__(model, sparsity, total_pruning_iterations, config_file, debug_info, prune_finetune_iterations,
                         max_prune_ratio, skip_layers=skip_layers, sensitivity_steps=sensitivity_steps, ramp=ramp)

    def _choose_layers(self, skip: Collection[str]) -> Dict[str, nn.Module]:
        return self._found.layers

    def _decide(self, scores: Mapping[str, np.ndarray], fraction: float) -> Dict[str, np.ndarray]:
        alive = self._numpy_keeps() or None
        free = {name: score for name, score in scores.items() if name not in self._config}
        keeps = {name: layer_keep(scores[name], ratio * fraction, self.block, alive and alive[name])
                 for name, ratio in self._config.items()}
        if free:
            keeps.update(global_keep(free, self.schedule.sparsity * fraction, self.block, self._max_prune_ratio, alive))
        return {name: keeps[name] for name in scores}

    def report(self) -> List[LayerSparsity]:
        ratios = self.current_prune_ratios()
        rows = {name: LayerSparsity(name, parameter.numel(), ratios[weight], "")
                for name, (weight, parameter) in zip(self.layers, self.weights().items())}
        modules = dict(self.model.named_modules())
        for name, reason in self._found.left.items():
            count = sum(value.numel() for value in modules[name].parameters(recurse=False) if value.dim() >= 2)
            rows[name] = LayerSparsity(name, count, 0.0, reason)
        return [rows[name] for name in modules if name in rows]
