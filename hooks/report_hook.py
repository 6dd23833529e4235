"""The report at the end of a monitored session: what was done to each layer, and what it gained."""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, Optional, Sequence

import tensorflow.compat.v1 as tf

from slimtrain.core import CompressionReport, ConversionError, History, save_report
from slimtrain.hooks.exporting_hook import ExportingHook
from slimtrain.proto import convert
from slimtrain.proto.conversion_report import LayerNote, conversion_report, joined
from slimtrain.proto.report_page import write_page
from slimtrain.proto.report_table import report_text

logger = logging.getLogger(__name__)


class CompressionReportHook(tf.train.SessionRunHook):
    """Watches the compression hooks of a session, converts what they exported, and reports what they did.

    When the session ends it logs one table, and writes ``compression_report.json`` and, on request, a page with
    pictures beside the exported model and its ``.mnn``. Where MNN is not installed it says so and does nothing.

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

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Remember what changes in training."""
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
        notes: Dict[str, LayerNote] = {}
        for hook in self._hooks:
            for name, note in hook.layer_notes(session).items():
                notes[name] = joined(notes.get(name), note)
        self.report = conversion_report(os.path.basename(stem), stem + ".pb", params, stem + ".mnn", options, None,
                                        notes, curves=self._history.curves())
        path = os.path.join(os.path.dirname(stem), "compression_report")
        save_report(path + ".json", self.report)
        if self.html:
            write_page(path + ".html", self.report)
        logger.info("%s", report_text(self.report))

    def _numbers(self, session: tf.Session) -> Dict[str, float]:
        tensors = {name: tensor for hook in self._hooks for name, tensor in hook.followed().items()}
        values = session.run(tensors)
        return {name: float(value.mean()) if hasattr(value, "mean") else float(value) for name, value in values.items()}
