"""Compression state on disk: in a Lightning checkpoint, or beside one that holds weights only."""
from __future__ import annotations

import io
import os
from typing import Any, Dict, Mapping, Union

import torch

from slimtrain.core import SlimtrainError, write_whole

PathLike = Union[str, "os.PathLike[str]"]

#: appended to the name of a checkpoint for the file that holds what the checkpoint cannot
SIDECAR_SUFFIX = ".slimtrain"


def write_sidecar(checkpoint: PathLike, states: Mapping[str, Any]) -> None:
    """Write callback states beside a checkpoint; plain tensors and numbers, loadable with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save({"callbacks": dict(states)}, buffer)
    write_whole(os.fspath(checkpoint) + SIDECAR_SUFFIX, buffer.getvalue())


def drop_orphans(folder: PathLike) -> None:
    """Remove sidecars whose checkpoint is gone (the Trainer keeps only the best few)."""
    for name in os.listdir(folder or "."):
        path = os.path.join(os.fspath(folder), name)
        if name.endswith(SIDECAR_SUFFIX) and not os.path.exists(path[:-len(SIDECAR_SUFFIX)]):
            os.remove(path)


def read_state(checkpoint: PathLike, class_name: str) -> Dict[str, Any]:
    """The state that a callback of the given class left in a checkpoint or its sidecar.

    Raises:
        SlimtrainError: neither file holds one, or it cannot be read.
    """
    path = os.fspath(checkpoint)
    for source in (path + SIDECAR_SUFFIX, path):
        if not os.path.exists(source):
            continue
        states = _load(source).get("callbacks", {})
        mine = [state for key, state in states.items() if key == class_name or key.startswith(class_name + "{")]
        if len(mine) == 1 and mine[0]:
            return dict(mine[0])
    raise SlimtrainError("neither %s nor %s%s holds the state of one %s: was the model trained with it?" % (
        path, os.path.basename(path), SIDECAR_SUFFIX, class_name))


def _load(path: str) -> Dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError for a damaged file
        raise SlimtrainError("%s cannot be read as a checkpoint: %s" % (path, str(error).splitlines()[0])) from error
    return content if isinstance(content, dict) else {}
