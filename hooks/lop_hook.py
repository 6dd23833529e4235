"""Linear over-parameterization inside a monitored session."""
from __future__ import annotations

from typing import Any, Collection, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.hooks.float_network import FloatHook
from slimtrain.hooks.lop import LOP
from slimtrain.hooks.low_rank import check_decomposable
from slimtrain.hooks.training_runs import TrainingRuns
from slimtrain.hooks.warm_start import start_from_checkpoint


class LOPHook(FloatHook):
    """Trains the graph expanded, and exports it as the small network that it equals.

    Construct it after the model, and before the optimizer and the session. Checkpoints hold the expanded variables, so
    that a resumed run goes on exactly; the exported ``.pb`` holds the merged weights under the original names, and
    :func:`get_op_weight_values` saves them for another run.

    Args:
        expand_rate: channels in between over channels of the layer; 2 to 16 are usual.
        add_batchnorm: normalize in between.
        add_bypass: add a layer's input to its output where they have one shape.
        graph: the small network; None for the default graph.
        is_training: see :class:`LOP`; a placeholder is fed unless a run does it: True if that trains, else
            False.
        skip_layers: names or patterns (``block1/*``) of operations to leave.
        expand_pointwise: expand 1x1 convolutions too.
        expand_linear: expand matrix products too.
        keep_weights: start from the model's weights; otherwise expanded layers start at random.
        init_checkpoint: a checkpoint, or a file of ``get_op_weight_values``, that a fresh run starts from; variables it
            does not hold start as usual. Expanded layers start from it with ``keep_weights``.
        output_names: what leaves the network; without it nothing is exported.
        export_dir: where ``model.pb`` and ``model.compress_params.bin`` go at the end, and a pair for every checkpoint;
            None for the folder of the checkpoints.
        is_chief: whether this process exports, as given to the session.

    Raises:
        TypeError, RuntimeError, ValueError: as ``LOP`` and its ``linear_expand_layers``; no checkpoint at
            ``init_checkpoint``; an ``export_dir`` without ``output_names``.
    """

    def __init__(self, expand_rate: int, add_batchnorm: bool = True, add_bypass: bool = True, *,
                 graph: Optional[tf.Graph] = None, is_training: Optional[bool] = None,
                 skip_layers: Collection[str] = (), expand_pointwise: bool = False, expand_linear: bool = False,
                 keep_weights: bool = False, init_checkpoint: Optional[str] = None,
                 output_names: Optional[Sequence[str]] = None, export_dir: Optional[str] = None,
                 is_chief: bool = True) -> None:
        LOP.check(expand_rate)
        graph = graph if graph is not None else tf.get_default_graph()
        check_decomposable(graph)
        if init_checkpoint is not None:
            start_from_checkpoint(graph, init_checkpoint)
        #: the object on the graph, with its report
        self.lop = LOP(graph, is_training)
        self.lop.linear_expand_layers(expand_rate, None, add_batchnorm, add_bypass, skip_layers=skip_layers,
                                      expand_pointwise=expand_pointwise, expand_linear=expand_linear,
                                      keep_weights=keep_weights)
        super().__init__(graph, export_dir, output_names, is_chief)
        self._runs = TrainingRuns(graph)

    def before_run(self, run_context: Any) -> Any:
        """Export a checkpoint that was just written, and feed the state."""
        super().before_run(run_context)
        return self._runs.feed(run_context, self.lop.is_training)
