"""The parameter file: read, check, append, write, and the same as JSON.

A file is a ``Pipeline``: the algorithms that a model went through.  Bytes depend on the content alone, so equal
parameters are equal files: fields in the order of their numbers, and a uuid derived from the first algorithm saved.
"""

from __future__ import annotations

import os
import re
import uuid
from typing import Tuple, Union

from google.protobuf import json_format
from google.protobuf.message import DecodeError, EncodeError, Message

from slimtrain.core import ParameterFileError, write_whole
from slimtrain.proto.schema import CompressionAlgo, Pipeline
from slimtrain.proto.validation import check_algorithm, check_pipeline

PathLike = Union[str, "os.PathLike[str]"]

VERSION = "0.0.0"
# A thousand layers of a thousand channels are 5 MB; what is far larger is another kind of file.
LARGEST_FILE = 256 << 20
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "compress-params.slimtrain")
_PRINTABLE_VERSION = re.compile(r"[\w.+-]{1,64}", re.ASCII)


def read_params(path: PathLike) -> Message:
    """The ``Pipeline`` in a file: protobuf, or protobuf JSON when the name ends in ``.json``.

    Only the form is checked: files of other writers are read as they are.

    Raises:
        ParameterFileError: no such file, empty, truncated, too large, or another format.
    """
    name = os.fspath(path)
    data = _read(name)
    if _is_json(name):
        return params_from_json(_decode_utf8(data, name), source=name)
    return parse_params(data, source=name)


def parse_params(data: bytes, source: str = "parameters") -> Message:
    """The ``Pipeline`` in ``data``; ``source`` names it in errors.

    Raises:
        ParameterFileError: empty, truncated or another format.
    """
    if not data:
        raise ParameterFileError("{}: the parameter file is empty".format(source))
    pipeline = Pipeline()
    try:
        pipeline.ParseFromString(data)
        text = pipeline.version
    # The runtimes differ in what they raise; all of it means that these bytes are no Pipeline.
    except (DecodeError, UnicodeDecodeError, ValueError, RuntimeError) as error:
        raise ParameterFileError("{}: not a compression parameter file, or a truncated one ({} bytes): {}".format(
            source, len(data), error)) from error
    if not pipeline.IsInitialized() or not _PRINTABLE_VERSION.fullmatch(text):
        raise ParameterFileError("{}: not a compression parameter file: the {} bytes hold no version".format(
            source, len(data)))
    return pipeline


def write_params(path: PathLike, pipeline: Message) -> None:
    """Check ``pipeline`` and write it, whole or not at all; as JSON when the name ends in ``.json``.

    Raises:
        ParameterFileError: what the converter would crash on or silently get wrong, by layer name.
        OSError: the folder cannot be written.
    """
    check_pipeline(pipeline)
    _write(path, pipeline)


def save_algorithm(path: PathLike, algorithm: Message, append: bool) -> Message:
    """Write ``algorithm`` to ``path`` and return the ``Pipeline`` written.

    With ``append`` the file must exist: the algorithm replaces an earlier one of its kind (quantization, or pruning of
    the same type) in its place, or goes last; everything else stays, the uuid, other algorithms and unknown fields
    included.  Without it, a new file is made or an old one overwritten.

    Raises:
        ParameterFileError: nothing to append to, an unreadable file, or an algorithm that must not be written.
    """
    check_algorithm(algorithm)
    if append:
        pipeline = read_params(path)
    else:
        pipeline = Pipeline(version=VERSION)
    _put(pipeline, algorithm)
    if not pipeline.mnn_uuid:
        pipeline.mnn_uuid = str(uuid.uuid5(_UUID_NAMESPACE, serialize(algorithm).hex()))
    _write(path, pipeline)
    return pipeline


def params_to_json(pipeline: Message) -> str:
    """Protobuf JSON with the schema's own field names, as the converter reads it; unknown fields are not in it."""
    return json_format.MessageToJson(pipeline, preserving_proto_field_name=True, indent=2) + "\n"


def params_from_json(text: str, source: str = "JSON") -> Message:
    """The ``Pipeline`` of its JSON form.

    Raises:
        ParameterFileError: no JSON, unknown names, wrong types, a missing version.
    """
    pipeline = Pipeline()
    try:
        json_format.Parse(text, pipeline)
        complete = pipeline.IsInitialized()
    except (json_format.ParseError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise ParameterFileError("{}: not compression parameters in JSON: {}".format(source, error)) from error
    if not complete:
        raise ParameterFileError("{}: required fields are missing: {}".format(
            source, ", ".join(pipeline.FindInitializationErrors())))
    return pipeline


def _kind(algorithm: Message) -> Tuple[int, int]:
    is_prune = algorithm.type == CompressionAlgo.PRUNE
    return algorithm.type, algorithm.prune_params.type if is_prune else -1


def _put(pipeline: Message, algorithm: Message) -> None:
    same = [index for index, old in enumerate(pipeline.algo) if _kind(old) == _kind(algorithm)]
    for index in reversed(same[1:]):
        del pipeline.algo[index]
    (pipeline.algo[same[0]] if same else pipeline.algo.add()).CopyFrom(algorithm)


def serialize(message: Message) -> bytes:
    try:
        return bytes(message.SerializeToString(deterministic=True))
    except EncodeError as error:
        raise ParameterFileError("the parameters are incomplete: {}".format(error)) from error


def _write(path: PathLike, pipeline: Message) -> None:
    data = params_to_json(pipeline).encode() if _is_json(os.fspath(path)) else serialize(pipeline)
    write_whole(path, data)


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _read(name: str) -> bytes:
    try:
        size = os.path.getsize(name)
        if size > LARGEST_FILE:
            raise ParameterFileError("{}: {} bytes are too many for a parameter file".format(name, size))
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise ParameterFileError("cannot read the parameter file {}: {}".format(name, error.strerror)) from error


def _decode_utf8(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterFileError("{}: not JSON: {}".format(source, error)) from error
