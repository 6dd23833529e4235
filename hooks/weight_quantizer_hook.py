"""Low-bit storage of weights as a hook of a monitored session."""
from __future__ import annotations

import logging
from typing import Mapping, Optional, Sequence, Union

import tensorflow.compat.v1 as tf

from slimtrain.core import LayerState, WeightMode
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.reporting import coverage_text
from slimtrain.hooks.warm_start import start_from_checkpoint
from slimtrain.hooks.weight_quantizer import WeightQuantizer

logger = logging.getLogger(__name__)


class WeightQuantizerHook(ExportingHook):
    """``WeightQuantizer`` as a hook; the arguments it shares mean the same.

    Construct it after the model, and before the optimizer and the session. A session that makes no training step
    shows what storing the weights costs without training.

    Args:
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        output_names: what leaves the network; without it nothing is exported.
        init_checkpoint: a float checkpoint that a fresh run starts from; variables it does not hold start as usual.
        is_chief: whether this process exports, as given to the session.

    Raises:
        ValueError, TypeError, RuntimeError: as ``WeightQuantizer``; no checkpoint at ``init_checkpoint``;
            an ``export_dir`` without ``output_names``.
    """

    def __init__(self, graph: Optional[tf.Graph] = None, bits: int = 8, debug_info: bool = False,
                 mode: Union[str, WeightMode] = WeightMode.SYMMETRIC, *, layer_bits: Optional[Mapping[str, int]] = None,
                 skip_quant_layers: Sequence[str] = (), block_size: int = 0,
                 output_names: Optional[Sequence[str]] = None, export_dir: Optional[str] = None,
                 init_checkpoint: Optional[str] = None, is_chief: bool = True) -> None:
        graph = graph if graph is not None else tf.get_default_graph()
        if init_checkpoint is not None:
            start_from_checkpoint(graph, init_checkpoint)
        super().__init__(graph, export_dir, output_names, is_chief)
        self.quantizer = WeightQuantizer(
            graph, bits, debug_info, mode, layer_bits=layer_bits, skip_quant_layers=skip_quant_layers,
            block_size=block_size, output_names=output_names)

    def ready(self, session: tf.Session) -> bool:
        """Weights can be stored at any time."""
        return True

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
