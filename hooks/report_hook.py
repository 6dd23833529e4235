"""The report at the end of a monitored session: what was done to each layer, and what it gained."""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import CompressionReport, ConversionError, History, save_report
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.hooks.layer_statistics import layer_statistics
from slimtrain.hooks.quantizer import GraphQuantizer
from slimtrain.hooks.training_runs import TrainingRuns
from slimtrain.hooks.weight_quantizer import WeightQuantizer
from slimtrain.proto import Simulation, convert, verify
from slimtrain.proto.conversion_report import LayerNote, conversion_report, joined
from slimtrain.proto.report_page import write_page
from slimtrain.proto.report_table import report_text

logger = logging.getLogger(__name__)

Quantizer = Union[GraphQuantizer, WeightQuantizer]

#: images of the example; the simulation computes in integers and takes its time
_MOST_IMAGES = 16


class CompressionReportHook(tf.train.SessionRunHook):
    """Watches the compression hooks of a session, converts what they exported, and reports what they did.

    When the session ends it logs one table, and writes ``compression_report.json`` and, on request, a page with
    pictures beside the exported model and its ``.mnn``: ranges of weights and activations, accuracy of each layer,
    spectra, and what changed in training. A quantized model is also run by MNN and compared with its simulation, on
    the first images that it was trained on. Where MNN is not installed the hook says so and does nothing.

    Args:
        hooks: the compression hooks; put this one behind them in the session's list.
        html: also write ``compression_report.html``; needs the extra ``report``.
        is_chief: whether this process exports, as given to the session.
    """

    def __init__(self, hooks: Sequence[ExportingHook], html: bool = False, is_chief: bool = True) -> None:
        self.report: Optional[CompressionReport] = None  #: of the last session
        self.html = html
        self._hooks = list(hooks)
        self._is_chief = is_chief
        self._history = History()
        self._quantizer = _quantizer(self._hooks)
        self._runs = TrainingRuns(self._hooks[0].graph)
        self._example: Dict[str, np.ndarray] = {}  #: by the names of an inference graph

    def before_run(self, run_context: Any) -> Optional[tf.train.SessionRunArgs]:
        """Let the first run that trains tell what the network is given."""
        if self._quantizer is None or self._example or not self._is_chief:
            return None
        if not self._runs.trains(run_context.original_args.fetches):
            return None
        return tf.train.SessionRunArgs({given: tensor for tensor, given in self._quantizer.inputs.items()})

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Remember what changes in training."""
        if self._quantizer is not None and run_values.results:
            self._example = _few(self._quantizer, run_values.results)
        session = run_context.session
        step = tf.train.get_global_step(self._hooks[0].graph)
        number = int(session.run(step)) if self._is_chief and step is not None else -1
        if number >= 0 and self._history.wants(number):
            self._history.add(number, self._numbers(session))

    def end(self, session: tf.Session) -> None:
        """Convert what was exported, and report it."""
        exporter = next((hook for hook in self._hooks if hook.exported), None) if self._is_chief else None
        if exporter is None:
            return
        stem = exporter.exported
        options, params = exporter.convert_options(), stem + ".compress_params.bin"
        try:
            convert(stem + ".pb", stem + ".mnn", params, options)
        except ConversionError as error:
            logger.warning("there is no compression report: %s", error)
            return
        self.report = conversion_report(os.path.basename(stem), stem + ".pb", params, stem + ".mnn", options,
                                        self._compare(stem + ".mnn", session), self._notes(session),
                                        **self._pictures(session))
        path = os.path.join(os.path.dirname(stem), "compression_report")
        save_report(path + ".json", self.report)
        if self.html:
            write_page(path + ".html", self.report)
        logger.info("%s", report_text(self.report))

    # -- inside

    def _compare(self, mnn: str, session: tf.Session) -> Optional[float]:
        """SQNR of MNN's outputs against the simulation, in dB."""
        if self._quantizer is None or not self._example:
            return None
        names = [name.partition(":")[0] for name in self._quantizer.output_names]
        outputs = dict(zip(names, self._quantizer.simulate(session, names, self._feeds())))
        return verify(mnn, Simulation(self._example, outputs, {}), repeats=1).sqnr_db

    def _pictures(self, session: tf.Session) -> Dict[str, Any]:
        pictures: Dict[str, Any] = {"curves": self._history.curves(), "spectra": {}}
        for hook in self._hooks:
            pictures["spectra"].update(hook.spectra())
        if self._quantizer is not None and self._example:
            statistics = layer_statistics(self._quantizer, session, self._feeds())
            pictures.update(weights=statistics.weights, activations=statistics.inputs, layer_sqnr_db=statistics.sqnr_db)
        return pictures

    def _feeds(self) -> Dict[str, np.ndarray]:
        return {name + ":0": value for name, value in self._example.items()}

    def _notes(self, session: tf.Session) -> Dict[str, LayerNote]:
        notes: Dict[str, LayerNote] = {}
        for hook in self._hooks:
            for name, note in hook.layer_notes(session).items():
                notes[name] = joined(notes.get(name), note)
        return notes

    def _numbers(self, session: tf.Session) -> Dict[str, float]:
        tensors = {name: tensor for hook in self._hooks for name, tensor in hook.followed().items()}
        values = session.run(tensors)
        return {name: float(value.mean()) if hasattr(value, "mean") else float(value) for name, value in values.items()}


def _quantizer(hooks: List[ExportingHook]) -> Optional[Quantizer]:
    """The quantizer that one of the hooks trains with; None where everything stays float."""
    found = (getattr(hook, "quantizer", None) for hook in hooks)
    return next((each for each in found if isinstance(each, (GraphQuantizer, WeightQuantizer))), None)


def _few(quantizer: Quantizer, values: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """The first images, where the network takes any number of them."""
    shapes = [quantizer.graph.get_tensor_by_name(name).shape for name in quantizer.inputs]
    if all(shape.rank is None or shape.as_list()[0] is None for shape in shapes):
        return {name: value[:_MOST_IMAGES] for name, value in values.items()}
    return values
