"""The fake-quantization operation of learned step size quantization, fused.

``y = clip(round(x / s), lower, upper) * s`` rounding half away from zero, with the gradients of LSQ
(Esser et al., arXiv 1902.08153, equations 3 and 5): straight through inside the range for ``x``, and for ``s`` the
rounding error inside and the clip level outside, scaled by ``1 / sqrt(N * upper)``.

The arithmetic is two element-wise functions. On large float32 tensors they run as compiled kernels where a compiler
works on this machine; elsewhere the same functions run eagerly, with the same numbers. ``slimtrain.core.lsq`` is
their numpy oracle.
"""
from __future__ import annotations

import functools
import logging
import math
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.kernels import compile_kernel

logger = logging.getLogger(__name__)

#: below this many elements a kernel launch costs more than fusing saves, and compiling would cost seconds
_COMPILE_FROM = 1 << 13
#: a kernel counts its elements in 32 bits on a GPU
_COMPILE_BELOW = 1 << 31
#: others (fake, distributed, ...) bring operations of their own, which a kernel knows nothing of
_PLAIN = (Tensor, nn.Parameter)
_NARROW = (torch.float16, torch.bfloat16)


class Range(NamedTuple):
    """Integer levels of a quantizer as float32 scalars on the device of the scale (tensors: no bits are recompiled)."""

    lower: Tensor
    upper: Tensor
    gradient_scale: float  #: 1 / sqrt(upper); the 1 / sqrt(N) of LSQ is applied per call
    smallest: Tensor       #: of a scale the magnitude is used, but at least this: an optimizer may step below zero


def fake_quantize(x: Tensor, scale: Tensor, levels: Range) -> Tensor:
    """Quantize and dequantize ``x``.

    Args:
        x: float tensor of any shape and memory format.
        scale: float32; a scalar, or one per slice of the first dimension of ``x``.
        levels: the integer range.

    Returns:
        a tensor like ``x``; differentiable in ``x`` and ``scale``.
    """
    if x.dtype in _NARROW:  # a grid of 255 levels does not fit the 8 bits of bfloat16: compute wide, return narrow
        return fake_quantize(x.float(), scale, levels).to(x.dtype)
    lower, upper, gradient_scale, smallest = levels
    if x.dtype is not lower.dtype or x.dtype is not scale.dtype:
        scale, lower, upper, smallest = (each.to(x.dtype) for each in (scale, lower, upper, smallest))
    return _FakeQuantize.apply(x, scale, lower, upper, smallest, gradient_scale)


def integer_levels(x: Tensor, scale: Tensor, levels: Range) -> Tensor:
    """The integers behind ``fake_quantize(x, scale, levels)``, as floats; no gradient."""
    return _levels(x / _broadcast(scale, x), levels.lower, levels.upper)


def _levels(t: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.clamp(torch.sign(t) * torch.floor(torch.abs(t) + 0.5), lower, upper)


def _forward(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, smallest: Tensor) -> Tensor:
    used = torch.maximum(torch.abs(scale), smallest)
    return _levels(x / used, lower, upper) * used


def _forward_only(*tensors: Tensor) -> Tuple[Tensor]:
    return (_forward(*tensors),)  # a kernel returns a tuple


def _backward(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, smallest: Tensor,
              grad: Tensor) -> Tuple[Tensor, Tensor]:
    t = x / torch.maximum(torch.abs(scale), smallest)
    level = _levels(t, lower, upper)
    inside = (t >= lower) & (t <= upper)
    return torch.where(inside, grad, 0.0), grad * torch.where(inside, level - t, level)


def _backward_summed(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, smallest: Tensor,
                     grad: Tensor) -> Tuple[Tensor, Tensor]:
    dx, ds = _backward(x, scale, lower, upper, smallest, grad)
    return dx, _through_magnitude(ds.sum(dim=-1, keepdim=True), scale, smallest)


def _through_magnitude(grad: Tensor, scale: Tensor, smallest: Tensor) -> Tensor:
    return torch.where(torch.abs(scale) >= smallest, grad * torch.sgn(scale), 0.0)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, smallest: Tensor,
                gradient_scale: float) -> Tensor:
        scale = scale.clone()  # an averaged scale is overwritten by the next forward, which may come before backward
        ctx.save_for_backward(x, scale, lower, upper, smallest)
        ctx.gradient_scale = gradient_scale
        if not _is_fused(x):
            return _forward(x, _broadcast(scale, x), lower, upper, smallest)
        kernel = _compiled(_forward_only, x.device.type)
        with torch._C.DisableTorchFunction():
            dense = _dense(x, scale)
            (y,) = kernel(*_matrices(scale, dense), lower, upper, smallest)
            return _shaped(y, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, scale, lower, upper, smallest = ctx.saved_tensors
        rows = scale.numel()
        if _is_fused(x):
            kernel = _compiled(_backward_summed, x.device.type)
            with torch._C.DisableTorchFunction():
                dense = _dense(x, scale)
                grad = grads[0] if grads[0].stride() == dense.stride() else torch.empty_like(dense).copy_(grads[0])
                matrix, column, gradient = _matrices(scale, dense, grad)
                dx, ds = kernel(matrix, column, lower, upper, smallest, gradient)
                dx = _shaped(dx, dense)
        else:
            dx, ds = _backward(x, _broadcast(scale, x), lower, upper, smallest, grads[0])
            ds = _through_magnitude(ds.reshape(rows, -1).sum(dim=-1).reshape(scale.shape), scale, smallest)
        elements = max(1, x.numel() // max(1, rows))
        return dx, ds.reshape(scale.shape) * (ctx.gradient_scale / math.sqrt(elements)), None, None, None, None


def _broadcast(scale: Tensor, x: Tensor) -> Tensor:
    return scale if scale.dim() == 0 else scale.reshape(-1, *(1,) * (x.dim() - 1))


# One kernel serves every shape and memory format, because it sees (scales, elements per scale) in memory order.


def _dense(x: Tensor, scale: Tensor) -> Tensor:
    """``x``, or a copy that fills its memory without gaps, the elements of each scale together."""
    if x.is_contiguous():
        return x
    layout = _CHANNELS_LAST.get(x.dim())
    one_scale = scale.numel() == 1
    return x if one_scale and layout is not None and x.is_contiguous(memory_format=layout) else x.contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _matrices(scale: Tensor, dense: Tensor, *more: Tensor) -> Iterator[Tensor]:
    """Tensors of one dense layout as ``(rows, elements per row)`` in memory order; the scale second, as a column."""
    rows = scale.numel()
    columns = dense.numel() // rows
    yield dense.as_strided((rows, columns), (columns, 1))
    yield scale.view(rows, 1)
    for each in more:
        yield each.as_strided((rows, columns), (columns, 1))


def _shaped(y: Tensor, dense: Tensor) -> Tensor:
    """Give a result its shape back; in place, because autograd forbids the user to change a view in place."""
    return y.as_strided_(dense.shape, dense.stride())


def _is_fused(x: Tensor) -> bool:
    worth_it = _COMPILE_FROM <= x.numel() < _COMPILE_BELOW and x.dtype is torch.float32
    return worth_it and type(x) in _PLAIN and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


@functools.lru_cache(maxsize=None)
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compile a function, or give it back as it is where this machine has no working compiler."""
    try:
        one, many = (compile_kernel(function, _examples(function, rows, device)) for rows in (1, 64))
    except Exception as error:  # a missing compiler surfaces as any of a dozen types, all of which mean: run eagerly
        logger.info("fake quantization runs eagerly, compiling it does not work here: %s", error)
        return function
    return lambda x, *more: (one if x.shape[0] == 1 else many)(x, *more)


def _examples(function: Callable[..., Any], rows: int, device: str) -> List[Tensor]:
    limits = [torch.full((), limit, device=device) for limit in (-1.0, 1.0, 1e-6)]
    x, gradient = (torch.ones(rows, _COMPILE_FROM, device=device) for _ in range(2))
    tensors = [x, torch.ones(rows, 1, device=device), *limits]
    return tensors if function is _forward_only else [*tensors, gradient]
