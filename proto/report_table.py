"""A report as a table, for a terminal and for a log."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimtrain.core import CompressionReport
from slimtrain.proto.conversion_report import report_summary

_WIDTH = 160


def report_table(report: CompressionReport) -> Table:
    """One row per layer, the figures of the whole below."""
    caption = ", ".join(f"{name} {value}" for name, value in report_summary(report))
    table = Table(title=report.title, caption=f"{caption}\n{report.command}", title_justify="left")
    for name in ("layer", "kind", "weights", "stored", "bits", "zeros", "note"):
        table.add_column(name, justify="right" if name in ("weights", "bits", "zeros") else "left")
    for row in report.layers:
        numbers = (f"{row.weights:,}", row.state, str(row.bits), f"{row.sparsity:.1%}")
        # as Text: rich would take what stands in brackets for markup
        table.add_row(Text(row.name), row.kind, *numbers, Text(row.note))
    return table


def report_text(report: CompressionReport) -> str:
    """The table as plain text."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(report_table(report))
    return text.getvalue()
