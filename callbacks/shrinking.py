"""Taking pruned channels out of a model: the same outputs from smaller dense layers."""
from __future__ import annotations

import copy
import os
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.model_view import evaluation, float_view, unnoticed
from slimtrain.callbacks.operations import tensors_in
from slimtrain.core import ChannelPlan, LayerPlan, sqnr_db, write_whole

PathLike = Union[str, "os.PathLike[str]"]

# two float32 programs for one function; a channel too many or too few is below 40 dB
_EQUAL_DB = 80.0


def shrink(model: nn.Module, plan: ChannelPlan, in_place: bool = False,
           example: Optional[Tuple[Tuple[Any, ...], Mapping[str, Any]]] = None) -> nn.Module:
    """Remove the channels that a plan does not keep.

    Args:
        model: a model with the layers of the plan, in their full size.
        plan: what stays.
        in_place: change the model itself (its modules and parameters stay the objects they are, an optimizer must be
            made anew) instead of a copy without hooks.
        example: arguments and keyword arguments of a forward, to check that nothing but rounding changes.

    Returns:
        the smaller model.

    Raises:
        ValueError: the plan is that of another model.
        RuntimeError: the smaller model computes something else: its removed channels were not zero, or its code
            depends on a number of channels.
    """
    _check_fits(model, plan)
    smaller = _copy(model)
    _apply(smaller, plan)
    if example is not None:
        _check_same(model, smaller, example)
    if in_place:
        _apply(model, plan)
        return model
    return smaller


def save_channel_plan(path: PathLike, plan: ChannelPlan) -> None:
    """Write a plan as JSON, whole or not at all."""
    write_whole(path, plan.to_json().encode("utf-8"))


def load_channel_plan(path: PathLike) -> ChannelPlan:
    """Read a plan.

    Raises:
        ValueError: the file is no plan.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        return ChannelPlan.from_json(file.read())


def load_shrunk(model: nn.Module, plan_file: PathLike, state_dict: Mapping[str, Any]) -> nn.Module:
    """Give a freshly made full-size model the shape of a plan and the weights of a shrunk checkpoint; in place.

    Raises:
        ValueError: the plan is that of another model.
        RuntimeError: the weights do not fit the plan.
    """
    shrink(model, load_channel_plan(plan_file), in_place=True)
    model.load_state_dict(dict(state_dict))
    return model


def _copy(model: nn.Module) -> nn.Module:
    view: Any = float_view(model)
    if getattr(view, "_trainer", None) is not None:  # a LightningModule must not take its Trainer along
        view._trainer = None
    smaller: nn.Module = copy.deepcopy(view)
    return smaller


def _apply(model: nn.Module, plan: ChannelPlan) -> None:
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in plan.layers.items():
            _shrink_layer(modules[name], layer)
        for name, kept in plan.vectors.items():
            _shrink_vector(modules[name], kept)


def _shrink_layer(layer: Any, plan: LayerPlan) -> None:
    _cut(layer.weight, plan.rows, 0)
    if layer.weight.shape[1] != len(plan.columns):
        _cut(layer.weight, plan.columns, 1)
    if layer.bias is not None:
        _cut(layer.bias, plan.rows, 0)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = len(plan.rows), len(plan.columns)
        return
    if layer.groups > 1 and plan.in_channels == 1:
        layer.groups = layer.groups * len(plan.rows) // plan.out_channels
    layer.out_channels, layer.in_channels = len(plan.rows), len(plan.columns) * layer.groups


def _shrink_vector(module: nn.Module, kept: Sequence[int]) -> None:
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.dim() == 1:
            _cut(value, kept, 0)
    for attribute in ("num_features", "num_parameters"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(kept))


def _cut(value: Any, kept: Sequence[int], dim: int) -> None:
    """Keep some slices of a tensor, which stays the object it is."""
    value.grad = None
    value.data = value.data.index_select(dim, torch.tensor(list(kept), device=value.device)).clone()


def _check_fits(model: nn.Module, plan: ChannelPlan) -> None:
    modules = dict(model.named_modules())
    for name in (*plan.layers, *plan.vectors):
        if name not in modules:
            raise ValueError("the channel plan is of another model: this one has no module %r" % name)
    for name, layer in plan.layers.items():
        shape = getattr(modules[name], "weight", torch.empty(0)).shape
        if tuple(shape[:2]) != (layer.out_channels, layer.in_channels):
            raise ValueError("the channel plan is of another model: it expects a weight of %d x %d in %r, found %s" %
                             (layer.out_channels, layer.in_channels, name, tuple(shape)))


def _check_same(model: nn.Module, smaller: nn.Module, example: Tuple[Tuple[Any, ...], Mapping[str, Any]]) -> None:
    view = float_view(model)
    try:
        wanted, found = (_outputs(candidate, example) for candidate in (view, smaller))
    except (RuntimeError, ValueError, IndexError) as error:
        raise RuntimeError("the model does not run without its pruned channels; its code seems to depend on a number "
                           "of channels: %s" % error) from error
    for before, after in zip(wanted, found):
        if before.shape != after.shape or (np.any(before) and sqnr_db(before, after) < _EQUAL_DB):
            raise RuntimeError("the model computes something else without its pruned channels: they are not zero, or "
                               "its code depends on their number. Nothing was changed")


def _outputs(model: nn.Module, example: Tuple[Tuple[Any, ...], Mapping[str, Any]]) -> List[np.ndarray]:
    args, kwargs = example
    with unnoticed(model), evaluation(model):
        outputs: List[Tensor] = tensors_in(model(*args, **dict(kwargs)))
    return [value.double().cpu().numpy() for value in outputs if value.is_floating_point()]
