"""Drive MNN's converter and check what came out: a model is written only if it holds what was asked for."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Tuple, Union

from google.protobuf.message import Message

from slimtrain.core import (
    ConversionError,
    Coverage,
    CoverageError,
    LayerCoverage,
    ParameterFileError,
    replace_all,
)
from slimtrain.proto.coverage import Comparison, compare, misfits
from slimtrain.proto.mnnfile import CONVERTER_CODE, CONVERTER_MODULE, inspect_model
from slimtrain.proto.params import read_params, serialize
from slimtrain.proto.process import ChildCrash, require_mnn, run_child, tail
from slimtrain.proto.validation import check_pipeline

PathLike = Union[str, "os.PathLike[str]"]

_logger = logging.getLogger(__name__)
_FRAMEWORKS = {".onnx": "ONNX", ".pb": "TF", ".mnn": "MNN"}
_OUR_OPTIONS = ("-f", "--framework", "--modelFile", "--MNNModel", "--JsonFile", "--compressionParamsFile", "--fp16",
                "--weightQuantBits", "--weightQuantAsymmetric", "--weightQuantBlock", "--hqq", "--detectSparseSpeedUp")


@dataclass(frozen=True)
class ConvertOptions:
    """How layers without full int8 parameters are stored.

    Attributes:
        weight_bits: weight-only quantization of all of them, 2..8 bits; 0 for none.
        asymmetric: with ``weight_bits``: a minimum and a scale per channel. Moves the zeros of a pruned model.
        weight_block: with ``weight_bits``: input channels per scale, a multiple of 16; 0 for one scale per channel.
        hqq: with ``weight_bits`` and ``asymmetric``: choose the grid by half-quadratic optimization.
        fp16: store floats in half precision. MNN then ignores ``weight_bits``, so the two exclude each other.
        sparse: leave zeros out of the file where that makes it smaller. Without ``weight_bits`` it pays only for layers
            with more than 60 % of zeros (30 % in blocks of 4), and never for full int8 layers.
        extra: further options of ``mnnconvert``, word by word.

    Raises:
        ValueError: values out of range, options that MNN would silently ignore or override.
    """

    weight_bits: int = 0
    asymmetric: bool = False
    weight_block: int = 0
    hqq: bool = False
    fp16: bool = False
    sparse: bool = False
    extra: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_bits != 0 and self.weight_bits not in range(2, 9):
            raise ValueError("weight_bits must be 0 or 2..8, got {!r}".format(self.weight_bits))
        if not self.weight_bits and (self.asymmetric or self.weight_block or self.hqq):
            raise ValueError("asymmetric, weight_block and hqq say how to quantize weights: give weight_bits too")
        if self.weight_bits and self.fp16:
            raise ValueError("weight_bits and fp16 exclude each other: MNN stores half floats and drops weight_bits")
        if self.hqq and not self.asymmetric:
            raise ValueError("hqq is asymmetric only: give asymmetric=True too")
        if self.weight_block < 0 or self.weight_block % 16:
            raise ValueError("weight_block must be 0 or a multiple of 16, got {!r}".format(self.weight_block))
        if isinstance(self.extra, str):
            raise TypeError("extra must be a tuple of words, got the string {!r}".format(self.extra))
        taken = [word for word in self.extra if word.split("=")[0] in _OUR_OPTIONS]
        if taken:
            raise ValueError("extra repeats what has an argument of its own: {}".format(", ".join(taken)))

    def arguments(self) -> List[str]:
        """The options as words for ``mnnconvert``."""
        words = ["--fp16"] if self.fp16 else []
        if self.weight_bits:
            # "=0" is the only spelling that means symmetric on purpose; without the option asymmetric is the default.
            words += ["--weightQuantBits", str(self.weight_bits),
                      "--weightQuantAsymmetric={:d}".format(self.asymmetric)]
        if self.weight_block:
            words += ["--weightQuantBlock", str(self.weight_block)]
        words += ["--hqq"] if self.hqq else []
        words += ["--detectSparseSpeedUp"] if self.sparse else []
        return words + list(self.extra)


class Conversion(NamedTuple):
    """A written model.

    ``coverage``: the layers asked to be full int8.  ``weight_only``: those asked to be stored quantized.  ``unasked``:
    all other layers with weights, as they are.  ``bytes``: the size of the model, external weights included.
    """

    path: str
    coverage: Coverage
    bytes: int
    weight_only: Coverage
    unasked: Tuple[LayerCoverage, ...]


def convert(model_path: PathLike, out_path: PathLike, params_path: Optional[PathLike] = None,
            options: ConvertOptions = ConvertOptions(), allow_partial: bool = False,
            timeout: float = 600.0) -> Conversion:
    """Convert an .onnx, .pb or .mnn model to .mnn, compressed as the parameters say.

    The converter runs in a child process with a folder of its own; ``out_path`` is written last, whole or not at all.

    Args:
        model_path: its suffix tells the format.
        out_path: the .mnn to write.
        params_path: a parameter file, protobuf or JSON.
        options: storage of everything else.
        allow_partial: write the model even if layers are less compressed than the parameters ask for.
        timeout: seconds for each run of the converter.

    Raises:
        ParameterFileError: the parameter file cannot be read.
        CoverageError: layers are less compressed than asked for; they are named with the reason.
        ConversionError: MNN is missing, unknown suffix, no such model, the converter failed or crashed.
        OSError: ``out_path`` cannot be written.
    """
    source = _source(model_path)
    pipeline = _params(params_path) if params_path is not None else None
    require_mnn(CONVERTER_MODULE)
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        target = _run(source, folder, pipeline, options, timeout)
        model = inspect_model(target, timeout)
        wrong = misfits(pipeline, model) if pipeline is not None else ()
        if wrong:
            raise ConversionError("{}: the converted model would crash when it runs:\n  {}".format(
                source, "\n  ".join(wrong)))
        comparison = compare(pipeline, model)
        if comparison.missing and not allow_partial:
            raise CoverageError(shortfall(comparison))
        size = _write(target, os.path.abspath(os.fspath(out_path)))
    for layer in comparison.missing:
        _logger.warning("%s stays %s: %s", layer.name, layer.state.value, layer.reason)
    return Conversion(os.fspath(out_path), comparison.full, size, comparison.weight_only, comparison.unasked)


def shortfall(comparison: Comparison) -> str:
    """One line per layer that is less compressed than asked for, with the share of weights that is as asked."""
    wanted = comparison.full.layers + comparison.weight_only.layers
    total = sum(layer.parameters for layer in wanted)
    missing = sum(layer.parameters for layer in comparison.missing)
    head = "{} of {} layers are less compressed than the parameters ask for ({:.1f} % of the weights are as asked)"
    lines = [head.format(len(comparison.missing), len(wanted), 100.0 * (total - missing) / total if total else 0.0)]
    lines += ["  {} is {}: {}".format(layer.name, layer.state.value, layer.reason) for layer in comparison.missing]
    return "\n".join(lines)


def _source(model_path: PathLike) -> str:
    source = os.path.abspath(os.fspath(model_path))
    suffix = os.path.splitext(source)[1].lower()
    if suffix not in _FRAMEWORKS:
        raise ConversionError("{}: the suffix must be one of {}".format(source, ", ".join(sorted(_FRAMEWORKS))))
    if not os.path.isfile(source):
        raise ConversionError("no such model: {}".format(source))
    return source


def _run(source: str, folder: str, pipeline: Optional[Message], options: ConvertOptions, timeout: float) -> str:
    target = os.path.join(folder, "model.mnn")
    words = ["-f", _FRAMEWORKS[os.path.splitext(source)[1].lower()], "--modelFile", source, "--MNNModel", target,
             "--bizCode", "slimtrain"] + options.arguments()
    if pipeline is not None:
        # A copy of what was read: the converter takes a file that it cannot parse for none at all, and JSON by suffix.
        params = os.path.join(folder, "compress_params.bin")
        with open(params, "wb") as file:
            file.write(serialize(pipeline))
        words += ["--compressionParamsFile", params]
    try:
        output = run_child(["-c", CONVERTER_CODE, "mnnconvert"] + words, folder, timeout, "converting " + source)
    except ChildCrash as error:
        if pipeline is None:
            raise
        raise ConversionError("{}\n{}".format(error, _explain_crash(source, pipeline, timeout))) from error
    # The converter ends with status 0 whatever happened.
    if not os.path.isfile(target) or not os.path.getsize(target):
        raise ConversionError("converting {}: no model was written; the converter said:\n{}".format(
            source, tail(output)))
    _logger.debug("converting %s: %s", source, output)
    return target


def _params(path: PathLike) -> Message:
    pipeline = read_params(path)
    try:
        check_pipeline(pipeline)
    except ParameterFileError as error:
        # Other writers' files are converted as they are; our own writer would have refused.
        _logger.warning("%s: the model may crash or compute wrongly: %s", os.fspath(path), error)
    return pipeline


def _explain_crash(source: str, pipeline: Message, timeout: float) -> str:
    """What in the parameters does not fit the model, found by converting it without them."""
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        try:
            model = inspect_model(_run(source, folder, None, ConvertOptions(), timeout), timeout)
        except ConversionError:
            return "It fails without the parameters too: the model is the cause."
    wrong = list(misfits(pipeline, model))
    try:
        check_pipeline(pipeline)
    except ParameterFileError as error:
        wrong.append(str(error))
    return "\n".join(wrong) or "Without the parameters it converts: one of their entries is the cause."


def _write(target: str, out_path: str) -> int:
    """Move the model, and the weights beside it where they are external, to ``out_path``; the number of bytes."""
    files = []
    for name in sorted(os.listdir(os.path.dirname(target))):
        if name.startswith("model.mnn"):
            with open(os.path.join(os.path.dirname(target), name), "rb") as file:
                files.append((out_path + name[len("model.mnn"):], file.read()))
    replace_all(files)
    return sum(len(data) for _, data in files)
