"""Does the deployed model compute what it should?  Run it, compare with a reference, measure it."""

from __future__ import annotations

import os
from typing import Dict, NamedTuple, Optional, Tuple, Union

import numpy as np

from slimtrain.core import ConversionError, max_steps, sqnr_db
from slimtrain.proto.arrays import Arrays, Simulation
from slimtrain.proto.mnnfile import inspect_model
from slimtrain.proto.runtime import Inputs, execute, reshaped

PathLike = Union[str, "os.PathLike[str]"]


class OutputDeviation(NamedTuple):
    """One output: SQNR in dB, largest absolute error, the same in steps of its grid (None: on no grid)."""

    name: str
    sqnr_db: float
    max_error: float
    max_steps: Optional[float]


class Verification(NamedTuple):
    """A model against its reference: the worst of all outputs, and each of them.

    ``sqnr_db`` is ``inf`` if all are equal and ``-inf`` if one is not finite; ``bytes`` is the size of the
    model file, ``milliseconds`` the median of one inference by one thread.
    """

    sqnr_db: float
    max_error: float
    max_steps: Optional[float]
    bytes: int
    milliseconds: float
    outputs: Tuple[OutputDeviation, ...]


def verify(
    mnn_path: PathLike,
    reference: Union[PathLike, Simulation],
    inputs: Optional[Inputs] = None,
    scales: Optional[Dict[str, float]] = None,
    repeats: int = 20,
    timeout: float = 600.0,
) -> Verification:
    """Compare a .mnn model with a reference on the same inputs.

    Args:
        mnn_path: the model.
        reference: path of an .onnx model, which onnxruntime runs, or a recorded ``Simulation``.
        inputs: as for ``run_model``, for an .onnx reference; a simulation brings its own.
        scales: step of outputs by name; by default what the simulation says, then what the model says.
        repeats: timed inferences.
        timeout: seconds for all inferences together.

    Raises:
        ConversionError: a file or package is missing, the reference has other outputs, something cannot run.
        ValueError: inputs missing, or given twice; no repeats; a reference that is not finite.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}")
    if (inputs is None) != isinstance(reference, Simulation):
        raise ValueError("an ONNX reference needs inputs, a recorded simulation brings its own")
    expected = reference if isinstance(reference, Simulation) else _run_onnx(os.fspath(reference), inputs)
    run = execute(mnn_path, expected.inputs, repeats, warm_up=3, timeout=timeout)
    steps = {**expected.scales, **(scales or {})}
    if not set(expected.outputs) <= set(steps):
        steps = {**inspect_model(mnn_path, timeout).steps, **steps}
    outputs = tuple(
        _compare(name, wanted, _matching(name, expected.outputs, run.outputs), steps.get(name))
        for name, wanted in expected.outputs.items()
    )
    known = [output.max_steps for output in outputs if output.max_steps is not None]
    return Verification(
        sqnr_db=min(output.sqnr_db for output in outputs),
        max_error=max(output.max_error for output in outputs),
        max_steps=max(known) if known else None,
        bytes=os.path.getsize(os.fspath(mnn_path)),
        milliseconds=float(np.median(run.milliseconds)),
        outputs=outputs,
    )


def _run_onnx(path: str, inputs: Optional[Inputs]) -> Simulation:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError(
            "an ONNX reference needs onnxruntime: run python -m pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        feeds = inputs if isinstance(inputs, dict) else dict(zip(names, [np.asarray(inputs)]))
        outputs = session.run(None, feeds)
    # Its exceptions have no common class of their own.
    except Exception as error:
        raise ConversionError(f"onnxruntime cannot run {path}: {error}") from error
    return Simulation(feeds, {node.name: array for node, array in zip(session.get_outputs(), outputs)}, {})


def _matching(name: str, references: Arrays, outputs: Arrays) -> np.ndarray:
    """The output to compare with ``name``; where there is one on both sides their names do not matter."""
    if len(references) == len(outputs) == 1:
        return next(iter(outputs.values()))
    if name not in outputs:
        raise ConversionError(f"the reference has the output {name!r}, the model has {sorted(outputs)}")
    return outputs[name]


def _compare(name: str, wanted: np.ndarray, got: np.ndarray, scale: Optional[float]) -> OutputDeviation:
    try:
        got = reshaped(name, got, wanted.shape)
    except ValueError as error:
        raise ConversionError(f"model and reference do not belong together: {error}") from error
    if not np.isfinite(got).all():
        return OutputDeviation(name, float("-inf"), float("inf"), float("inf") if scale else None)
    worst = float(np.max(np.abs(wanted.astype(np.float64) - got.astype(np.float64))))
    return OutputDeviation(
        name, sqnr_db(wanted, got), worst, max_steps(wanted, got, scale) if scale else None
    )
