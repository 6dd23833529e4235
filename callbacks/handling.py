"""What happens to the tensors of a model while it runs: one operation, and who decides about it."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor

from slimtrain.callbacks.marks import Mark
from slimtrain.core import OpKind

if TYPE_CHECKING:  # a tracker has a handler
    from slimtrain.callbacks.tracking import Tracker


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

    def begin(self, tracker: Tracker) -> None:
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

    def end(self, tracker: Tracker) -> None:
        """A run of the model has ended, and not by an exception."""
