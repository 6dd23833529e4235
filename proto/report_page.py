"""A report as one HTML page that needs nothing else: tables, and pictures as SVG inside it."""

from __future__ import annotations

import io
import math
import os
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple, Union

from slimtrain.core import ChosenSpectrum, CompressionReport, Curve, Histogram, SlimtrainError, write_whole
from slimtrain.proto.conversion_report import report_summary

PathLike = Union[str, "os.PathLike[str]"]

_TEMPLATE = "report_page.html"
_COLUMNS = 4
_MOST_LAYERS = 48  #: of one picture; more could not be read


def write_page(path: PathLike, report: CompressionReport) -> None:
    """Write a report as an HTML page, whole or not at all.

    Raises:
        SlimtrainError: Jinja2 or matplotlib is not installed.
        OSError: the page cannot be written.
    """
    write_whole(path, render_page(report).encode("utf-8"))


def render_page(report: CompressionReport) -> str:
    """The text of the page.

    Raises:
        SlimtrainError: Jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, select_autoescape
    except ImportError as error:
        raise SlimtrainError("a page needs Jinja2: pip install 'slimtrain[report]'") from error
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(os.path.abspath(__file__))), autoescape=select_autoescape()
    )
    template = environment.get_template(_TEMPLATE)
    return str(template.render(report=report, summary=report_summary(report), pictures=_pictures(report)))


def _pictures(report: CompressionReport) -> List[Tuple[str, str]]:
    """(title, SVG) of everything there are numbers for."""
    drawings: Sequence[Tuple[str, Mapping[str, Any], Callable[[Any, Mapping[str, Any]], None]]] = (
        ("Accuracy of each layer's output against float, dB", report.layer_sqnr_db, _draw_bars),
        ("Weights, and the range that is kept", report.weights, _grid_of(_draw_histogram)),
        ("Activations, and the range that is kept", report.activations, _grid_of(_draw_histogram)),
        ("Singular values, and the rank that is kept", report.spectra, _grid_of(_draw_spectrum)),
        ("Over the steps of training", report.curves, _grid_of(_draw_curve)),
    )
    return [(_title(title, numbers), _svg(numbers, draw)) for title, numbers, draw in drawings if numbers]


def _title(title: str, numbers: Mapping[str, Any]) -> str:
    return title if len(numbers) <= _MOST_LAYERS else f"{title} (first {_MOST_LAYERS} of {len(numbers)})"


def _svg(numbers: Mapping[str, Any], draw: Callable[[Any, Mapping[str, Any]], None]) -> str:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SlimtrainError("pictures need matplotlib: pip install 'slimtrain[report]'") from error
    shown: Dict[str, Any] = dict(list(numbers.items())[:_MOST_LAYERS])
    figure = Figure()
    draw(figure, shown)
    figure.tight_layout()
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration, which has no place inside HTML


def _draw_bars(figure: Any, values: Mapping[str, float]) -> None:
    figure.set_size_inches(10, 1.0 + 0.22 * len(values))
    axes = figure.add_subplot()
    finite = [value if value is not None and math.isfinite(value) else 0.0 for value in values.values()]
    axes.barh(range(len(values)), finite)
    axes.set_yticks(range(len(values)))
    axes.set_yticklabels(list(values))
    axes.invert_yaxis()


def _grid_of(draw: Callable[[Any, Any], None]) -> Callable[[Any, Mapping[str, Any]], None]:
    """One small picture for each name."""

    def draw_grid(figure: Any, numbers: Mapping[str, Any]) -> None:
        rows = math.ceil(len(numbers) / _COLUMNS)
        figure.set_size_inches(12, 2.2 * rows)
        for place, (name, value) in enumerate(numbers.items(), start=1):
            axes = figure.add_subplot(rows, _COLUMNS, place)
            draw(axes, value)
            axes.set_title(name, fontsize=8)
            axes.tick_params(labelsize=6)

    return draw_grid


def _draw_histogram(axes: Any, histogram: Histogram) -> None:
    width = (histogram.high - histogram.low) / len(histogram.counts) or 1.0
    middles = [histogram.low + (index + 0.5) * width for index in range(len(histogram.counts))]
    axes.bar(middles, histogram.counts, width=width, log=True)
    for clip in (histogram.clip_low, histogram.clip_high):
        if math.isfinite(clip):
            axes.axvline(clip, color="tab:red", linewidth=1)


def _draw_spectrum(axes: Any, spectrum: ChosenSpectrum) -> None:
    axes.semilogy(range(1, len(spectrum.values) + 1), spectrum.values, marker=".", linewidth=0.8)
    axes.axvline(spectrum.rank + 0.5, color="tab:red", linewidth=1)


def _draw_curve(axes: Any, curve: Curve) -> None:
    axes.plot(curve.steps, curve.values, linewidth=0.9)
