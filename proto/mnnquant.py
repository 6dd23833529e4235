"""Reading the configuration of MNN's own offline quantization tool, so that it works here unchanged."""
from __future__ import annotations

import json
import logging
import os
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

from slimtrain.core import ActivationMethod, ConversionError, WeightMethod, method_of
from slimtrain.proto.calibration_data import DEFAULT_BATCH, ImageFormat, InputType, Preprocessing

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class MnnquantConfig(NamedTuple):
    """What a configuration says; defaults are those of MNN's tool."""

    path: str
    preprocessing: Preprocessing
    batch_size: int
    samples: int                   #: how many to use; 0 for all
    method: ActivationMethod
    weight_method: WeightMethod
    bits: int
    largest_level: int
    largest_weight_level: int
    skip: Tuple[str, ...]
    debug: bool


def read_mnnquant(path: PathLike) -> MnnquantConfig:
    """Read a JSON configuration of ``mnnquant``.

    A relative ``path`` of the data is looked up from the present folder, then from that of the configuration. Keys
    that MNN's tool does not know either are named in a warning.

    Raises:
        ConversionError: the file cannot be read, ``path`` is missing, or a value is not what its key takes.
    """
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError("cannot read the configuration %s: %s" % (name, error)) from error
    if not isinstance(values, dict):
        raise ConversionError("%s must hold a JSON object, got %s" % (name, type(values).__name__))
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        logger.warning("%s: ignored unknown keys %s", name, ", ".join(unknown))
    read = {key: _value(name, key, values[key]) for key in values if key in _KEYS}
    if not read.get("path"):
        raise ConversionError("%s: the key 'path' says where the calibration data is, it is missing" % name)
    bits = read.get("quant_bits", 8)
    crop = read.get("center_crop_h", 1.0), read.get("center_crop_w", 1.0)
    try:
        preprocessing = Preprocessing(read.get("input_type", InputType.IMAGE), read.get("format", ImageFormat.BGR),
                                      read.get("mean", (0.0,)), read.get("normal", (1.0,)), read.get("width"),
                                      read.get("height"), crop)
    except ValueError as error:
        raise ConversionError("%s: %s" % (name, error)) from error
    return MnnquantConfig(
        _found(read["path"], os.path.dirname(os.path.abspath(name))), preprocessing,
        read.get("batch_size", DEFAULT_BATCH), read.get("used_sample_num", read.get("used_image_num", 0)),
        read.get("feature_quantize_method", ActivationMethod.KL),
        read.get("weight_quantize_method", WeightMethod.MAX_ABS), bits, read.get("feature_clamp_value", 127),
        min(read.get("weight_clamp_value", 127), 2 ** (bits - 1) - 1), read.get("skip_quant_op_names", ()),
        read.get("debug", False))


def _found(path: str, folder: str) -> str:
    beside = os.path.join(folder, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def _value(name: str, key: str, value: Any) -> Any:
    try:
        return _KEYS[key](value)
    except (TypeError, ValueError) as error:
        raise ConversionError("%s: %r is %r: %s" % (name, key, value, error)) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


def _whole(lowest: int, highest: Optional[int] = None) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise TypeError("expected a whole number")
        if value < lowest or (highest is not None and value > highest):
            raise ValueError("expected %d%s" % (lowest, " or more" if highest is None else "..%d" % highest))
        return int(value)
    return convert


def _numbers(value: Any) -> Tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(float(number) for number in values)


def _names(value: Any) -> Tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("expected a list of names")
    return tuple(_text(name) for name in value)


_KEYS: Dict[str, Callable[[Any], Any]] = {
    "format": lambda value: ImageFormat(_text(value).upper()),
    "mean": _numbers,
    "normal": _numbers,
    "width": _whole(1),
    "height": _whole(1),
    "center_crop_h": float,
    "center_crop_w": float,
    "path": _text,
    "used_image_num": _whole(0),
    "used_sample_num": _whole(0),
    "feature_quantize_method": lambda value: method_of(ActivationMethod, _text(value)),
    "weight_quantize_method": lambda value: method_of(WeightMethod, _text(value)),
    "feature_clamp_value": _whole(1, 127),
    "weight_clamp_value": _whole(1, 127),
    "batch_size": _whole(1),
    "quant_bits": _whole(2, 8),
    "skip_quant_op_names": _names,
    "input_type": lambda value: InputType(_text(value).lower()),
    "debug": _flag,
}
