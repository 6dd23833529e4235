"""What is known of the tensors of one run of a model.

Marks hang beside tensors and not on them: a tensor that the user saves, copies or passes to another model carries
nothing of ours, and is not kept alive.
"""
from __future__ import annotations

import weakref
from typing import Any, Dict, Optional, Tuple

from torch import Tensor


class Mark:
    """What is known of one tensor while the model runs."""

    __slots__ = ("serial", "name", "scale_owner", "open_layer", "exact", "replacement")

    def __init__(self, serial: int, name: str) -> None:
        self.serial = serial    #: position in the run
        self.name = name
        self.scale_owner: Any = None   #: whose scale put the tensor on its grid, None while it is on none
        self.open_layer: str = ""      #: the quantized layer whose output this is, until it is quantized
        self.exact: Optional[Tensor] = None  #: in evaluation: that layer and what is fused into it, as a device does
        self.replacement: Optional[Tensor] = None  #: what readers of a tensor changed in place shall see


class Marks:
    """Tensors and their marks, by identity."""

    def __init__(self) -> None:
        self._entries: Dict[int, Tuple[weakref.ref[Tensor], Mark]] = {}

    def get(self, value: Tensor) -> Optional[Mark]:
        """The mark of a tensor."""
        entry = self._entries.get(id(value))
        return entry[1] if entry is not None and entry[0]() is value else None

    def set(self, value: Tensor, mark: Mark) -> None:
        """Give a tensor a mark, instead of any it has."""
        key, entries = id(value), self._entries
        entries[key] = (weakref.ref(value, lambda _: entries.pop(key, None)), mark)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __reduce__(self) -> Tuple[Any, ...]:
        return Marks, ()  # a copied model begins without: its tensors are others
