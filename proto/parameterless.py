"""The parameter file of algorithms that leave the converter nothing to know.

Low-rank factors and merged over-parameterized layers are plain convolutions in a plain float model, and the schema
has no message for them.  Their file is a ``Pipeline`` without an algorithm: it converts like no file at all, and the
next algorithm, pruning or quantization, appends to it.
"""

from __future__ import annotations

from slimtrain.proto.params import FORMAT_VERSION, PathLike, read_params, write_params
from slimtrain.proto.schema import Pipeline


def save_parameterless(path: PathLike, append: bool) -> None:
    """Make an empty parameter file, or with ``append`` check that the one at ``path`` is good and leave it as it is.

    Raises:
        ParameterFileError: nothing to append to, or not a parameter file.
        OSError: the file cannot be written.
    """
    if append:
        read_params(path)
    else:
        write_params(path, Pipeline(version=FORMAT_VERSION))
