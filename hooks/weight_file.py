"""Weights of a graph in a file of plain arrays, and read again from there or from a checkpoint."""
from __future__ import annotations

import io
import os
import zipfile
from typing import Dict, List, Mapping, Optional, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import SlimtrainError, write_whole
from slimtrain.hooks.compositions import merged_weights

PathLike = Union[str, "os.PathLike[str]"]


def get_op_weight_values(sess: tf.Session, npy_file_name: PathLike) -> None:
    """Save the values of all variables, for :func:`low_rank_decompose` and for ``init_checkpoint`` of the hooks.

    Weights that were decomposed or expanded are saved as the ones they equal, under their original names. The file is
    numpy's archive of plain arrays (``numpy.load`` reads it), whatever its suffix is.

    Args:
        sess: holds the trained variables. Close it before the graph is edited.
        npy_file_name: of the file.

    Raises:
        TypeError: ``sess`` is no session.
        FailedPreconditionError: of TensorFlow; a variable has no value yet.
        OSError: the file cannot be written.
    """
    if not hasattr(sess, "graph") or not hasattr(sess, "run"):
        raise TypeError("sess must be a tf.Session, got {}".format(type(sess).__name__))
    variables = {variable.op.name: variable for variable in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                 if variable.dtype.base_dtype.as_numpy_dtype in _PLAIN}
    values = dict(sess.run(variables)) if variables else {}
    values.update(merged_weights(sess))
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    write_whole(npy_file_name, buffer.getvalue())


#: numpy stores arrays of these as they are; anything else (strings, bfloat16) it would pickle
_PLAIN = frozenset(np.dtype(name).type for name in (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128"))


def is_weight_file(path: PathLike) -> bool:
    """Whether ``path`` is a file as :func:`get_op_weight_values` writes it, rather than a checkpoint."""
    return os.path.isfile(path) and zipfile.is_zipfile(path)


def weight_shapes(path: PathLike) -> Dict[str, List[int]]:
    """Shapes by variable name.

    Raises:
        SlimtrainError: neither a weight file nor a checkpoint.
    """
    if is_weight_file(path):
        return {name: list(value.shape) for name, value in read_weights(path).items()}
    return {name: list(shape) for name, shape in _checkpoint(path).get_variable_to_shape_map().items()}


def read_weights(path: PathLike, names: Optional[List[str]] = None) -> Mapping[str, np.ndarray]:
    """Values by variable name.

    Args:
        path: a file of :func:`get_op_weight_values`, a checkpoint, or a folder with some.
        names: the variables wanted; those that are not there are left out. None for all.

    Raises:
        SlimtrainError: neither a weight file nor a checkpoint.
    """
    if is_weight_file(path):
        try:
            with np.load(os.fspath(path), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files if names is None or name in names}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, OSError) as error:
            raise SlimtrainError("weight file {!r} is damaged: {}".format(os.fspath(path), error)) from error
    reader = _checkpoint(path)
    known = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in (known if names is None else names) if name in known}


def _checkpoint(path: PathLike) -> tf.train.NewCheckpointReader:
    try:
        return tf.train.load_checkpoint(os.fspath(path))
    except (ValueError, tf.errors.OpError, RuntimeError) as error:
        raise SlimtrainError("{!r} is neither a file of get_op_weight_values (of this library: no pickles are read) "
                             "nor a checkpoint: {}".format(os.fspath(path), error)) from error
