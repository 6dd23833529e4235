"""What a model is given: a batch as the arguments of one run."""
from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Tuple


class Batch(NamedTuple):
    """The arguments of one run of a model."""

    args: Tuple[Any, ...]
    kwargs: Mapping[str, Any]


def arguments(batch: Any) -> Batch:
    """An input of the model: a tuple or list is several positional arguments, a dict keyword arguments."""
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        return Batch((), batch)
    return Batch(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
