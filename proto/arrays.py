"""Arrays in files: inputs by name, and a recorded simulation of what a model computes from them."""

from __future__ import annotations

import io
import os
import zipfile
from typing import Dict, NamedTuple, Optional, Union

import numpy as np

from slimtrain.core import ConversionError, write_whole

PathLike = Union[str, "os.PathLike[str]"]
Arrays = Dict[str, np.ndarray]

_PREFIXES = ("input:", "output:", "scale:")
# What np.savez calls an array that was given without a name.
_UNNAMED = "arr_0"


class Simulation(NamedTuple):
    """Inputs, the outputs expected for them, and the step of every output that lies on a grid; all by name."""

    inputs: Arrays
    outputs: Arrays
    scales: Dict[str, float]


def save_simulation(path: PathLike, inputs: Arrays, outputs: Arrays, scales: Optional[Dict[str, float]] = None) -> None:
    """Write a recorded simulation as .npz, whole or not at all, for ``verify`` on this or another machine.

    Raises:
        ValueError: no inputs, no outputs, or a scale of an unknown output.
        OSError: the file cannot be written.
    """
    unknown = sorted(set(scales or {}) - set(outputs))
    if not inputs or not outputs or unknown:
        raise ValueError("a simulation needs inputs and outputs, and scales of its outputs only; got {} and {}, "
                         "scales without output: {}".format(sorted(inputs), sorted(outputs), unknown))
    parts = (inputs, outputs, {name: np.float64(scale) for name, scale in (scales or {}).items()})
    buffer = io.BytesIO()
    np.savez(buffer, **{prefix + name: np.asarray(value) for prefix, part in zip(_PREFIXES, parts)
                        for name, value in part.items()})
    write_whole(path, buffer.getvalue())


def load_simulation(path: PathLike) -> Simulation:
    """Read what ``save_simulation`` wrote.

    Raises:
        ConversionError: no such file, or another kind of file.
    """
    arrays = _load(path)
    strange = [key for key in arrays if not key.startswith(_PREFIXES)]
    if strange or not arrays:
        raise ConversionError("{}: not a recorded simulation: arrays must be called {}name, got {}".format(
            os.fspath(path), "name, ".join(_PREFIXES), strange))
    inputs, outputs, scales = ({key[len(prefix):]: array for key, array in arrays.items() if key.startswith(prefix)}
                               for prefix in _PREFIXES)
    return Simulation(inputs, outputs, {name: float(scale) for name, scale in scales.items()})


def load_inputs(path: PathLike) -> Union[np.ndarray, Arrays]:
    """Inputs by name from an .npz; an array saved without a name comes back alone, for a model with one input.

    Raises:
        ConversionError: no such file, or no .npz of plain arrays.
    """
    arrays = _load(path)
    return arrays[_UNNAMED] if list(arrays) == [_UNNAMED] else arrays


def _load(path: PathLike) -> Arrays:
    try:
        loaded = np.load(os.fspath(path), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {_UNNAMED: loaded}
        with loaded as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConversionError("{}: cannot read arrays from this file (expected .npz): {}".format(
            os.fspath(path), error)) from error
