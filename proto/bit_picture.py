"""A picture of what each width costs each layer."""
from __future__ import annotations

import io
import os
from typing import Any, Optional, Union

import numpy as np

from slimtrain.core import SlimtrainError, write_whole
from slimtrain.core.bit_choice import FLOAT_BITS, BitPlan, BitSensitivity

PathLike = Union[str, "os.PathLike[str]"]


def draw_sensitivity(sensitivity: BitSensitivity, path: PathLike, plan: Optional[BitPlan] = None) -> None:
    """Write a map of layers by widths: dark where the network's outputs lose, a frame around what a plan chose.

    Args:
        sensitivity: what was measured.
        path: of the picture; its suffix tells the format (``.png``, ``.svg``, ``.pdf``).
        plan: marked in the picture.

    Raises:
        SlimtrainError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise SlimtrainError("pictures need matplotlib: pip install 'slimtrain[report]'") from error
    layers, widths = sensitivity.layers, [width for width in sensitivity.widths if width != FLOAT_BITS]
    values = np.full((len(layers), len(widths)), np.nan)
    for result in sensitivity.results:
        if result.bits != FLOAT_BITS:
            values[layers.index(result.layer), widths.index(result.bits)] = result.sqnr_db
    finite = values[np.isfinite(values)]
    shown = np.nan_to_num(values, posinf=finite.max() if finite.size else 0.0, neginf=0.0)
    figure = Figure(figsize=(2.5 + 0.9 * len(widths), 1.2 + 0.32 * len(layers)))
    axes = figure.add_subplot()
    picture = axes.imshow(shown, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(widths)), ["%d bits" % width for width in widths])
    axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(picture, label="outputs, dB")
    _write_numbers(axes, values, shown)
    for row, layer in enumerate(layers):
        if plan is not None and plan.bits.get(layer) in widths:
            corner = widths.index(plan.bits[layer]) - 0.5, row - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=os.path.splitext(os.fspath(path))[1].lstrip(".") or "png", dpi=120)
    write_whole(path, buffer.getvalue())


def _write_numbers(axes: Any, values: np.ndarray, shown: np.ndarray) -> None:
    middle = (shown.max() + shown.min()) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "black" if shown[row, column] > middle else "white"
        axes.text(column, row, "%.0f" % value, ha="center", va="center", color=color, fontsize=8)
