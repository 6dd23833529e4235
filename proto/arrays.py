"""Arrays in files: inputs by name, and recordings of what a model is expected to compute from them."""

from __future__ import annotations

import io
import os
import zipfile
from typing import Any, Dict, NamedTuple, Optional, Union

import numpy as np

from slimtrain.core import ConversionError, write_whole

PathLike = Union[str, "os.PathLike[str]"]
Arrays = Dict[str, np.ndarray]

_INPUT, _OUTPUT, _SCALE = "input:", "output:", "scale:"
# What np.savez calls an array that was given without a name.
_UNNAMED = "arr_0"


class Simulation(NamedTuple):
    """A recording by name: inputs, the outputs expected for them, the step of outputs that lie on a grid."""

    inputs: Arrays
    outputs: Arrays
    scales: Dict[str, float]


def save_simulation(
    path: PathLike, inputs: Arrays, outputs: Arrays, scales: Optional[Dict[str, float]] = None
) -> None:
    """Write a recording as .npz, whole or not at all, to ``verify`` a model with, on this or another machine.

    Raises:
        ValueError: no inputs, no outputs, or the scale of an unknown output.
        OSError: the file cannot be written.
    """
    steps = scales or {}
    if not inputs or not outputs:
        raise ValueError(f"a simulation needs inputs and outputs, got {sorted(inputs)} and {sorted(outputs)}")
    if not set(steps) <= set(outputs):
        raise ValueError(f"scales of outputs that do not exist: {sorted(set(steps) - set(outputs))}")
    entries: Dict[str, Any] = {}
    for prefix, part in ((_INPUT, inputs), (_OUTPUT, outputs), (_SCALE, steps)):
        entries.update({prefix + name: np.asarray(value) for name, value in part.items()})
    buffer = io.BytesIO()
    np.savez(buffer, **entries)
    write_whole(path, buffer.getvalue())


def load_simulation(path: PathLike) -> Simulation:
    """Read what ``save_simulation`` wrote.

    Raises:
        ConversionError: no such file, or another kind of file.
    """
    arrays = _load(path)
    parts: Dict[str, Arrays] = {_INPUT: {}, _OUTPUT: {}, _SCALE: {}}
    for key, array in arrays.items():
        prefix = key[: key.find(":") + 1]
        if prefix not in parts:
            raise ConversionError(f"{os.fspath(path)}: not a recorded simulation, it holds an array {key!r}")
        parts[prefix][key[len(prefix) :]] = array
    if not parts[_INPUT] or not parts[_OUTPUT]:
        raise ConversionError(f"{os.fspath(path)}: not a recorded simulation: inputs or outputs are missing")
    scales = {name: float(scale) for name, scale in parts[_SCALE].items()}
    return Simulation(parts[_INPUT], parts[_OUTPUT], scales)


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
        raise ConversionError(f"{os.fspath(path)}: cannot read arrays, expected .npz: {error}") from error
