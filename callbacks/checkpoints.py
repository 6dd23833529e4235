"""Compression state on disk: in a Lightning checkpoint, or beside one that holds weights only."""
from __future__ import annotations

import io
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Union

import torch

from slimtrain.core import SlimtrainError, write_whole

PathLike = Union[str, "os.PathLike[str]"]

#: appended to the name of a checkpoint for the file that holds what the checkpoint cannot
SIDECAR_SUFFIX = ".slimtrain"


class Saved(NamedTuple):
    """What a checkpoint holds of a compressed model."""

    weights: Dict[str, Any]  #: the ``state_dict`` of the LightningModule
    state: Dict[str, Any]    #: the state that the callback gave


def write_sidecar(checkpoint: PathLike, states: Mapping[str, Any], global_step: int) -> None:
    """Write callback states beside a checkpoint; plain tensors and numbers, loadable with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save({"callbacks": dict(states), "global_step": global_step}, buffer)
    write_whole(os.fspath(checkpoint) + SIDECAR_SUFFIX, buffer.getvalue())


def remove_sidecar(checkpoint: PathLike) -> None:
    """Remove what lies beside a checkpoint that is gone (the Trainer keeps only the best few)."""
    path = os.fspath(checkpoint) + SIDECAR_SUFFIX
    if os.path.exists(path):
        os.remove(path)


def read_saved(checkpoint: PathLike, algorithm: str, module: Optional[str] = None) -> Saved:
    """What a callback left in a Lightning checkpoint, or beside one that holds weights only.

    Args:
        checkpoint: the file that the Trainer wrote.
        algorithm: class name of the object whose state is wanted, such as ``LSQQuantizer``.
        module: dotted path of the compressed submodule, where the checkpoint holds the states of several.

    Raises:
        SlimtrainError: there is no such state, or several; a file cannot be read, or belongs to another step.
    """
    path = os.fspath(checkpoint)
    content = _load(path)
    states = _states_of(content, algorithm, module) or _states_of(_load_sidecar(path, content), algorithm, module)
    if len(states) != 1:
        raise SlimtrainError("%s and its sidecar (%s) hold %s; expected the state of one %s" % (
            path, SIDECAR_SUFFIX, "those of the modules %s" % ", ".join(repr(state["module"]) for state in states)
            if states else "none", algorithm))
    return Saved(content.get("state_dict", {}), states[0])


def read_sidecar(checkpoint: PathLike, key: str) -> Optional[Dict[str, Any]]:
    """The state under a callback's ``state_key`` beside a checkpoint that holds weights only; None for any other.

    Raises:
        SlimtrainError: a file cannot be read, or they belong to different steps.
    """
    path = os.fspath(checkpoint)
    if not os.path.exists(path + SIDECAR_SUFFIX):
        return None
    content = _load(path)
    states = {} if "callbacks" in content else _load_sidecar(path, content).get("callbacks", {})
    return dict(states[key]) if key in states else None


def _load_sidecar(path: str, checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    if not os.path.exists(path + SIDECAR_SUFFIX):
        return {}
    sidecar = _load(path + SIDECAR_SUFFIX)
    if sidecar.get("global_step") != checkpoint.get("global_step"):
        raise SlimtrainError("%s%s was written at step %s and the checkpoint at step %s: they do not belong "
                             "together" % (path, SIDECAR_SUFFIX, sidecar.get("global_step"),
                                           checkpoint.get("global_step")))
    return sidecar


def _states_of(content: Mapping[str, Any], algorithm: str, module: Optional[str]) -> List[Dict[str, Any]]:
    states = [state for state in content.get("callbacks", {}).values() if isinstance(state, dict)]
    return [state for state in states if state.get("algorithm") == algorithm and module in (None, state["module"])]


def _load(path: str) -> Dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError for a damaged file
        reason = ("%s: %s" % (type(error).__name__, error)).splitlines()[0]
        raise SlimtrainError("%s cannot be read as a checkpoint: %s" % (path, reason)) from error
    if not isinstance(content, dict):
        raise SlimtrainError("%s is no Lightning checkpoint: it holds a %s" % (path, type(content).__name__))
    return content
