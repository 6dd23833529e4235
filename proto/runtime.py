"""Run a .mnn model on arrays, in a child process: MNN ends the process it is in when a model is broken."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from slimtrain.core import ConversionError
from slimtrain.proto.process import require_mnn, run_child

PathLike = Union[str, "os.PathLike[str]"]
Inputs = Union[np.ndarray, Dict[str, np.ndarray]]
Shapes = Dict[str, Tuple[int, ...]]

_RUNNER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_runner.py")
# Run as a file, but without its folder on the path: our module names must not hide anybody's.
_START = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
_TYPES = (np.float32, np.int32, np.uint8, np.int64)


class Run(NamedTuple):
    """Outputs by name, and milliseconds of every timed inference (empty when none was timed)."""

    outputs: Dict[str, np.ndarray]
    milliseconds: Tuple[float, ...]


def run_model(path: PathLike, inputs: Inputs, shapes: Optional[Shapes] = None,
              timeout: float = 600.0) -> Dict[str, np.ndarray]:
    """Outputs of a .mnn model, computed by one thread.

    Args:
        path: the model.
        inputs: arrays by input name, or one array for a model with one input, in the layout of the model that was
            converted (ONNX: channels first, TensorFlow: channels last). float64 becomes float32; batch and other sizes
            need not be those the model was converted with.
        shapes: shapes of outputs that are known to differ in axes of size 1; 1-D convolutions come out as
            [N, C, L, 1]. Others keep the shape MNN gives.
        timeout: seconds.

    Returns:
        Arrays by output name, float32 unless the model computes integers.

    Raises:
        ConversionError: MNN is missing, unknown inputs, the runtime failed or crashed.
        TypeError, ValueError: inputs that are no numbers, or shapes that do not fit.
    """
    return execute(path, inputs, shapes, timeout=timeout).outputs


def measure_latency(path: PathLike, inputs: Inputs, repeats: int = 20, warm_up: int = 3,
                    timeout: float = 600.0) -> float:
    """Median milliseconds of one inference by one thread, writing inputs and reading outputs left out.

    Raises:
        ValueError: no repeats.
        ConversionError: as ``run_model``.
    """
    if repeats < 1 or warm_up < 0:
        raise ValueError("repeats must be at least 1 and warm_up 0, got {} and {}".format(repeats, warm_up))
    return float(np.median(execute(path, inputs, None, repeats, warm_up, timeout).milliseconds))


def execute(path: PathLike, inputs: Inputs, shapes: Optional[Shapes] = None, repeats: int = 0, warm_up: int = 0,
            timeout: float = 600.0) -> Run:
    """``run_model`` and ``measure_latency`` in one child."""
    require_mnn("MNN")
    model = os.path.abspath(os.fspath(path))
    if not os.path.isfile(model):
        raise ConversionError("no such model: {}".format(model))
    arrays = {name: _plain(name, array) for name, array in _named(inputs).items()}
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        with open(os.path.join(folder, "names.json"), "w", encoding="utf-8") as file:
            json.dump(list(arrays), file)
        np.savez(os.path.join(folder, "inputs.npz"), **{str(i): array for i, array in enumerate(arrays.values())})
        run_child(["-c", _START, _RUNNER, model, folder, str(repeats), str(warm_up)], folder, timeout,
                  "running {}".format(model))
        names, milliseconds, outputs = _results(folder)
    return Run({name: _shaped(name, array, shapes or {}) for name, array in zip(names, outputs)}, milliseconds)


def _results(folder: str) -> Tuple[List[str], Tuple[float, ...], List[np.ndarray]]:
    with open(os.path.join(folder, "result.json"), encoding="utf-8") as file:
        result = json.load(file)
    with np.load(os.path.join(folder, "outputs.npz"), allow_pickle=False) as arrays:
        outputs = [arrays[str(index)] for index in range(len(result["names"]))]
    return result["names"], tuple(result["milliseconds"]), outputs


def _named(inputs: Inputs) -> Dict[str, np.ndarray]:
    return dict(inputs) if isinstance(inputs, dict) else {"": np.asarray(inputs)}


def _plain(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype not in _TYPES:
        raise TypeError("input {!r} must hold float32, int32, int64 or uint8, got {}".format(name, array.dtype))
    if not array.size:
        raise ValueError("input {!r} is empty, shape {}".format(name, array.shape))
    return array


def _shaped(name: str, array: np.ndarray, shapes: Shapes) -> np.ndarray:
    shape = shapes.get(name)
    if shape is None or tuple(shape) == array.shape:
        return array
    if [size for size in shape if size != 1] != [size for size in array.shape if size != 1]:
        raise ValueError("output {!r} has shape {}, which is not {} up to axes of size 1".format(
            name, array.shape, tuple(shape)))
    return array.reshape(shape)
