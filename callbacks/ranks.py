"""The processes that train one model together: each sees other data, all shall decide the same."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp


def are_several() -> bool:
    """Whether other processes train the same model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return not are_several() or torch.distributed.get_rank() == 0


def sum_over_ranks(value: Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if are_several():
        torch.distributed.all_reduce(value)


def average_over_ranks(value: Tensor) -> None:
    """Replace a tensor by its mean over all processes."""
    if are_several():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()


def least_over_ranks(value: Tensor) -> None:
    """Replace each element by the smallest that any process has."""
    if are_several():
        torch.distributed.all_reduce(value, ReduceOp.MIN)


def largest_over_ranks(value: Tensor) -> None:
    """Replace each element by the largest that any process has."""
    if are_several():
        torch.distributed.all_reduce(value, ReduceOp.MAX)
