"""Following tensors through a model that runs its own Python code.

Nothing is rewritten and nothing is traced ahead of time: while the model runs, a torch function mode sees every
operation, gives each result a name that is the same in every run, and lets a :class:`Handler` replace the result.
So it does not matter whether a training step calls ``self(x)``, ``self.net(x)`` or a helper, whether an activation is
a module or a function, or which branch a forward takes. A name is local to the module that runs the operation
(``layer1.0/relu(batch_norm(conv1))``): it says what happened there, not how the module was reached.
"""
from __future__ import annotations

import hashlib
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimtrain.callbacks.operations import (
    LAYER_FUNCTIONS,
    function_name,
    map_tensors,
    operation_kind,
    reads_values,
    tensors_in,
    weight_of,
)
from slimtrain.core import OpKind

_LONGEST_NAME = 120
_MARK = "_slimtrain_mark"


class Mark:
    """What is known of one tensor while the model runs; hangs on the tensor itself."""

    __slots__ = ("run", "serial", "name", "scale_owner", "open_layer", "step")

    def __init__(self, run: int, serial: int, name: str) -> None:
        self.run = run          #: the run of the model that made this mark; a mark of an earlier run means nothing
        self.serial = serial    #: position in the run
        self.name = name
        self.scale_owner: Any = None          #: whose scale put the tensor on its grid, None while it is on none
        self.open_layer: str = ""             #: the quantized layer whose output this is, until it is quantized
        self.step: Optional[Tensor] = None    #: real value of one accumulator unit of that layer, per channel


class Call(NamedTuple):
    """One operation that is about to run."""

    name: str                     #: name of its result
    kind: OpKind
    function: Callable[..., Any]
    args: Tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Tuple[Tensor, ...]    #: the tensors it reads that belong to the network (no weights, no constants)
    marks: Tuple[Optional[Mark], ...]  #: their marks as they were before the operation ran
    layer: str = ""               #: name of the layer, for ``OpKind.LAYER``

    def run(self) -> Any:
        """Execute the operation as the user wrote it."""
        return self.function(*self.args, **self.kwargs)


class Handler:
    """Decides what happens to the tensors of a run; this one changes nothing."""

    def begin(self) -> None:
        """A run of the model begins."""

    def enter(self, name: str, value: Tensor, tracker: Tracker) -> Tensor:
        """A tensor is passed into a module; return what the module shall see."""
        return value

    def execute(self, call: Call, tracker: Tracker) -> Any:
        """Run one operation and return its result."""
        return call.run()

    def produced(self, call: Call, value: Tensor, tracker: Tracker) -> Tensor:
        """An operation produced a tensor, already marked; return what the model shall see."""
        return value

    def leave(self, value: Tensor, tracker: Tracker) -> Tensor:
        """A tensor leaves the model at the end of a run."""
        return value


class _Frame(NamedTuple):
    module: Optional[nn.Module]
    path: str
    start: int               #: tensors with an earlier serial came from outside
    names: Dict[str, int]    #: how often each name was given in this call of the module


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
        self._run = 0
        self._serial = 0
        self._by_weight: Dict[int, str] = {}

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
        if self._frames and path in self.layers:
            return False
        if not self._frames:
            self._run += 1
            self._serial = 0
            self._by_weight = {id(layer.weight): name for name, layer in self.layers.items()}
            self.handler.begin()
            self.__enter__()
        self._frames.append(_Frame(module, path, self._serial, {}))
        return True

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
        self.__exit__(None, None, None)
        return True

    @property
    def running(self) -> bool:
        """Whether the model is being run."""
        return bool(self._frames)

    def enter_arguments(self, values: Any) -> Any:
        """Name the tensors passed into the innermost module."""
        frame = self._frames[-1]
        counter = iter(range(1 << 30))
        return map_tensors(lambda x: self.handler.enter("%s/argument%d" % (frame.path, next(counter)), x, self), values)

    # -- marks

    def mark_of(self, value: Tensor) -> Optional[Mark]:
        """The mark of a tensor of the present run."""
        mark = getattr(value, _MARK, None)
        return mark if mark is not None and mark.run == self._run else None

    def mark(self, value: Tensor, name: str) -> Mark:
        """Give a tensor a fresh mark."""
        self._serial += 1
        mark = Mark(self._run, self._serial, name)
        setattr(value, _MARK, mark)
        return mark

    # -- operations

    def __torch_function__(self, func: Any, types: Any, args: Tuple[Any, ...] = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if not self._frames or not reads_values(func):
            return func(*args, **kwargs)
        call = self._call(func, args, kwargs)
        value = self.handler.execute(call, self)
        if isinstance(value, Tensor):
            return self._produced(call, value)
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            parts = [self._produced(call._replace(name="%s[%d]" % (call.name, index)), part)
                     if isinstance(part, Tensor) else part for index, part in enumerate(value)]
            return type(value)(parts) if type(value) in (tuple, list) else value
        return value

    def _produced(self, call: Call, value: Tensor) -> Tensor:
        self.mark(value, call.name)
        return self.handler.produced(call, value, self)

    def _call(self, func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Call:
        tensors = tensors_in(args) + tensors_in(kwargs)
        name = function_name(func)
        layer = self._by_weight.get(id(weight_of(args, kwargs)), "") if name in LAYER_FUNCTIONS else ""
        if layer:
            marks = (self.mark_of(tensors[0]),)
            return Call(self._unique(layer), OpKind.LAYER, func, args, kwargs, (tensors[0],), marks, layer)
        inputs = tuple(tensor for tensor in tensors if self.mark_of(tensor) is not None)
        kind = operation_kind(name, args, kwargs, constants=len(inputs) < len(tensors))
        marks = tuple(self.mark_of(tensor) for tensor in inputs)
        return Call(self._unique(self._describe(name, marks)), kind, func, args, kwargs, inputs, marks)

    def _describe(self, name: str, marks: Sequence[Optional[Mark]]) -> str:
        frame = self._frames[-1]
        sources = [mark.name.rpartition("/")[2] if mark is not None and mark.serial > frame.start else "outside"
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
        if torch.compiler.is_compiling():
            raise RuntimeError("a model under quantization training cannot be compiled as a whole (its fake "
                               "quantization already is): train the uncompiled model, compile the exported one")
        if not self.tracker.open(module, self.path):
            return None
        try:
            return self.tracker.enter_arguments(args), self.tracker.enter_arguments(kwargs)
        except BaseException:
            self.tracker.close(module)  # torch runs no forward hook after a pre-hook that raised
            raise


class _After(_TrackerHook):
    """Forward hook: closes the frame of a module, also when its forward raised."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.tracker.close(module) or output is None:
            return None
        return map_tensors(lambda value: self.tracker.handler.leave(value, self.tracker), output)
