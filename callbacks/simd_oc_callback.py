"""Pruning of 1x4 blocks as a Lightning callback."""
from __future__ import annotations

from typing import List, Optional

from torch import nn

from slimtrain.callbacks.pruner_callback import PrunerCallback
from slimtrain.callbacks.simd_oc_pruner import SIMDOCPruner
from slimtrain.core import Moment, Ramp


class SIMDOCPrunerCallback(PrunerCallback):
    """Prunes blocks of four output channels: :class:`slimtrain.callbacks.SIMDOCPruner` in a callback.

    From the ``begin`` of training to its ``end`` weights are pruned in several events; what is pruned stays zero
    through momentum, weight decay, checkpoints and resumes. At the end of ``fit`` there are a float ONNX file with its
    ``compress_params.bin`` and, where MNN is installed, a ``.mnn`` that leaves the zeros out.

    Args:
        sparsity: share of the weights to prune, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of ratios by weight name, found by an earlier run and edited.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: optimizer steps without pruning between two events; None spreads the events evenly
            from ``begin`` to ``end``.
        max_prune_ratio: no layer loses a larger share.
        skip_layers: names or patterns (``features.*``) of layers to leave alone.
        skip_first, skip_last: leave the first or last prunable layer alone.
        sensitivity_steps: optimizer steps whose gradients count for an event.
        ramp: how sparsity grows from event to event.
        begin, end: the first event, and the step by which the last is over: optimizer steps (int), parts of the
            training (float in [0, 1]) or a text like "3 epochs".
        result_file: where the ratios found are written, as ``config_file`` takes them; "" for no file.
        module: dotted path of the submodule to prune; "" for the whole model.
        export_to: path without suffix of what is written at the end of ``fit``; None for the model's name in the
            Trainer's log folder, "" for no export.
        weight_bits: weights in the ``.mnn`` are stored in so many bits; 0 for floats.
    """

    def __init__(self, sparsity: float = 0.5, total_pruning_iterations: int = 10, config_file: Optional[str] = None,
                 debug_info: bool = False, prune_finetune_iterations: Optional[int] = None,
                 max_prune_ratio: float = 0.99, *, skip_layers: Optional[List[str]] = None,
                 skip_first: bool = False, skip_last: bool = False, sensitivity_steps: int = 10,
                 ramp: Ramp = Ramp.CUBIC, begin: Moment = 0.0, end: Moment = 1 / 3,
                 result_file: str = "", module: str = "", export_to: Optional[str] = None,
                 weight_bits: int = 8) -> None:
        arguments = dict(sparsity=sparsity, total_pruning_iterations=total_pruning_iterations, config_file=config_file,
                         debug_info=debug_info, max_prune_ratio=max_prune_ratio,
                         skip_layers=tuple(skip_layers or ()), skip_first=skip_first, skip_last=skip_last,
                         sensitivity_steps=sensitivity_steps, ramp=ramp)
        super().__init__(arguments, begin, end, prune_finetune_iterations, result_file, module, export_to, weight_bits)

    def make_pruner(self, model: nn.Module) -> SIMDOCPruner:
        return SIMDOCPruner(model, **self._arguments)
