"""Low-bit storage of weights as a hook of a monitored session."""
from __future__ import annotations

import logging
from typing import Any, Mapping, Optional, Sequence, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import LayerState, WeightMode
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.reporting import coverage_text
from slimtrain.hooks.warm_start import start_from_checkpoint
from slimtrain.hooks.weight_quantizer import WeightQuantizer
from slimtrain.hooks.window import Keeper, Moment, ask_window, window_steps

logger = logging.getLogger(__name__)


class WeightQuantizerHook(ExportingHook):
    """``WeightQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session. A session that makes no training step
    shows what storing the weights costs without training.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        begin: until this global step (int) or part of the training (float in [0, 1], with ``train_steps``) the network
            is trained in float.
        train_steps: how many steps the whole training takes.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``WeightQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, bits: int = 8, debug_info: bool = False,
                 mode: Union[str, WeightMode] = WeightMode.SYMMETRIC, *, layer_bits: Optional[Mapping[str, int]] = None,
                 skip_quant_layers: Sequence[str] = (), block_size: int = 0,
                 output_names: Optional[Sequence[str]] = None, begin: Moment = 0.0,
                 train_steps: Optional[int] = None, export_dir: Optional[str] = None,
                 init_checkpoint: Optional[str] = None, is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        if init_checkpoint is not None:
            start_from_checkpoint(graph, init_checkpoint)
        steps = window_steps(begin, 1.0, train_steps)
        ask_window(graph, steps)
        super().__init__(graph, export_dir, output_names, is_chief)
        self.quantizer = WeightQuantizer(
            graph, bits, debug_info, mode, layer_bits=layer_bits, skip_quant_layers=skip_quant_layers,
            block_size=block_size, output_names=output_names)
        self._keeper = Keeper(graph, self.quantizer.window, steps)

    def ready(self, session: tf.Session) -> bool:
        """Weights can be stored at any time from ``begin`` on."""
        begun = self.quantizer.window.begun
        return begun is None or bool(session.run(begun))

    def begin(self) -> None:
        """Make sure that the session runs this graph, and add what sets the moment.

        Raises:
            RuntimeError: another graph; there is no global step, which ``begin`` needs.
        """
        super().begin()
        self._keeper.build()

    def after_create_session(self, session: tf.Session, coord: Any) -> None:
        """A session may begin anywhere in the training."""
        self._keeper.restart()

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written, and begin if it is time."""
        super().before_run(run_context)
        if self._is_chief:
            self._keeper.advance(run_context.session, self.ready)

    def export(self, stem: str, session: tf.Session) -> None:
        """Write ``stem.pb`` and ``stem.compress_params.bin``."""
        self.quantizer.export(stem, session)

    def end(self, session: tf.Session) -> None:
        """Export the trained network, and say of each layer what became of it."""
        super().end(session)
        if self._is_chief:
            coverage = self.quantizer.coverage()
            logger.info("%.1f %% of the weights are stored in few bits\n%s",
                        100 * coverage.share(LayerState.WEIGHT_ONLY), coverage_text(coverage))
