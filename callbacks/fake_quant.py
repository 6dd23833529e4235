"""The fake-quantization operation of learned step size quantization, fused.

``y = clip(round(x / s), lower, upper) * s`` rounding half away from zero, with the gradients of LSQ
(Esser et al., arXiv 1902.08153, equations 3 and 5): straight through inside the range for ``x``, and for ``s`` the
rounding error inside and the clip level outside, scaled by ``1 / sqrt(N * upper)``.

The arithmetic is two element-wise functions. On large float32 tensors they are compiled by ``torch.compile`` where
that works on this machine; elsewhere the same functions run eagerly, with the same numbers. ``slimtrain.core.lsq``
is their numpy oracle.
"""
from __future__ import annotations

import functools
import logging
import math
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: below this many elements a kernel launch costs more than fusing saves, and compiling would cost seconds
_COMPILE_FROM = 1 << 13
_NARROW = (torch.float16, torch.bfloat16)


class Range(NamedTuple):
    """Integer levels of a quantizer as float32 scalars on the device of the scale (tensors: no bits are recompiled)."""

    lower: Tensor
    upper: Tensor
    gradient_scale: float  #: 1 / sqrt(upper); the 1 / sqrt(N) of LSQ is applied per call


def fake_quantize(x: Tensor, scale: Tensor, levels: Range) -> Tensor:
    """Quantize and dequantize ``x``.

    Args:
        x: float tensor of any shape and memory format.
        scale: positive float32; a scalar, or one per slice of the first dimension of ``x``.
        levels: the integer range.

    Returns:
        a tensor like ``x``; differentiable in ``x`` and ``scale``.
    """
    if x.dtype in _NARROW:  # a grid of 255 levels does not fit the 8 bits of bfloat16: compute wide, return narrow
        return fake_quantize(x.float(), scale, levels).to(x.dtype)
    bounds = levels.lower.to(x.dtype), levels.upper.to(x.dtype)
    return _FakeQuantize.apply(x, scale.to(x.dtype), *bounds, levels.gradient_scale)


def integer_levels(x: Tensor, scale: Tensor, levels: Range) -> Tensor:
    """The integers behind ``fake_quantize(x, scale, levels)``, as floats; no gradient."""
    return _levels(x / _broadcast(scale, x), levels.lower, levels.upper)


def _levels(t: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.clamp(torch.sign(t) * torch.floor(torch.abs(t) + 0.5), lower, upper)


def _forward(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return _levels(x / scale, lower, upper) * scale


def _backward(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, grad: Tensor) -> Tuple[Tensor, Tensor]:
    t = x / scale
    level = _levels(t, lower, upper)
    inside = (t >= lower) & (t <= upper)
    return torch.where(inside, grad, 0.0), grad * torch.where(inside, level - t, level)


def _backward_summed(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, grad: Tensor) -> Tuple[Tensor, Tensor]:
    dx, ds = _backward(x, scale, lower, upper, grad)
    return dx, ds.sum(dim=-1, keepdim=True)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, lower, upper)
        ctx.gradient_scale = gradient_scale
        if not _is_fused(x):
            return _forward(x, _broadcast(scale, x), lower, upper)
        y = _call_compiled(_forward, x, scale, lower, upper)
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, scale, lower, upper = ctx.saved_tensors
        rows = scale.numel()
        if _is_fused(x):
            dx, ds = _call_compiled(_backward_summed, x, scale, lower, upper, _in_layout_of(grads[0], x))
            dx = _shaped(dx, x)
        else:
            dx, ds = _backward(x, _broadcast(scale, x), lower, upper, grads[0])
            ds = ds.reshape(rows, -1).sum(dim=-1)
        elements = max(1, x.numel() // max(1, rows))
        return dx, ds.reshape(scale.shape) * (ctx.gradient_scale / math.sqrt(elements)), None, None, None


def _broadcast(scale: Tensor, x: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.reshape(-1, *(1,) * (x.dim() - 1))


# One kernel serves every shape and memory format, because it sees (scales, elements per scale) in memory order.


def _call_compiled(function: Callable[..., Any], x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor,
                   *more: Tensor) -> Any:
    rows = scale.numel()
    # torch would trace the function modes that are active, and compile again for each set of them
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with torch._C.DisableTorchFunction():
            compiled = _compiled(function, x.device.type)
            others = [_matrix(each, rows) for each in more]
            return compiled(_matrix(x, rows), _matrix(scale, rows), lower, upper, *others)
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def _matrix(x: Tensor, rows: int) -> Tensor:
    """The elements as ``(rows, elements per row)``, and no view: for each kind of view torch would compile again."""
    dense = x if x.is_contiguous() or (rows == 1 and _is_dense(x)) else x.contiguous()
    columns = x.numel() // rows
    return dense.new_empty(0).set_(dense.untyped_storage(), dense.storage_offset(), (rows, columns), (columns, 1))


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` with the shape and layout of ``x``, as a tensor of its own: autograd forbids changing a view in place."""
    layout = x if y.shape[0] == 1 and _is_dense(x) else torch.empty(x.shape, device="meta")
    return y.new_empty(0).set_(y.untyped_storage(), 0, layout.shape, layout.stride())


def _in_layout_of(grad: Tensor, x: Tensor) -> Tensor:
    if grad.stride() == x.stride() or not _is_dense(x):
        return grad
    return torch.empty_like(x).copy_(grad)


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` fills its memory without gaps, in the usual or in the channels-last order."""
    layout = _CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (layout is not None and x.is_contiguous(memory_format=layout))


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_fused(x: Tensor) -> bool:
    worth_it = x.numel() >= _COMPILE_FROM and x.dtype is torch.float32
    return worth_it and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


@functools.lru_cache(maxsize=None)
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compile a function, or give it back as it is where this machine has no working compiler."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    level = torch.ones((), device=device)
    try:
        for shape in ((1, _COMPILE_FROM), (64, _COMPILE_FROM // 64)):
            tensors = [torch.zeros(shape, device=device) for _ in range(1 if function is _forward else 2)]
            compiled(tensors[0], torch.ones(shape[0], 1, device=device), -level, level, *tensors[1:])
    except Exception as error:  # a missing compiler surfaces as any of a dozen types, all of which mean: run eagerly
        logger.info("fake quantization runs eagerly, torch.compile does not work here: %s", error)
        return function
    return compiled
