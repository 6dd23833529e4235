"""What people see of a quantizer: curves in the event file while it trains, and a table of its layers at the end."""
from __future__ import annotations

import io
from typing import Any, Mapping

import tensorflow.compat.v1 as tf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimtrain.core import Coverage
from slimtrain.hooks.state import SCOPE

#: wide enough for any name: a log has no edge
_WIDTH = 1000


def follow(graph: tf.Graph, values: Mapping[str, Any]) -> None:
    """Let whoever merges the summaries of ``graph`` write ``values`` by name: numbers, and the mean of tensors."""
    with graph.as_default(), tf.control_dependencies(None), tf.name_scope(None):
        for name, value in values.items():
            mean = tf.reduce_mean(tf.cast(value, tf.float32))
            tf.summary.scalar("{}/summary/{}".format(SCOPE, name), mean)


def coverage_text(coverage: Coverage) -> str:
    """One line per layer: its kind, its weights and their share of all, int8 or float, and why if it is float."""
    table = Table(box=box.MARKDOWN)
    for title in ("layer", "kind", "weights", "share", "state", "why not int8"):
        table.add_column(title, justify="right" if title in ("weights", "share") else "left")
    for name, kind, weights, share, state, reason in coverage.rows():
        cells = (name, kind, "{:,}".format(weights), "{:.1%}".format(share), state, reason)
        table.add_row(*map(Text, cells))
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
