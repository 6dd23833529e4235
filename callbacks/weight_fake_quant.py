"""Weights as the file will hold them, with a gradient: the torch side of ``slimtrain.core.weight_only``."""
from __future__ import annotations

from typing import Any, Tuple

import torch
from torch import Tensor

from slimtrain.core import SMALLEST_STORED_SCALE, WeightMode, largest_level, usable_block


def store_weight(weight: Tensor, bits: int, mode: WeightMode, block_size: int = 0) -> Tensor:
    """The weight after storage, of the shape and dtype of ``weight``; the grid is computed in float32 as MNN does.

    The gradient passes straight through the rounding. The scale, which the largest weights determine, has the gradient
    of learned step size quantization (arXiv 1902.08153, equation 3), which reaches those weights: at 2 bits that is
    what lets a layer choose its range.

    Args:
        weight: [O, I / groups, ...].
        bits: 2 to 8.
        mode: symmetric or asymmetric.
        block_size: input channels that share a scale, 0 for all of them.
    """
    block = usable_block(weight.shape, block_size)
    rows = weight.float().reshape(len(weight), weight.shape[1] // block if block else 1, -1)
    top = largest_level(bits, mode)
    if mode is WeightMode.SYMMETRIC:
        minimum = torch.zeros_like(rows[..., :1])
        scale = rows.abs().amax(dim=-1, keepdim=True) / top
    else:
        minimum = rows.amin(dim=-1, keepdim=True)
        scale = (rows.amax(dim=-1, keepdim=True) - minimum) / top
    stored: Tensor = _Store.apply(rows, scale, minimum)
    return stored.reshape(weight.shape).to(weight.dtype)


class _Store(torch.autograd.Function):
    """``round((x - minimum) / scale) * scale + minimum``; blocks of a scale that MNN cannot divide by are constant."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        alive = scale > float(SMALLEST_STORED_SCALE)
        position = torch.where(alive, (rows - minimum) / torch.where(alive, scale, 1.0), 0.0)
        level = torch.sign(position) * torch.floor(torch.abs(position) + 0.5)
        ctx.save_for_backward(level - position)
        return level * scale + minimum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, Tensor, None]:
        (rounding,) = ctx.saved_tensors
        # both the weight and the minimum move the result, but the minimum moves the position back by as much
        return grads[0], (grads[0] * rounding).sum(dim=-1, keepdim=True), None
