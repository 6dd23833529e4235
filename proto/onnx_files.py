"""Writing a rewritten ONNX model together with its parameter file."""
from __future__ import annotations

import logging
import os
import shutil
import tempfile
from typing import Sequence, Union

import onnx

from slimtrain.core import replace_all
from slimtrain.proto.algorithms import quantize_algorithm
from slimtrain.proto.deployed import DeployedLayer
from slimtrain.proto.layers import LayerParams, WeightOnlyParams
from slimtrain.proto.onnx_check import prepare
from slimtrain.proto.onnx_rewrite import Rewritten
from slimtrain.proto.params import save_algorithm

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


def write_files(model: onnx.ModelProto, layers: Sequence[DeployedLayer], onnx_path: PathLike, params_path: PathLike,
                append: bool) -> None:
    """Write a rewritten model and its parameters, both or none.

    Raises:
        ConversionError, ParameterFileError: nothing is written.
    """
    rewritten = prepare(model, layers)
    write_rewritten(rewritten, onnx_path, params_path, append)


def write_rewritten(rewritten: Rewritten, onnx_path: PathLike, params_path: PathLike, append: bool) -> None:
    """Write an already rewritten model and its parameters, both or none.

    Raises:
        ParameterFileError: nothing is written.
    """
    replace_all([(onnx_path, rewritten.model.SerializeToString(deterministic=True)),
                 (params_path, params_bytes(rewritten.params, params_path, append))])
    for change in rewritten.changes:
        logger.info("%s: %s", os.fspath(onnx_path), change)


def params_bytes(params: Sequence[Union[LayerParams, WeightOnlyParams]], path: PathLike, append: bool) -> bytes:
    """The bytes that ``path`` shall hold, so that they can be written together with another file."""
    with tempfile.TemporaryDirectory(prefix="slimtrain-") as folder:
        draft = os.path.join(folder, os.path.basename(os.fspath(path)))
        if append:
            shutil.copyfile(path, draft)
        save_algorithm(draft, quantize_algorithm(params), append)
        with open(draft, "rb") as file:
            return file.read()
