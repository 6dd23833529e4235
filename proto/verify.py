"""Does the deployed model compute what it should?  Run it, compare with a reference, and measure."""

from __future__ import annotations

import os
from typing import Dict, NamedTuple, Optional, Tuple, Union

import numpy as np

from slimtrain.core import ConversionError, max_steps, sqnr_db
from slimtrain.proto.arrays import Arrays, Simulation
from slimtrain.proto.mnnfile import inspect_model
from slimtrain.proto.runtime import Inputs, execute

PathLike = Union[str, "os.PathLike[str]"]


class OutputError(NamedTuple):
    """One output: SQNR in dB, the largest absolute error, and the same in steps of its grid (None: no grid known)."""

    name: str
    sqnr_db: float
    max_error: float
    max_steps: Optional[float]


class Verification(NamedTuple):
    """A model against its reference: the worst of all outputs, then each of them.

    ``sqnr_db`` is ``inf`` when all are equal, ``-inf`` when one is not finite; ``milliseconds`` is the median of one
    inference by one thread.
    """

    sqnr_db: float
    max_error: float
    max_steps: Optional[float]
    bytes: int
    milliseconds: float
    outputs: Tuple[OutputError, ...]


def verify(mnn_path: PathLike, reference: Union[PathLike, Simulation], inputs: Optional[Inputs] = None,
           scales: Optional[Dict[str, float]] = None, repeats: int = 20, timeout: float = 600.0) -> Verification:
    """Compare a .mnn model with a reference on the same inputs.

    Args:
        mnn_path: the model.
        reference: path of an .onnx model, run by onnxruntime, or a recorded ``Simulation``.
        inputs: as for ``run_model``; None takes those of the simulation.
        scales: float32 step of outputs by name. By default those of the simulation, then those in the model.
        repeats: timed inferences.
        timeout: seconds for all runs of the .mnn model together.

    Raises:
        ConversionError: missing files or packages, other outputs than the reference has, the runtime failed.
        ValueError: no inputs, no repeats.
    """
    if repeats < 1:
        raise ValueError("repeats must be at least 1, got {!r}".format(repeats))
    simulation = reference if isinstance(reference, Simulation) else _run_onnx(os.fspath(reference), inputs)
    run = execute(mnn_path, simulation.inputs if inputs is None else inputs,
                  repeats=repeats, warm_up=3, timeout=timeout)
    steps = dict(simulation.scales, **(scales or {}))
    if not set(simulation.outputs) <= set(steps):
        steps = dict(inspect_model(mnn_path, timeout).steps, **steps)
    outputs = tuple(_compare(name, wanted, _matching(name, simulation.outputs, run.outputs), steps.get(name))
                    for name, wanted in simulation.outputs.items())
    known = [output.max_steps for output in outputs if output.max_steps is not None]
    return Verification(sqnr_db=min(output.sqnr_db for output in outputs),
                        max_error=max(output.max_error for output in outputs),
                        max_steps=max(known) if known else None,
                        bytes=os.path.getsize(os.fspath(mnn_path)),
                        milliseconds=float(np.median(run.milliseconds)), outputs=outputs)


def _run_onnx(path: str, inputs: Optional[Inputs]) -> Simulation:
    if inputs is None:
        raise ValueError("an ONNX reference needs inputs")
    try:
        import onnxruntime
    except ImportError as error:
        raise ConversionError("an ONNX reference needs onnxruntime: run python -m pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        feeds = inputs if isinstance(inputs, dict) else dict(zip(names, [np.asarray(inputs)]))
        outputs = session.run(None, feeds)
    # Its exceptions share no base class and are not part of its interface.
    except Exception as error:
        raise ConversionError("onnxruntime cannot run {}: {}".format(path, error)) from error
    return Simulation(feeds, {node.name: array for node, array in zip(session.get_outputs(), outputs)}, {})


def _matching(name: str, references: Arrays, outputs: Arrays) -> np.ndarray:
    """The output to compare with ``name``; with a single one on both sides their names do not matter."""
    if len(references) == len(outputs) == 1:
        return next(iter(outputs.values()))
    if name not in outputs:
        raise ConversionError("the reference has the output {!r}, the model has {}".format(name, sorted(outputs)))
    return outputs[name]


def _compare(name: str, wanted: np.ndarray, got: np.ndarray, scale: Optional[float]) -> OutputError:
    if wanted.size != got.size:
        raise ConversionError("output {!r}: the reference has shape {}, the model computes {}".format(
            name, wanted.shape, got.shape))
    # Only axes of size 1 differ: a 1-D convolution comes back with one more.
    got = got.reshape(wanted.shape)
    if not np.isfinite(got).all():
        return OutputError(name, float("-inf"), float("inf"), float("inf") if scale else None)
    error = float(np.max(np.abs(wanted.astype(np.float64) - got.astype(np.float64))))
    return OutputError(name, sqnr_db(wanted, got), error, max_steps(wanted, got, scale) if scale else None)
