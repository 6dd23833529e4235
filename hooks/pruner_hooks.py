"""The pruners as hooks of a monitored session."""
from __future__ import annotations

from typing import Collection, Optional, Sequence, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import Ramp
from slimtrain.hooks.pruner import PathLike
from slimtrain.hooks.pruner_hook import PrunerHook
from slimtrain.hooks.simd_oc_pruner import SIMDOCPruner
from slimtrain.hooks.snip_pruner import SNIPLevelPruner
from slimtrain.hooks.taylor_fo_pruner import TaylorFOChannelPruner
from slimtrain.hooks.warm_start import start_from_checkpoint

Moment = Union[int, float, str]


class SNIPLevelPrunerHook(PrunerHook):
    """``SNIPLevelPruner`` as a hook; the arguments it shares mean the same.

    Construct it after the model, before a quantizer and before the session. Sensitivities are measured in the training
    steps before each event, and the decision and the zeros are part of the step: every checkpoint holds them.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote, to be used in the place of measuring.
        prune_finetune_iterations: steps without pruning between two events; None spreads them from begin to end.
        sensitivity_steps: steps whose gradients count for an event.
        begin, end: the first event, and the step by which the last is over: global steps (int) or parts of the training
            (float in [0, 1], with ``train_steps``).
        train_steps: how many steps the whole training takes.
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        init_checkpoint: a checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: as ``SNIPLevelPruner``; no checkpoint at ``init_checkpoint``; an
            ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, sensitivity_npy_file: Optional[PathLike] = None, graph: Optional[tf.Graph] = None,
                 sparsity: float = 0.5, total_pruning_iterations: int = 1, config_file: Optional[PathLike] = None,
                 debug_info: bool = False, prune_finetune_iterations: Optional[int] = 0,
                 max_prune_ratio: float = 0.99,
                 prune_ratio_result_file: PathLike = "SNIPLevelPruner_found_prune_ratios.yml",
                 *, output_names: Optional[Sequence[str]] = None,
                 skip_layers: Collection[str] = (), skip_first: bool = False,
                 skip_last: bool = False,
                 ramp: Ramp = Ramp.CUBIC, sensitivity_steps: int = 10, begin: Moment = 0,
                 end: Optional[Moment] = None, train_steps: Optional[int] = None, export_dir: Optional[str] = None,
                 init_checkpoint: Optional[str] = None, is_chief: bool = True) -> None:
        if init_checkpoint is not None:
            start_from_checkpoint(graph if graph is not None else tf.get_default_graph(), init_checkpoint)
        super().__init__(SNIPLevelPruner(
            sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
            prune_finetune_iterations or 0, max_prune_ratio, prune_ratio_result_file, output_names=output_names,
            skip_layers=skip_layers, skip_first=skip_first, skip_last=skip_last, ramp=ramp),
            sensitivity_steps, begin, end, prune_finetune_iterations, train_steps, export_dir, output_names, is_chief)


class SIMDOCPrunerHook(PrunerHook):
    """``SIMDOCPruner`` as a hook; the arguments it shares mean the same.

    Construct it after the model, before a quantizer and before the session. Sensitivities are measured in the training
    steps before each event, and the decision and the zeros are part of the step: every checkpoint holds them.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote, to be used in the place of measuring.
        prune_finetune_iterations: steps without pruning between two events; None spreads them from begin to end.
        sensitivity_steps: steps whose gradients count for an event.
        begin, end: the first event, and the step by which the last is over: global steps (int) or parts of the training
            (float in [0, 1], with ``train_steps``).
        train_steps: how many steps the whole training takes.
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        init_checkpoint: a checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: as ``SIMDOCPruner``; no checkpoint at ``init_checkpoint``; an
            ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, sensitivity_npy_file: Optional[PathLike] = None, graph: Optional[tf.Graph] = None,
                 sparsity: float = 0.5, total_pruning_iterations: int = 1, config_file: Optional[PathLike] = None,
                 debug_info: bool = False, prune_finetune_iterations: Optional[int] = 0,
                 max_prune_ratio: float = 0.99,
                 prune_ratio_result_file: PathLike = "SIMDOCPruner_found_prune_ratios.yml",
                 *, output_names: Optional[Sequence[str]] = None,
                 skip_layers: Collection[str] = (), skip_first: bool = False,
                 skip_last: bool = False,
                 ramp: Ramp = Ramp.CUBIC, sensitivity_steps: int = 10, begin: Moment = 0,
                 end: Optional[Moment] = None, train_steps: Optional[int] = None, export_dir: Optional[str] = None,
                 init_checkpoint: Optional[str] = None, is_chief: bool = True) -> None:
        if init_checkpoint is not None:
            start_from_checkpoint(graph if graph is not None else tf.get_default_graph(), init_checkpoint)
        super().__init__(SIMDOCPruner(
            sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
            prune_finetune_iterations or 0, max_prune_ratio, prune_ratio_result_file, output_names=output_names,
            skip_layers=skip_layers, skip_first=skip_first, skip_last=skip_last, ramp=ramp),
            sensitivity_steps, begin, end, prune_finetune_iterations, train_steps, export_dir, output_names, is_chief)


class TaylorFOChannelPrunerHook(PrunerHook):
    """``TaylorFOChannelPruner`` as a hook; the arguments it shares mean the same.

    Construct it after the model, before a quantizer and before the session. Sensitivities are measured in the training
    steps before each event, and the decision and the zeros are part of the step: every checkpoint holds them.
    The exported network is without the pruned channels; ``model.channels.json`` lists those that are left.

    Args:
        sensitivity_npy_file: what ``SensitivityAnalyzer`` wrote, to be used in the place of measuring.
        prune_finetune_iterations: steps without pruning between two events; None spreads them from begin to end.
        sensitivity_steps: steps whose gradients count for an event.
        begin, end: the first event, and the step by which the last is over: global steps (int) or parts of the training
            (float in [0, 1], with ``train_steps``).
        train_steps: how many steps the whole training takes.
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        init_checkpoint: a checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: as ``TaylorFOChannelPruner``; no checkpoint at
            ``init_checkpoint``; an ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, sensitivity_npy_file: Optional[PathLike] = None, graph: Optional[tf.Graph] = None,
                 sparsity: float = 0.5, total_pruning_iterations: int = 1, config_file: Optional[PathLike] = None,
                 debug_info: bool = False, prune_finetune_iterations: Optional[int] = 0,
                 max_prune_ratio: float = 0.99,
                 prune_ratio_result_file: PathLike = "TaylorFOChannelPruner_found_prune_ratios.yml",
                 align_channels: int = 4, *, output_names: Optional[Sequence[str]] = None,
                 skip_layers: Collection[str] = (),
                 ramp: Ramp = Ramp.CUBIC, sensitivity_steps: int = 10, begin: Moment = 0,
                 end: Optional[Moment] = None, train_steps: Optional[int] = None, export_dir: Optional[str] = None,
                 init_checkpoint: Optional[str] = None, is_chief: bool = True) -> None:
        if init_checkpoint is not None:
            start_from_checkpoint(graph if graph is not None else tf.get_default_graph(), init_checkpoint)
        super().__init__(TaylorFOChannelPruner(
            sensitivity_npy_file, graph, sparsity, total_pruning_iterations, config_file, debug_info,
            prune_finetune_iterations or 0, max_prune_ratio, prune_ratio_result_file, align_channels,
            output_names=output_names, skip_layers=skip_layers, ramp=ramp), sensitivity_steps, begin, end,
            prune_finetune_iterations, train_steps, export_dir, output_names, is_chief)
