"""The report of a converted model: what its file holds, against what was asked for."""

from __future__ import annotations

import os
import shlex
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from slimtrain.core import CompressionReport, Coverage, LayerRow, LayerState, stored_bytes
from slimtrain.proto.coverage import compare, layer_names
from slimtrain.proto.mnnfile import MnnLayer, inspect_model
from slimtrain.proto.options import ConvertOptions
from slimtrain.proto.params import read_params

PathLike = Union[str, "os.PathLike[str]"]

#: stands for two equal results: JSON knows no infinity
EXACT_DB = 300.0


class LayerNote(NamedTuple):
    """What the training side knows of a layer: the share of its weights that is zero, and what was done to it."""

    sparsity: float
    note: str


def joined(first: Optional[LayerNote], second: LayerNote) -> LayerNote:
    """What two stages say of one layer."""
    if first is None:
        return second
    words = [note for note in (first.note, second.note) if note]
    return LayerNote(max(first.sparsity, second.sparsity), "; ".join(words))


def conversion_report(
    title: str,
    model_path: PathLike,
    params_path: PathLike,
    mnn_path: PathLike,
    options: Optional[ConvertOptions] = None,
    sqnr_db: Optional[float] = None,
    notes: Optional[Mapping[str, LayerNote]] = None,
    **pictures: Any,
) -> CompressionReport:
    """Describe a converted model.

    Args:
        title: of the model.
        model_path: the .onnx or .pb that was converted.
        params_path: its parameters.
        mnn_path: the result.
        options: it was converted with.
        sqnr_db: its outputs against the simulation, where they were compared.
        notes: by the layer names of the parameters.
        pictures: the other fields of :class:`slimtrain.core.CompressionReport`, by name.

    Raises:
        ParameterFileError, ConversionError: a file cannot be read.
    """
    params, model = read_params(params_path), inspect_model(mnn_path)
    comparison = compare(params, model)
    names = layer_names(params, model)
    reasons = {
        layer.name: layer.reason
        for layer in comparison.full.layers + comparison.weight_only.layers
        if layer.reason
    }
    known = dict(notes or {})
    rows = [_row(layer, names.get(layer.tensor, layer.name), known, reasons) for layer in model.layers]
    asked = Coverage(comparison.full.layers + comparison.weight_only.layers)
    return CompressionReport(
        title=title,
        files={"model": os.fspath(model_path), "parameters": os.fspath(params_path), "mnn": os.fspath(mnn_path)},
        float_bytes=sum(stored_bytes(layer.parameters, 32, 0) + 4 * layer.channels for layer in model.layers),
        expected_bytes=sum(_expected(layer, row) for layer, row in zip(model.layers, rows)),
        real_bytes=os.path.getsize(mnn_path),
        coverage=1.0 - asked.share(LayerState.FLOAT) if asked.layers else 1.0,
        sqnr_db=None if sqnr_db is None else min(sqnr_db, EXACT_DB),
        command=convert_command(model_path, params_path, mnn_path, options or ConvertOptions()),
        layers=tuple(rows),
        **pictures,
    )


def convert_command(
    model_path: PathLike, params_path: PathLike, mnn_path: PathLike, options: ConvertOptions
) -> str:
    """The command line that converts a model again."""
    words = ["slimtrain", "convert", os.fspath(model_path), "--params", os.fspath(params_path)]
    words += ["-o", os.fspath(mnn_path)]
    words += ["--weight-bits", str(options.weight_bits)] if options.weight_bits else []
    words += ["--block", str(options.weight_block)] if options.weight_block else []
    flags = (("asymmetric", options.asymmetric), ("hqq", options.hqq), ("fp16", options.fp16))
    words += [f"--{name}" for name, wanted in (*flags, ("sparse", options.sparse)) if wanted]
    return " ".join(shlex.quote(word) for word in words)


def _row(
    layer: MnnLayer, name: str, notes: Mapping[str, LayerNote], reasons: Mapping[str, str]
) -> LayerRow:
    note = notes.get(name, LayerNote(0.0, ""))
    parts = [note.note, reasons.get(name, ""), "stored sparse" if layer.sparse else ""]
    said = "; ".join(part for part in parts if part)
    return LayerRow(name, layer.kind, layer.parameters, layer.state.value, layer.bits, note.sparsity, said)


def _expected(layer: MnnLayer, row: LayerRow) -> int:
    """Bytes of a layer: a sparse one stores its survivors and, at the least, one bit to find each weight."""
    if not layer.sparse:
        scales = layer.channels if layer.state is not LayerState.FLOAT else 0
        return stored_bytes(layer.parameters, layer.bits, 0) + 4 * (layer.channels + scales)
    survivors = round(layer.parameters * (1.0 - row.sparsity))
    return stored_bytes(survivors, layer.bits, layer.channels) + layer.parameters // 8


def report_summary(report: CompressionReport) -> List[Tuple[str, str]]:
    """The figures of a report, as pairs of words for a table's foot or a page's head."""
    real = report.real_bytes
    rows: Dict[str, str] = {
        "float bytes": f"{report.float_bytes:,}",
        "expected bytes": f"{report.expected_bytes:,}",
        "real bytes": "not converted" if real is None else f"{real:,}",
        "coverage": f"{report.coverage:.1%}",
        "SQNR": _decibels(report.sqnr_db),
    }
    return list(rows.items())


def _decibels(value: Optional[float]) -> str:
    if value is None:
        return "not measured"
    return "exact" if value >= EXACT_DB else f"{value:.1f} dB"
