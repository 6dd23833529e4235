"""What compression did to a model, as one value: the layers, the bytes, and the numbers behind each picture.

It is written as JSON beside the model, and read again by whatever draws it.
"""
from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple, Type, TypeVar, Union

import numpy as np

from slimtrain.core.errors import SlimtrainError
from slimtrain.core.files import write_whole

PathLike = Union[str, "os.PathLike[str]"]

_BINS = 64
_Row = TypeVar("_Row")


class LayerRow(NamedTuple):
    """A layer with weights as it is stored: in the file's words, with what was done to it."""

    name: str
    kind: str
    weights: int
    state: str        #: "int8", "weight only" or "float"
    bits: int         #: of one stored weight
    sparsity: float   #: share of its weights that is zero
    note: str         #: what was done, or why nothing was


class Histogram(NamedTuple):
    """Counts between equally spaced edges, and the range that quantization keeps."""

    counts: Tuple[int, ...]
    low: float
    high: float
    clip_low: float
    clip_high: float


class Curve(NamedTuple):
    """A number at some steps of training."""

    steps: Tuple[int, ...]
    values: Tuple[float, ...]


class ChosenSpectrum(NamedTuple):
    """Singular values, in descending order, and how many were kept."""

    values: Tuple[float, ...]
    rank: int


@dataclass(frozen=True)
class CompressionReport:
    """One compressed model.

    Attributes:
        title: of the model.
        files: what is written where, by kind.
        float_bytes: size of its weights and biases in float32.
        expected_bytes: size that the bits of its layers ask for.
        real_bytes: size of the converted file; None where it was not converted.
        coverage: share of the weights asked for that is compressed in the file, from 0 to 1.
        sqnr_db: outputs of the device's runtime against the simulation; None where it was not run.
        command: the converter command that makes the file again.
        layers: in the order of execution.
        weights, activations: histograms by layer.
        layer_sqnr_db: outputs of each layer, compressed against float.
        curves: what changed in training, by name.
        spectra: singular values by layer.
    """

    title: str
    files: Mapping[str, str]
    float_bytes: int
    expected_bytes: int
    real_bytes: Optional[int]
    coverage: float
    sqnr_db: Optional[float]
    command: str
    layers: Tuple[LayerRow, ...]
    weights: Mapping[str, Histogram] = field(default_factory=dict)
    activations: Mapping[str, Histogram] = field(default_factory=dict)
    layer_sqnr_db: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    spectra: Mapping[str, ChosenSpectrum] = field(default_factory=dict)


def histogram(values: np.ndarray, clip_low: float = -math.inf, clip_high: float = math.inf) -> Histogram:
    """Counts of all finite values.

    Args:
        values: any shape, floating point.
        clip_low, clip_high: the range that quantization keeps, in the units of the values.
    """
    finite = np.asarray(values, np.float64).ravel()
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    counts, _ = np.histogram(finite, bins=_BINS, range=(low, high if high > low else low + 1.0))
    return Histogram(tuple(int(count) for count in counts), low, high, float(clip_low), float(clip_high))


def stored_bytes(weights: int, bits: int, channels: int) -> int:
    """Size of a layer's weights in so many bits, with a float32 scale and bias for each output channel."""
    return math.ceil(weights * bits / 8) + 8 * channels


def save_report(path: PathLike, report: CompressionReport) -> None:
    """Write a report as JSON, whole or not at all; values that are not finite become null."""
    text = json.dumps(_plain(report), indent=2, sort_keys=True, allow_nan=False)
    write_whole(path, text.encode("utf-8"))


def load_report(path: PathLike) -> CompressionReport:
    """Read what :func:`save_report` wrote.

    Raises:
        SlimtrainError: it is not such a file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        values = json.loads(content.decode("utf-8"))
        return CompressionReport(**{**values, **_rows(values)})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SlimtrainError("%s is no compression report: %s" % (os.fspath(path), error)) from error


def _plain(report: CompressionReport) -> Dict[str, Any]:
    values = dict(vars(report))
    values["layers"] = [row._asdict() for row in report.layers]
    for name in ("weights", "activations", "curves", "spectra"):
        values[name] = {key: row._asdict() for key, row in values[name].items()}
    result: Dict[str, Any] = _finite(values)
    return result


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(values: Mapping[str, Any]) -> Dict[str, Any]:
    return {
        "layers": tuple(_row(LayerRow, row) for row in values["layers"]),
        "weights": {name: _clipped(row) for name, row in values["weights"].items()},
        "activations": {name: _clipped(row) for name, row in values["activations"].items()},
        "curves": {name: _row(Curve, row) for name, row in values["curves"].items()},
        "spectra": {name: _row(ChosenSpectrum, row) for name, row in values["spectra"].items()},
    }


def _row(kind: Type[_Row], row: Mapping[str, Any]) -> _Row:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})


def _clipped(row: Mapping[str, Any]) -> Histogram:
    found = _row(Histogram, row)
    return found._replace(clip_low=-math.inf if found.clip_low is None else found.clip_low,
                          clip_high=math.inf if found.clip_high is None else found.clip_high)
