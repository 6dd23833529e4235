"""The parameter file: read, check, append, write, and the same as JSON.

A file is a ``Pipeline``: the algorithms that a model went through.  Its bytes depend on the content alone, so
equal parameters are equal files: fields in the order of their numbers, a uuid derived from the first
algorithm.
"""

from __future__ import annotations

import os
import re
import uuid
from typing import Tuple, Union

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from slimtrain.core import ParameterFileError, write_whole
from slimtrain.proto.schema import CompressionAlgo, Message, Pipeline
from slimtrain.proto.validation import check_algorithm, check_guide, check_pipeline

PathLike = Union[str, "os.PathLike[str]"]

FORMAT_VERSION = "0.0.0"
# A thousand layers of a thousand channels are 5 MB; what is far larger is another kind of file.
LARGEST_FILE = 256 << 20
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "compress-params.slimtrain")
_VERSION_FORM = re.compile(r"[\w.+-]{1,64}", re.ASCII)


def read_params(path: PathLike) -> Message:
    """The ``Pipeline`` in a file: protobuf, or protobuf JSON when the name ends in ``.json``.

    Only the form is checked, so that files of other writers can be read and appended to.

    Raises:
        ParameterFileError: no such file, empty, truncated, too large, or another format.
    """
    name = os.fspath(path)
    data = _read(name)
    if not _is_json(name):
        return parse_params(data, source=name)
    try:
        return params_from_json(data.decode("utf-8"), source=name)
    except UnicodeDecodeError as error:
        raise ParameterFileError(f"{name}: not JSON: {error}") from error


def parse_params(data: bytes, source: str = "parameters") -> Message:
    """The ``Pipeline`` in ``data``; ``source`` names it in errors.

    Raises:
        ParameterFileError: empty, truncated, or another format.
    """
    if not data:
        raise ParameterFileError(f"{source}: the parameter file is empty")
    pipeline = Pipeline()
    try:
        # Stray groups end a parse early, on some runtimes with no more than a warning.
        if pipeline.ParseFromString(data) != len(data):
            raise ValueError("there is more than a message")
        _require_text(pipeline)
    except (DecodeError, RuntimeWarning, ValueError) as error:
        raise ParameterFileError(
            f"{source}: not a compression parameter file, or a truncated one ({len(data)} bytes): {error}"
        ) from error
    missing = pipeline.FindInitializationErrors()
    if missing or not _VERSION_FORM.fullmatch(pipeline.version):
        reason = f"required fields are missing: {', '.join(missing[:3])}" if missing else "no version in it"
        raise ParameterFileError(f"{source}: not a compression parameter file ({len(data)} bytes): {reason}")
    return pipeline


def write_params(path: PathLike, pipeline: Message) -> None:
    """Check ``pipeline`` and write it, whole or not at all; as JSON when the name ends in ``.json``.

    Raises:
        ParameterFileError: what the converter would crash on or silently get wrong, by layer name.
        OSError: the file cannot be written.
    """
    check_pipeline(pipeline)
    _write(path, pipeline)


def save_algorithm(path: PathLike, algorithm: Message, append: bool) -> Message:
    """Write ``algorithm`` to ``path`` and return the ``Pipeline`` written.

    With ``append`` the file must exist: the algorithm takes the place of an earlier one of its kind
    (quantization, or pruning of the same type), or goes last; everything else stays as it is, the uuid, other
    algorithms and unknown fields included.  Without it a new file is made, or an old one overwritten.

    Raises:
        ParameterFileError: nothing to append to, an unreadable file, or an algorithm that must not be
            written.
        OSError: the file cannot be written.
    """
    check_algorithm(algorithm)
    pipeline = read_params(path) if append else Pipeline(version=FORMAT_VERSION)
    _put(pipeline, algorithm)
    check_guide(pipeline)
    if not pipeline.mnn_uuid:
        pipeline.mnn_uuid = str(uuid.uuid5(_UUID_NAMESPACE, serialize(algorithm).hex()))
    _write(path, pipeline)
    return pipeline


def params_to_json(pipeline: Message) -> str:
    """Protobuf JSON with the schema's own field names, as the converter reads it; without unknown fields."""
    return str(json_format.MessageToJson(pipeline, preserving_proto_field_name=True, indent=2)) + "\n"


def params_from_json(text: str, source: str = "JSON") -> Message:
    """The ``Pipeline`` of its JSON form.

    Raises:
        ParameterFileError: no JSON, unknown names, wrong types, required fields missing.
    """
    pipeline = Pipeline()
    try:
        json_format.Parse(text, pipeline)
    # Beside its own errors the parser lets through those of odd values and of deep nesting.
    except (json_format.ParseError, RecursionError, TypeError, ValueError) as error:
        raise ParameterFileError(f"{source}: not compression parameters in JSON: {error}") from error
    missing = pipeline.FindInitializationErrors()
    if missing:
        raise ParameterFileError(f"{source}: required fields are missing: {', '.join(missing)}")
    return pipeline


def serialize(message: Message) -> bytes:
    """The bytes of a complete message, the same for equal messages."""
    return bytes(message.SerializeToString(deterministic=True))


def _kind(algorithm: Message) -> Tuple[int, int]:
    is_prune = algorithm.type == CompressionAlgo.PRUNE
    return algorithm.type, algorithm.prune_params.type if is_prune else -1


def _put(pipeline: Message, algorithm: Message) -> None:
    same = [index for index, old in enumerate(pipeline.algo) if _kind(old) == _kind(algorithm)]
    for index in reversed(same[1:]):
        del pipeline.algo[index]
    target = pipeline.algo[same[0]] if same else pipeline.algo.add()
    target.CopyFrom(algorithm)


def _require_text(message: Message) -> None:
    """Raise ``ValueError`` for a string that is not UTF-8; protobuf would hand it out as bytes."""
    for field, value in message.ListFields():
        if field.cpp_type not in (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_STRING):
            continue
        for item in value if hasattr(value, "extend") else [value]:
            if isinstance(item, bytes):
                raise ValueError(f"{field.full_name} is not UTF-8")
            if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                _require_text(item)


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _write(path: PathLike, pipeline: Message) -> None:
    write_whole(path, params_to_json(pipeline).encode() if _is_json(os.fspath(path)) else serialize(pipeline))


def _read(name: str) -> bytes:
    try:
        if os.path.getsize(name) > LARGEST_FILE:
            raise ParameterFileError(
                f"{name}: {os.path.getsize(name)} bytes are too many for a parameter file"
            )
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise ParameterFileError(f"cannot read the parameter file {name}: {error.strerror}") from error
