"""Looking at a model without touching it: its float structure, its quiet execution, its evaluation mode."""
from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.layer_scales import SCALES, LayerScales
from slimtrain.callbacks.operations import map_tensors
from slimtrain.callbacks.tracking import OwnHook

# where torch keeps the forward hooks of a module, and which of them want keyword arguments or are always called
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def float_view(model: nn.Module) -> nn.Module:
    """The user's float model: new module objects over the same parameters, without hooks and scales.

    What an exporter does to it (evaluation mode, hooks) does not reach the model that is being trained.
    """
    return _view(model, {})


def _view(module: nn.Module, seen: Dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    view: nn.Module = object.__new__(type(module))  # copy.copy asks the module, and a parametrized one refuses
    vars(view).update(vars(module))
    seen[id(module)] = view
    children = {name: child for name, child in module._modules.items() if name != SCALES}
    ours = {key for name in _HOOKS for key, hook in view.__dict__[name].items() if isinstance(hook, OwnHook)}
    for name in (*_HOOKS, *_HOOK_FLAGS):
        view.__dict__[name] = OrderedDict((key, value) for key, value in view.__dict__[name].items() if key not in ours)
    for name, value in vars(view).items():
        if isinstance(value, types.MethodType) and value.__self__ is module:  # DDP leaves a bound forward behind
            vars(view)[name] = types.MethodType(value.__func__, view)
    view._modules = {name: None if child is None else _view(child, seen) for name, child in children.items()}
    view._parameters = dict(module._parameters)
    view._buffers = dict(module._buffers)
    return view


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and without a trace: its buffers and the random state are as before afterwards."""
    own = [module for module in model.modules() if not isinstance(module, LayerScales)]
    buffers = [(module, name, buffer, buffer.clone()) for module in own for name, buffer in module._buffers.items()
               if buffer is not None]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module went through torch.compile, so that none of its Python runs any more."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def passed_inputs(model: nn.Module, part: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> List[Tuple[Any, Any]]:
    """Run a model in evaluation mode, for the arguments with which it calls a part of itself.

    Raises:
        ValueError: it never does.
    """
    seen: List[Tuple[Any, Any]] = []
    copied = lambda value: map_tensors(torch.clone, value)  # noqa: E731
    handle = part.register_forward_pre_hook(lambda _, given, named: seen.append((copied(given), copied(named))),
                                            with_kwargs=True)
    try:
        with unnoticed(model), evaluation(model):
            model(*args, **kwargs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError("the forward of %s does not call its %s, so nothing is known of that module's input" % (
            type(model).__name__, type(part).__name__))
    return seen


def run_double(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run a model in evaluation mode in float64; its parameters stay what they are."""
    tensors = {name: _double(value.detach())
               for name, value in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad(), evaluation(model):
        named: Dict[str, Any] = map_tensors(_double, dict(kwargs))
        return torch.func.functional_call(model, tensors, map_tensors(_double, args), named)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def submodule(model: nn.Module, path: Optional[str]) -> nn.Module:
    """The submodule at a dotted path; the model itself for None or ""."""
    try:
        return model.get_submodule(path or "")
    except AttributeError as error:
        known = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ValueError("the model has no submodule %r; its children are: %s" % (path, known)) from error
