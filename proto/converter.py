"""Drive MNN's converter and check what came out: a model is written only if it holds what was asked for."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from dataclasses import replace
from typing import NamedTuple, Optional, Tuple, Union

from slimtrain.core import (
    ConversionError,
    Coverage,
    CoverageError,
    LayerCoverage,
    ParameterFileError,
    replace_all,
)
from slimtrain.proto.coverage import Comparison, compare, misfits
from slimtrain.proto.half_floats import round_halves
from slimtrain.proto.mnnfile import CONVERTER_CODE, CONVERTER_MODULE, inspect_model
from slimtrain.proto.options import ConvertOptions
from slimtrain.proto.params import read_params, serialize
from slimtrain.proto.process import ChildCrashError, quote, require_mnn, run_child
from slimtrain.proto.schema import CompressionAlgo, Message, Pipeline
from slimtrain.proto.validation import check_pipeline

PathLike = Union[str, "os.PathLike[str]"]

_logger = logging.getLogger(__name__)
_FRAMEWORKS = {".onnx": "ONNX", ".pb": "TF", ".mnn": "MNN"}
_TARGET = "model.mnn"


class Conversion(NamedTuple):
    """A written model.

    ``coverage`` holds the layers asked to be full int8, ``weight_only`` those asked to be stored quantized,
    ``unasked`` all others with weights, as they are; ``bytes`` is the size of the model, external weights
    included.
    """

    path: str
    coverage: Coverage
    bytes: int
    weight_only: Coverage
    unasked: Tuple[LayerCoverage, ...]


def convert(
    model_path: PathLike,
    out_path: PathLike,
    params_path: Optional[PathLike] = None,
    options: Optional[ConvertOptions] = None,
    allow_partial: bool = False,
    timeout: float = 600.0,
) -> Conversion:
    """Convert an .onnx, .pb or .mnn model to .mnn, compressed as the parameters say.

    The converter runs in a child process with a folder of its own; ``out_path`` is written last, whole or not
    at all, and only if every layer is compressed as asked for.

    Args:
        model_path: its suffix tells the format.
        out_path: the .mnn file to write.
        params_path: a parameter file, protobuf or JSON.
        options: storage of everything else; None for plain floats.
        allow_partial: write the model, with a warning per layer, even if layers are compressed less than
            asked for.
        timeout: seconds for each run of the converter.

    Raises:
        ParameterFileError: the parameter file cannot be read.
        CoverageError: layers are compressed less than asked for; each is named with the reason.
        ConversionError: MNN is missing, unknown suffix, no such model, the converter failed or crashed, the
            model would crash.
        OSError: ``out_path`` cannot be written.
    """
    source = _source(model_path)
    pipeline = _params(params_path) if params_path is not None else None
    require_mnn(CONVERTER_MODULE)
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        _run(source, folder, pipeline, options or ConvertOptions(), timeout)
        if options is not None and options.fp16:
            _round_halves(source, folder, pipeline, options, timeout)
        model = inspect_model(os.path.join(folder, _TARGET), timeout)
        wrong = misfits(pipeline, model) if pipeline is not None else ()
        if wrong:
            raise ConversionError("\n  ".join([f"{source}: the converted model would crash:", *wrong]))
        comparison = compare(pipeline, model)
        if comparison.missing and not allow_partial:
            raise CoverageError(f"{source}: {_shortfall(comparison)}")
        size = _publish(folder, os.path.abspath(os.fspath(out_path)))
    for operation in (*model.wrong, *_misread(source)):
        _logger.warning("%s: MNN computes it wrongly: %s", source, operation)
    for layer in comparison.missing:
        _logger.warning("%s stays %s: %s", layer.name, layer.state.value, layer.reason)
    return Conversion(os.fspath(out_path), comparison.full, size, comparison.weight_only, comparison.unasked)


def _source(model_path: PathLike) -> str:
    source = os.path.abspath(os.fspath(model_path))
    if os.path.splitext(source)[1].lower() not in _FRAMEWORKS:
        raise ConversionError(f"{source}: the suffix must be one of {', '.join(_FRAMEWORKS)}")
    if not os.path.isfile(source):
        raise ConversionError(f"no such model: {source}")
    return source


def _params(path: PathLike) -> Message:
    pipeline = read_params(path)
    try:
        check_pipeline(pipeline)
    except ParameterFileError as error:
        # Our own writer refuses such a file; those of others are converted as they are.
        _logger.warning("%s: the model may crash or compute wrongly: %s", os.fspath(path), error)
    return pipeline


def _run(
    source: str, folder: str, pipeline: Optional[Message], options: ConvertOptions, timeout: float
) -> None:
    """Convert ``source`` to ``_TARGET`` in ``folder``."""
    target = os.path.join(folder, _TARGET)
    words = ["mnnconvert", "-f", _FRAMEWORKS[os.path.splitext(source)[1].lower()], "--modelFile", source]
    words += ["--MNNModel", target, "--bizCode", "slimtrain", *options.arguments()]
    if pipeline is not None:
        # What we read, not the file: one that the converter cannot parse would count as none without a word.
        params = os.path.join(folder, "compress_params.bin")
        with open(params, "wb") as file:
            file.write(serialize(pipeline))
        words += ["--compressionParamsFile", params]
    try:
        output = run_child(["-c", CONVERTER_CODE, *words], folder, timeout, f"converting {source}")
    except ChildCrashError as error:
        if pipeline is None:
            raise
        raise ConversionError(f"{_explain_crash(source, pipeline, timeout)}\n{error}") from error
    _logger.debug("converting %s: %s", source, output)
    # The converter ends with status 0 whatever happened.
    if not os.path.isfile(target) or not os.path.getsize(target):
        raise ConversionError(f"converting {source}: no model was written{quote(output)}")


def _misread(source: str) -> Tuple[str, ...]:
    """Operations of an ONNX model that the converter reads otherwise than they are meant; none without onnx."""
    if not source.lower().endswith(".onnx") or importlib.util.find_spec("onnx") is None:
        return ()
    from slimtrain.proto.onnx_misread import misread_operations  # needs onnx

    return misread_operations(source)


def _round_halves(
    source: str, folder: str, pipeline: Optional[Message], options: ConvertOptions, timeout: float
) -> None:
    """Round the half floats of ``_TARGET`` in ``folder`` to the nearest, which MNN does not."""
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as float_folder:
        plain = replace(options, fp16=False, sparse=False)
        _run(source, float_folder, _without_quantization(pipeline), plain, timeout)
        rounded = round_halves(os.path.join(folder, _TARGET), os.path.join(float_folder, _TARGET))
    for name in rounded.saturated:
        _logger.warning("%s: numbers of %s beyond the largest half float become that", source, name)
    for name in rounded.cut:
        _logger.warning("%s: the half floats of %s stay as MNN cuts them, not rounded to the nearest", source, name)


def _without_quantization(pipeline: Optional[Message]) -> Optional[Message]:
    """What leaves the weights floats, but changes their number as before: pruned channels."""
    if pipeline is None:
        return None
    rest = Pipeline()
    rest.CopyFrom(pipeline)
    del rest.algo[:]
    rest.algo.extend(item for item in pipeline.algo if item.type != CompressionAlgo.QUANTIZE)
    return rest if rest.algo else None


def _explain_crash(source: str, pipeline: Message, timeout: float) -> str:
    """What in the parameters does not fit the model, found by converting it without them."""
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        try:
            _run(source, folder, None, ConvertOptions(), timeout)
            model = inspect_model(os.path.join(folder, _TARGET), timeout)
        except ConversionError:
            return "It fails without the parameters too: the model is the cause."
    reasons = list(misfits(pipeline, model))
    try:
        check_pipeline(pipeline)
    except ParameterFileError as error:
        reasons.append(str(error))
    return "\n".join(reasons) or "It converts without the parameters: one of their entries is the cause."


def _shortfall(comparison: Comparison) -> str:
    """The share of weights that is as asked, then one line per layer that is compressed less."""
    wanted = comparison.full.layers + comparison.weight_only.layers
    total = sum(layer.parameters for layer in wanted)
    share = 1.0 - sum(layer.parameters for layer in comparison.missing) / max(total, 1)
    lines = [
        f"{len(comparison.missing)} of {len(wanted)} layers are compressed less than the parameters ask for "
        f"({share:.1%} of the weights are as asked)"
    ]
    lines += [f"{layer.name} is {layer.state.value}: {layer.reason}" for layer in comparison.missing]
    return "\n  ".join(lines)


def _publish(folder: str, out_path: str) -> int:
    """Write the model in ``folder``, and its weights if they are in a file of their own; number of bytes."""
    files = []
    for name in sorted(os.listdir(folder)):
        if name.startswith(_TARGET):
            with open(os.path.join(folder, name), "rb") as file:
                files.append((out_path + name[len(_TARGET) :], file.read()))
    replace_all(files)
    return sum(len(data) for _, data in files)
