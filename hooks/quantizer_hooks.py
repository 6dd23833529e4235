"""The quantizers as hooks of a monitored session."""
from __future__ import annotations

from typing import Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.ema_quantizer import EMAQuantizer
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.oaq_quantizer import OAQQuantizer
from slimtrain.hooks.session_hook import QuantizerHook
from slimtrain.hooks.waq_quantizer import WAQQuantizer
from slimtrain.hooks.warm_start import start_from_checkpoint
from slimtrain.hooks.window import Moment, Steps, ask_window, window_steps


class LSQQuantizerHook(QuantizerHook):
    """``LSQQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        begin: until this global step (int) or part of the training (float in [0, 1], with ``train_steps``) the network
            is trained in float; then its scales start.
        end: from this moment on scales stay as they are, while weights go on learning; 1.0 for never.
        train_steps: how many steps the whole training takes.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``LSQQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None,
                 begin: Moment = 0.0, end: Moment = 1.0, train_steps: Optional[int] = None,
                 export_dir: Optional[str] = None, init_checkpoint: Optional[str] = None,
                 is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        steps = _prepare(graph, init_checkpoint, window_steps(begin, end, train_steps))
        super().__init__(LSQQuantizer(
            graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
            weight_bits=weight_bits, activation_bits=activation_bits, unsigned_activations=unsigned_activations,
            output_names=output_names), export_dir, output_names, is_chief, steps)


class EMAQuantizerHook(QuantizerHook):
    """``EMAQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        begin: until this global step (int) or part of the training (float in [0, 1], with ``train_steps``) the network
            is trained in float; then its scales start.
        end: from this moment on scales stay as they are, while weights go on learning; 1.0 for never.
        train_steps: how many steps the whole training takes.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``EMAQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None,
                 begin: Moment = 0.0, end: Moment = 1.0, train_steps: Optional[int] = None,
                 export_dir: Optional[str] = None, init_checkpoint: Optional[str] = None,
                 is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        steps = _prepare(graph, init_checkpoint, window_steps(begin, end, train_steps))
        super().__init__(EMAQuantizer(
            graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
            weight_bits=weight_bits, activation_bits=activation_bits, unsigned_activations=unsigned_activations,
            output_names=output_names), export_dir, output_names, is_chief, steps)


class OAQQuantizerHook(QuantizerHook):
    """``OAQQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        begin: until this global step (int) or part of the training (float in [0, 1], with ``train_steps``) the network
            is trained in float; then its scales start.
        end: from this moment on scales stay as they are, while weights go on learning; 1.0 for never.
        train_steps: how many steps the whole training takes.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``OAQQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 min_clamp_value: int = 0, debug_info: bool = False, retain_sparsity: bool = False, *,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None,
                 begin: Moment = 0.0, end: Moment = 1.0, train_steps: Optional[int] = None,
                 export_dir: Optional[str] = None, init_checkpoint: Optional[str] = None,
                 is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        steps = _prepare(graph, init_checkpoint, window_steps(begin, end, train_steps))
        super().__init__(OAQQuantizer(
            graph, is_training, skip_quant_layers, skip_quant_flag, bits, min_clamp_value, debug_info, retain_sparsity,
            weight_bits=weight_bits, activation_bits=activation_bits, unsigned_activations=unsigned_activations,
            output_names=output_names), export_dir, output_names, is_chief, steps)


class WAQQuantizerHook(QuantizerHook):
    """``WAQQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        begin: until this global step (int) or part of the training (float in [0, 1], with ``train_steps``) the network
            is trained in float; then its scales start.
        end: from this moment on scales stay as they are, while weights go on learning; 1.0 for never.
        train_steps: how many steps the whole training takes.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports and takes decisions, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``WAQQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``; moments that cannot be told in steps.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_quant_layers: Sequence[str] = (), skip_quant_flag: Sequence[str] = (), bits: int = 8,
                 debug_info: bool = False, retain_sparsity: bool = False, *, min_sqnr_db: float = 25.0,
                 weight_bits: Optional[int] = None, activation_bits: Optional[int] = None,
                 unsigned_activations: bool = True, output_names: Optional[Sequence[str]] = None,
                 begin: Moment = 0.0, end: Moment = 1.0, train_steps: Optional[int] = None,
                 export_dir: Optional[str] = None, init_checkpoint: Optional[str] = None,
                 is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        steps = _prepare(graph, init_checkpoint, window_steps(begin, end, train_steps))
        super().__init__(WAQQuantizer(
            graph, is_training, skip_quant_layers, skip_quant_flag, bits, debug_info, retain_sparsity,
            min_sqnr_db=min_sqnr_db, weight_bits=weight_bits, activation_bits=activation_bits,
            unsigned_activations=unsigned_activations, output_names=output_names),
            export_dir, output_names, is_chief, steps)


def _prepare(graph: tf.Graph, init_checkpoint: Optional[str], steps: Steps) -> Steps:
    """What a graph needs before its quantizer is made: weights to start from, and when it is quantized."""
    if init_checkpoint is not None:
        start_from_checkpoint(graph, init_checkpoint)
    ask_window(graph, steps)
    return steps
