"""Following tensors through a model that runs its own Python code.

Nothing is rewritten and nothing is traced ahead of time: while the model runs, a torch function mode sees every
operation, gives each result a name that is the same in every run, and lets a :class:`Handler` replace the result.
So it does not matter whether a training step calls ``self(x)``, ``self.net(x)`` or a helper, whether an activation is
a module or a function, or which branch a forward takes. A name is local to the module that runs the operation
(``layer1.0/relu(batch_norm(conv1))``): it says what happened there, not how the module was reached.
"""
from __future__ import annotations

import hashlib
import itertools
import sys
from types import FrameType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimtrain.callbacks.handling import Call, Handler
from slimtrain.callbacks.marks import Mark, Marks
from slimtrain.callbacks.operations import (
    LAYER_FUNCTIONS,
    argument,
    counts,
    function_name,
    map_tensors,
    operation_kind,
    reads_values,
    tensors_in,
    weight_of,
)
from slimtrain.callbacks.recomputation import Entrances
from slimtrain.core import OpKind

_LONGEST_NAME = 120


class _Frame(NamedTuple):
    module: Optional[nn.Module]
    path: str
    start: int               #: tensors with an earlier serial came from outside
    names: Dict[str, int]    #: how often each name was given in this call of the module
    arguments: Dict[int, str]  #: serial of a tensor that was passed in -> what it is called inside


class Tracker(TorchFunctionMode):
    """Names the operations of one model and passes them to a handler.

    Args:
        root: the model; the names of its submodules are the names of layers and frames.
        layers: the quantized layers by name; an operation is one of them when it uses their weight.
        handler: decides what happens to tensors.
    """

    def __init__(self, root: nn.Module, layers: Mapping[str, nn.Module], handler: Handler) -> None:
        super().__init__()
        self.root = root
        self.layers = dict(layers)
        self.handler = handler
        self._frames: List[_Frame] = []
        self._serial = 0
        self._marks = Marks()
        self._replaced = False  #: whether any tensor was changed in place and has a replacement
        self._entrances = Entrances()
        self._by_weight: Dict[int, List[str]] = {}  #: id of a weight -> its layers; tied ones differ in their bias
        self._caller: Optional[FrameType] = None  #: the Python frame that called the outermost module

    # -- where a run begins and ends

    def attach(self) -> List[Any]:
        """Hook the model; returns the handles that undo it."""
        handles = []
        for path, module in self.root.named_modules():
            if path == "" or path in self.layers or next(module.children(), None) is not None:
                before, after = _Before(self, path), _After(self, path)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        return handles

    def open(self, module: Optional[nn.Module] = None, path: str = "") -> bool:
        """Enter a module; True when a new frame was opened (a layer inside a run needs none)."""
        if self._frames and path == "" and self._caller is not None and not _is_running(self._caller):
            self.reset()  # the latest run was interrupted: torch calls no hook on a KeyboardInterrupt
        if self.is_inside(path):
            return False
        if not self._frames:
            self._begin(module, path)
        self._frames.append(_Frame(module, path, self._serial, {}, {}))
        return True

    def _begin(self, module: Optional[nn.Module], path: str) -> None:
        self._entrances.begin(path)
        self._serial = 0
        self._replaced = False
        self._marks.clear()
        self._by_weight = {}
        for name, layer in self.layers.items():
            self._by_weight.setdefault(id(layer.weight), []).append(name)
        self._caller = None if module is None else _caller()
        if not self._entrances.repeating:
            self.handler.begin(self)
        self.__enter__()

    def close(self, module: Optional[nn.Module] = None) -> bool:
        """Leave a module if its frame is the innermost; True when this ended the run.

        Without a module: leave the frame that was opened without one, and whatever an exception left open in it.
        """
        if module is None and any(frame.module is None for frame in self._frames):
            while self._frames[-1].module is not None:
                self._frames.pop()
        if not self._frames or self._frames[-1].module is not module:
            return False
        self._frames.pop()
        if self._frames:
            return False
        self._caller = None
        self.__exit__(None, None, None)
        return True

    def reset(self) -> None:
        """End a run that was broken off."""
        if self._frames:
            self._frames, self._caller = [], None
            self.__exit__(None, None, None)

    @property
    def running(self) -> bool:
        """Whether the model is being run."""
        return bool(self._frames)

    def is_inside(self, path: str) -> bool:
        """Whether a module is a layer that a running module calls: what it does is seen as one operation."""
        return bool(self._frames) and path in self.layers

    @property
    def repeating(self) -> bool:
        """Whether the present or latest run repeats a part of an earlier one (activation checkpointing)."""
        return self._entrances.repeating

    def enter_arguments(self, args: Tuple[Any, ...],
                        kwargs: Mapping[str, Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """Name the tensors passed into the innermost module."""
        frame = self._frames[-1]
        tensors = tensors_in((args, kwargs)) if kwargs else tensors_in(args)
        if len(self._frames) > 1:
            self._entrances.enter(frame.path, [self._marks.get(tensor) for tensor in tensors])
        elif self.repeating:
            for tensor, known in zip(tensors, self._entrances.repeated(frame.path)):
                if known is not None:
                    mark = self.mark(tensor, "%s/repeated" % frame.path)
                    mark.scale_owner, mark.open_layer = known
        return (tuple(self._enter(frame, "argument%d" % index, value) for index, value in enumerate(args)),
                {key: self._enter(frame, "argument_" + key, value) for key, value in kwargs.items()})

    def _enter(self, frame: _Frame, name: str, value: Any) -> Any:
        """Pass in one argument; the tensors of a list are numbered."""
        if isinstance(value, Tensor):
            return self._enter_tensor(frame, name, value)
        numbers = itertools.count()
        return map_tensors(lambda tensor: self._enter_tensor(frame, "%s.%d" % (name, next(numbers)), tensor), value)

    def _enter_tensor(self, frame: _Frame, name: str, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # what a handler computes is no operation of the model
            entered = self.handler.enter("%s/%s" % (frame.path, name), self._latest(tensor), self)
        mark = self._marks.get(entered)
        if mark is not None:
            frame.arguments[mark.serial] = name
        return entered

    def leave(self, value: Tensor) -> Tensor:
        """A tensor leaves the model; return what the caller shall see."""
        return self.handler.leave(self._latest(value), self)

    # -- marks

    def mark_of(self, value: Tensor) -> Optional[Mark]:
        """The mark of a tensor of the present run, or of the latest when none is running."""
        return self._marks.get(value)

    def mark(self, value: Tensor, name: str) -> Mark:
        """Give a tensor a fresh mark."""
        self._serial += 1
        mark = Mark(self._serial, name)
        self._marks.set(value, mark)
        return mark

    def replace(self, value: Tensor, result: Tensor) -> None:
        """Let whoever reads a tensor from now on see another, because an operation changed it in place."""
        mark = self.mark_of(value)
        if mark is not None:
            mark.replacement = result
            self._replaced = True

    def _latest(self, value: Tensor) -> Tensor:
        """The tensor itself, or what a handler put in the place of one that was changed in place."""
        mark = self.mark_of(value)
        while mark is not None and mark.replacement is not None:
            value, mark = mark.replacement, self.mark_of(mark.replacement)
        return value

    # -- operations

    def __torch_function__(self, func: Any, types: Any, args: Tuple[Any, ...] = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if not self._frames or not reads_values(func) or counts(func, args):
            return func(*args, **kwargs)
        if self._replaced:
            args, kwargs = map_tensors(self._latest, args), map_tensors(self._latest, kwargs)
        call = self._call(func, args, kwargs)
        value = self.handler.execute(call, self)
        if value is None and function_name(func) == "__setitem__":
            self._produced(call, call.args[0])
        if isinstance(value, Tensor):
            return self._produced(call, value)
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            parts = [self._produced(call._replace(name="%s[%d]" % (call.name, index)), part)
                     if isinstance(part, Tensor) else part for index, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def _produced(self, call: Call, value: Tensor) -> Tensor:
        self.mark(value, call.name)
        result = self.handler.produced(call, value, self)
        if result is not value and any(value is tensor for tensor in call.inputs):
            self.replace(value, result)
        return result

    def _call(self, func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Call:
        name = function_name(func)
        layer = self._layer_of(args, kwargs) if name in LAYER_FUNCTIONS else ""
        if layer:
            x = argument(args, kwargs, 0, "input")
            return Call(self._unique(layer), OpKind.LAYER, func, args, kwargs, (x,), (self._marks.get(x),), layer)
        inputs, marks, constants = [], [], False
        for tensor in tensors_in((args, kwargs)) if kwargs else tensors_in(args):
            mark = self._marks.get(tensor)
            if mark is None:
                constants = True
            else:
                inputs.append(tensor)
                marks.append(mark)
        kind = operation_kind(name, args, kwargs, constants)
        return Call(self._unique(self._describe(name, marks)), kind, func, args, kwargs, tuple(inputs), tuple(marks))

    def _layer_of(self, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        names = self._by_weight.get(id(weight_of(args, kwargs)), [])
        if len(names) > 1:
            bias = argument(args, kwargs, 2, "bias")
            names = [name for name in names if self.layers[name].bias is bias] or names
        return names[0] if names else ""

    def _describe(self, name: str, marks: Sequence[Mark]) -> str:
        frame = self._frames[-1]
        sources = [frame.arguments.get(mark.serial)
                   or (mark.name.rpartition("/")[2] if mark.serial > frame.start else "outside")
                   for mark in marks]
        text = "%s(%s)" % (name, ",".join(sources))
        if len(text) > _LONGEST_NAME:
            text = "%s(#%s)" % (name, hashlib.blake2s(text.encode(), digest_size=8).hexdigest())
        return "%s/%s" % (frame.path, text)

    def _unique(self, name: str) -> str:
        """Number the repetitions of a name within one call of a module."""
        names = self._frames[-1].names
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else "%s#%d" % (name, names[name])


class OwnHook:
    """A forward hook of this package: not part of the user's model."""


class _TrackerHook(OwnHook):
    """A hook of a tracker. A class and not a closure, because a copied model must take a copy of its tracker along."""

    def __init__(self, tracker: Tracker, path: str) -> None:
        self.tracker = tracker
        self.path = path


class _Before(_TrackerHook):
    """Forward pre-hook: opens the frame of a module."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Optional[Tuple[Any, Any]]:
        if self.path and self.tracker.is_inside(self.path):
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError("a model under quantization training cannot be compiled as a whole (its fake "
                               "quantization already is): train the uncompiled model, compile the exported one")
        if is_redirected(module) or not self.tracker.open(module, self.path):
            return None
        try:
            return self.tracker.enter_arguments(args, kwargs)
        except BaseException:
            self.tracker.close(module)  # torch runs no forward hook after a pre-hook that raised
            raise


class _After(_TrackerHook):
    """Forward hook: closes the frame of a module, also when its forward raised."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.tracker.close(module) or output is None or self.tracker.repeating:
            return None
        result = map_tensors(self.tracker.leave, output)
        self.tracker.handler.end(self.tracker)
        return result


def is_redirected(module: nn.Module) -> bool:
    """Whether DDP runs a step of a LightningModule through its ``forward``: the arguments are a batch, not an input."""
    forward = vars(module).get("forward")
    return getattr(forward, "__qualname__", "").startswith("_ForwardRedirection.")


def _caller() -> Optional[FrameType]:
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    active: Optional[FrameType] = sys._getframe(1)
    while active is not None and active is not frame:
        active = active.f_back
    return active is not None
