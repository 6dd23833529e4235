"""Pruning of whole channels as a Lightning callback."""
from __future__ import annotations

from typing import List, Optional

from torch import nn

from slimtrain.callbacks.pruner_callback import PrunerCallback
from slimtrain.callbacks.taylor_fo_pruner import TaylorFOChannelPruner
from slimtrain.core import Moment, Ramp


class TaylorFOChannelPrunerCallback(PrunerCallback):
    """Prunes whole channels: :class:`slimtrain.callbacks.TaylorFOChannelPruner` in a callback.

    From the ``begin`` of training to its ``end`` weights are pruned in several events; what is pruned stays zero
    through momentum, weight decay, checkpoints and resumes. At the end of ``fit`` there are an ONNX file of the smaller
    model, the list of its channels and, where MNN is installed, its ``.mnn``.

    Args:
        sparsity: share of the weights to prune, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of ratios by weight name, found by an earlier run and edited.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: optimizer steps without pruning between two events; None spreads the events evenly
            from ``begin`` to ``end``.
        max_prune_ratio: no layer loses a larger share.
        align_channels: a layer keeps a multiple of this many channels (or all).
        skip_layers: names or patterns (``features.*``) of layers to leave alone.
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
                 max_prune_ratio: float = 0.99, align_channels: int = 4, *, skip_layers: Optional[List[str]] = None,
                 sensitivity_steps: int = 10, ramp: Ramp = Ramp.CUBIC, begin: Moment = 0.0,
                 end: Moment = 1 / 3, result_file: str = "", module: str = "",
                 export_to: Optional[str] = None, weight_bits: int = 8) -> None:
        arguments = dict(sparsity=sparsity, total_pruning_iterations=total_pruning_iterations, config_file=config_file,
                         debug_info=debug_info, max_prune_ratio=max_prune_ratio, align_channels=align_channels,
                         skip_layers=tuple(skip_layers or ()), sensitivity_steps=sensitivity_steps, ramp=ramp)
        super().__init__(arguments, begin, end, prune_finetune_iterations, result_file, module, export_to, weight_bits)

    def make_pruner(self, model: nn.Module) -> TaylorFOChannelPruner:
        return TaylorFOChannelPruner(model, **self._arguments)
