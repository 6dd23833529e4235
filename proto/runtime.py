"""Run a .mnn model on arrays, in a child process: MNN ends the process it is in when a model is broken."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from slimtrain.core import ConversionError
from slimtrain.proto.process import require_mnn, run_child

PathLike = Union[str, "os.PathLike[str]"]
Inputs = Union[np.ndarray, Dict[str, np.ndarray]]
Shapes = Dict[str, Tuple[int, ...]]

_RUNNER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_runner.py")
# Run as a file without its folder on the path: our module names must not hide anybody's.
_START = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
_DTYPES = ("float32", "int32", "int64", "uint8")


class Run(NamedTuple):
    """Outputs by name, and the milliseconds of every timed inference (none without repeats)."""

    outputs: Dict[str, np.ndarray]
    milliseconds: Tuple[float, ...]


def run_model(
    path: PathLike, inputs: Inputs, shapes: Optional[Shapes] = None, timeout: float = 600.0
) -> Dict[str, np.ndarray]:
    """Outputs of a .mnn model, computed by one thread.

    Args:
        path: the model.
        inputs: arrays by input name, or one array for a model with one input, in the layout of the model
            before conversion (ONNX: channels first, TensorFlow: channels last). float64 becomes float32,
            int64 int32.
            Sizes, the batch above all, need not be those the model was converted with.
        shapes: by output name, the shape to give an output; it may differ in axes of size 1 only. MNN returns
            1-D convolutions as [N, C, L, 1]. Other outputs keep the shape they have.
        timeout: seconds.

    Returns:
        Arrays by output name, float32 unless the model computes integers.

    Raises:
        ConversionError: MNN is missing, no such model, unknown inputs, the runtime failed or crashed.
        TypeError: an input of another kind of numbers.
        ValueError: an empty input, integers beyond 32 bits, a shape that does not fit its output.
    """
    outputs = execute(path, inputs, timeout=timeout).outputs
    wanted = shapes or {}
    return {name: reshaped(name, array, wanted.get(name, array.shape)) for name, array in outputs.items()}


def measure_latency(
    path: PathLike, inputs: Inputs, repeats: int = 20, warm_up: int = 3, timeout: float = 600.0
) -> float:
    """Median milliseconds of one inference by one thread, without writing inputs and reading outputs.

    Raises:
        ValueError: no repeats.
        ConversionError: as ``run_model``.
    """
    if repeats < 1 or warm_up < 0:
        raise ValueError(f"repeats must be at least 1 and warm_up 0, got {repeats} and {warm_up}")
    return float(np.median(execute(path, inputs, repeats, warm_up, timeout).milliseconds))


def execute(
    path: PathLike, inputs: Inputs, repeats: int = 0, warm_up: int = 0, timeout: float = 600.0
) -> Run:
    """``run_model`` and ``measure_latency`` in one child; arguments and errors are theirs."""
    require_mnn("MNN")
    model = os.path.abspath(os.fspath(path))
    if not os.path.isfile(model):
        raise ConversionError(f"no such model: {model}")
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    arrays = {name: _plain(name, array) for name, array in named.items()}
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        with open(os.path.join(folder, "names.json"), "w", encoding="utf-8") as file:
            json.dump(list(arrays), file)
        # Numbered, because a tensor may have any name and a file in an archive may not.
        numbered: Dict[str, Any] = {str(index): array for index, array in enumerate(arrays.values())}
        np.savez(os.path.join(folder, "inputs.npz"), **numbered)
        words = ["-c", _START, _RUNNER, model, folder, str(repeats), str(warm_up)]
        run_child(words, folder, timeout, f"running {model}")
        names, milliseconds, outputs = _results(folder)
    return Run(dict(zip(names, outputs)), tuple(milliseconds))


def reshaped(name: str, array: np.ndarray, shape: Tuple[int, ...]) -> np.ndarray:
    """``array`` in a ``shape`` that differs in axes of size 1 only.

    Raises:
        ValueError: any other difference.
    """
    if [size for size in shape if size != 1] != [size for size in array.shape if size != 1]:
        raise ValueError(
            f"output {name!r} has shape {array.shape}, not {tuple(shape)}, even without axes of size 1"
        )
    return array.reshape(shape)


def _results(folder: str) -> Tuple[List[str], List[float], List[np.ndarray]]:
    with open(os.path.join(folder, "result.json"), encoding="utf-8") as file:
        result = json.load(file)
    with np.load(os.path.join(folder, "outputs.npz"), allow_pickle=False) as arrays:
        outputs = [arrays[str(index)] for index in range(len(result["names"]))]
    return result["names"], result["milliseconds"], outputs


def _plain(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype == np.int64:  # which models do not have: the runtime would read each as two numbers
        if array.size and np.abs(array).max() > np.iinfo(np.int32).max:
            raise ValueError(f"input {name!r} holds numbers that do not fit MNN's 32 bits")
        array = array.astype(np.int32)
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"input {name!r} must hold {', '.join(_DTYPES)}, got {array.dtype}")
    if not array.size:
        raise ValueError(f"input {name!r} is empty, shape {array.shape}")
    return array
