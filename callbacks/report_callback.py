"""The report at the end of fit: what was done to each layer, what it gained, and how to convert the model again."""
from __future__ import annotations

import logging
import os
from typing import Any, Dict, List, Mapping, Optional

from slimtrain.callbacks.callback import CompressionCallback, compressions
from slimtrain.callbacks.layer_statistics import layer_statistics
from slimtrain.callbacks.lightning_bases import Callback
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.weight_quantizer import WeightQuantizer
from slimtrain.core import CompressionReport, History, save_report
from slimtrain.proto.conversion_report import LayerNote, conversion_report, joined
from slimtrain.proto.report_page import write_page
from slimtrain.proto.report_table import report_text

logger = logging.getLogger(__name__)


class CompressionReportCallback(Callback):
    """Watches the compression callbacks of a Trainer and reports what they did.

    At the end of ``fit`` it logs one table, and writes ``compression_report.json`` and, on request, a page with
    pictures beside the converted model: ranges of weights and activations, accuracy of each layer, spectra, and what
    changed in training.

    Args:
        html: also write ``compression_report.html``; needs the extra ``report``.
    """

    def __init__(self, html: bool = True) -> None:
        super().__init__()
        self.html = html
        self.report: Optional[CompressionReport] = None  #: of the last ``fit``
        self._history = History()

    def state_dict(self) -> Dict[str, Any]:
        """The curves so far."""
        return self._history.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on with the curves of a checkpoint."""
        self._history.load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._history.wants(trainer.global_step):
            numbers: Dict[str, float] = {}
            for callback in compressions(trainer):
                numbers.update(callback.progress())
            self._history.add(trainer.global_step, numbers)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        callbacks = compressions(trainer)
        exporter = next((each for each in callbacks if getattr(each, "deployed", None) is not None), None)
        if exporter is None:
            logger.info("there is no compression report: no model was converted")
            return
        self.report = _report(type(pl_module).__name__, exporter, callbacks, self._history)
        folder = os.path.dirname(os.path.abspath(exporter.deployed.mnn))
        save_report(os.path.join(folder, "compression_report.json"), self.report)
        if self.html:
            write_page(os.path.join(folder, "compression_report.html"), self.report)
        logger.info("%s", report_text(self.report))


def _report(title: str, exporter: Any, callbacks: List[CompressionCallback], history: History) -> CompressionReport:
    stem = os.path.splitext(exporter.deployed.mnn)[0]
    pictures: Dict[str, Any] = {"curves": history.curves(), "spectra": {}}
    for callback in callbacks:
        pictures["spectra"].update(callback.spectra())
    quantizer = getattr(exporter, "_quantizer", None)
    if isinstance(quantizer, (QATQuantizer, WeightQuantizer)):
        statistics = layer_statistics(quantizer, exporter.example())
        pictures.update(weights=statistics.weights, activations=statistics.inputs, layer_sqnr_db=statistics.sqnr_db)
    return conversion_report(title, stem + ".onnx", stem + ".compress_params.bin", exporter.deployed.mnn,
                             exporter.convert_options(), exporter.deployed.sqnr_db, _notes(callbacks), **pictures)


def _notes(callbacks: List[CompressionCallback]) -> Mapping[str, LayerNote]:
    """What each callback says of a layer, joined."""
    notes: Dict[str, LayerNote] = {}
    for callback in callbacks:
        for name, note in callback.layer_notes().items():
            notes[name] = joined(notes.get(name), note)
    return notes
