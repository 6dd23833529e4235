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
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.kernels import compile_kernel

logger = logging.getLogger(__name__)

#: below this many elements a kernel launch costs more than fusing saves, and compiling would cost seconds
_COMPILE_FROM = 1 << 13
#: the same once a network is large enough to have paid for compiling
_COMPILE_ALL_FROM = 1 << 6
#: a kernel counts its elements in 32 bits on a GPU
_COMPILE_BELOW = 1 << 31
#: others (fake, distributed, ...) bring operations of their own, which a kernel knows nothing of
_PLAIN = (Tensor, nn.Parameter)
_NARROW = (torch.float16, torch.bfloat16)


class Bounds(NamedTuple):
    """What an activation cuts its input off at: ``relu`` is 0 and infinity."""

    low: float
    high: float


NO_BOUNDS = Bounds(-math.inf, math.inf)


class Range(NamedTuple):
    """What a quantizer does besides scaling, in one float32 tensor on its device: no number is compiled in."""

    limits: Tensor               #: [6]: lowest and highest level, smallest scale, 1 / sqrt(highest level) for the
                                 #: gradient (1 / sqrt(N) follows per call), bounds of an activation before
    is_bounded: bool = False     #: whether there is such an activation
    compiles_all: bool = False   #: belongs to a large network, for whose small tensors, too, compiling pays

    @classmethod
    def of(cls, lower: float, upper: float, smallest: float, bounds: Bounds = NO_BOUNDS, compiles_all: bool = False,
           device: Optional[torch.device] = None) -> Range:
        """Make a range; of a scale the magnitude is used, but at least ``smallest``: a step may lead below zero."""
        limits = [lower, upper, smallest, upper ** -0.5, *bounds]
        return cls(torch.tensor(limits, dtype=torch.float32, device=device), bounds != NO_BOUNDS, compiles_all)


class Source(NamedTuple):
    """What a tensor was quantized from, where that has no gradient of its own."""

    x: Tensor
    scale: Tensor
    levels: Range


def source_of(value: Tensor) -> Optional[Source]:
    """The source of the result of :func:`fake_quantize`, if only the scale has a gradient."""
    return getattr(value.grad_fn, "source", None)


def source_gradient(source: Source, summed: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a scale.

    Args:
        source: of the quantized tensor.
        summed: from the change of that tensor with its scale, of the same shape, to the sum of its products with the
            gradient; both by any way.
    """
    x, scale, levels = source
    limits = levels.limits.to(x.dtype).unbind()
    _, change = _backward(x, scale, limits, torch.ones_like(x), levels.is_bounded)
    return _scale_gradient(summed(change), scale, limits, x.numel())


def fake_quantize(x: Tensor, scale: Tensor, levels: Range, owns_gradient: bool = False) -> Tensor:
    """Quantize and dequantize ``x``, or what an activation makes of it.

    Args:
        x: float tensor of any shape and memory format.
        scale: float32; a scalar, or one per slice of the first dimension of ``x``.
        levels: the integer range, and the bounds of the activation.
        owns_gradient: whether backward may overwrite the gradient that it is given, because what reads the result makes
            one for it alone, as a convolution does for its weight. A sum, for one, gives all its operands the same.

    Returns:
        a tensor like ``x``; differentiable in ``x`` and ``scale``.
    """
    if x.dtype in _NARROW:  # a grid of 255 levels does not fit the 8 bits of bfloat16: compute wide, return narrow
        return fake_quantize(x.float(), scale, levels, owns_gradient).to(x.dtype)
    if x.dtype is not levels.limits.dtype or x.dtype is not scale.dtype:
        scale, levels = scale.to(x.dtype), levels._replace(limits=levels.limits.to(x.dtype))
    return _FakeQuantize.apply(x, scale, levels, owns_gradient)


def integer_levels(x: Tensor, scale: Tensor, levels: Range) -> Tensor:
    """The integers behind ``fake_quantize(x, scale, levels)``, as floats; no gradient."""
    return _rounded(torch.clamp(x / _broadcast(scale, x), *levels.limits[:2]))


def _rounded(t: Tensor) -> Tensor:
    """Round half away from zero."""
    return torch.trunc(t + torch.where(t < 0, -0.5, 0.5))


# Both are written for the fewest instructions per element: as kernels they are not bound by memory.


def _forward(x: Tensor, scale: Tensor, limits: Sequence[Tensor], is_bounded: bool) -> Tensor:
    lower, upper, smallest, _, low, high = limits
    used = torch.maximum(torch.abs(scale), smallest)
    value = torch.clamp(x, low, high) if is_bounded else x
    return _rounded(torch.clamp(value / used, lower, upper)) * used


def _backward(x: Tensor, scale: Tensor, limits: Sequence[Tensor], grad: Tensor,
              is_bounded: bool) -> Tuple[Tensor, Tensor]:
    """Gradients of ``x`` and, element by element, of the scale."""
    lower, upper, smallest, _, low, high = limits
    value = torch.clamp(x, low, high) if is_bounded else x
    t = value / torch.maximum(torch.abs(scale), smallest)
    cut = torch.clamp(t, lower, upper)
    inside = cut == t
    passes = inside & (x > low) & (x < high) if is_bounded else inside
    return torch.where(passes, grad, 0.0), grad * (_rounded(cut) - torch.where(inside, t, 0.0))


def _scale_gradient(summed: Tensor, scale: Tensor, limits: Sequence[Tensor], elements: int) -> Tensor:
    """What a learned scale gets of the gradient of the scale that was used, which is its magnitude, summed up."""
    _, _, smallest, gradient_scale, *_ = limits
    signed = torch.where(torch.abs(scale) >= smallest, summed * torch.sgn(scale), 0.0)
    return signed * gradient_scale * elements ** -0.5


# Kernels write into a tensor that they are given: it has the shape that they need not know, and may be the gradient.


def _forward_kernel(x: Tensor, scale: Tensor, packed: Tensor, y: Tensor) -> Tuple[Tensor]:
    y.copy_(_forward(x, scale, packed.unbind(), x.shape[0] == 1))
    return (scale.clone(),)


def _backward_kernel(x: Tensor, scale: Tensor, packed: Tensor, grad: Tensor, dx: Tensor) -> Tuple[Tensor]:
    limits = packed.unbind()
    of_x, of_scale = _backward(x, scale, limits, grad, x.shape[0] == 1)
    dx.copy_(of_x)
    return (_scale_gradient(of_scale.sum(dim=-1, keepdim=True), scale, limits, x.shape[1]),)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: Range, owns_gradient: bool) -> Tensor:
        ctx.levels, ctx.scale_shape, ctx.owns_gradient = levels, scale.shape, owns_gradient
        ctx.is_fused = _is_fused(x, scale, levels)
        # backward gets a copy of the scale: an averaged one is overwritten by the next forward, which may come before
        if ctx.is_fused:
            with torch._C.DisableTorchFunction():
                dense, rows = _dense(x, scale), scale.numel()
                y = torch.empty_like(dense)
                (copy,) = _compiled(_forward_kernel, x.device.type)(
                    _matrix(dense, rows), scale.view(rows, 1), levels.limits, _matrix(y, rows))
        else:
            copy = scale.clone()
            y = _forward(x, _broadcast(scale, x), levels.limits.unbind(), levels.is_bounded)
        ctx.save_for_backward(x, copy)
        ctx.source = None if ctx.needs_input_grad[0] or scale.dim() else Source(x, copy.view(()), levels)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, scale = ctx.saved_tensors
        if not ctx.is_fused or torch.is_grad_enabled():  # a gradient of the gradient is wanted, which no kernel has
            dx, ds = _eager_gradients(x, scale.view(ctx.scale_shape), ctx.levels, grads[0])
            return dx, ds, None, None
        with torch._C.DisableTorchFunction():
            dense, rows = _dense(x, scale), scale.numel()
            matches = grads[0].stride() == dense.stride()
            grad = grads[0] if matches else torch.empty_like(dense).copy_(grads[0])
            dx = grad if ctx.owns_gradient or not matches else torch.empty_like(dense)
            (ds,) = _compiled(_backward_kernel, x.device.type)(
                _matrix(dense, rows), scale, ctx.levels.limits, _matrix(grad, rows), _matrix(dx, rows))
            return dx, ds.view(ctx.scale_shape), None, None


def _eager_gradients(x: Tensor, scale: Tensor, levels: Range, grad: Tensor) -> Tuple[Tensor, Tensor]:
    limits = levels.limits.unbind()
    dx, ds = _backward(x, _broadcast(scale, x), limits, grad, levels.is_bounded)
    summed = ds.reshape(scale.numel(), -1).sum(dim=-1).view(scale.shape)
    return dx, _scale_gradient(summed, scale, limits, max(1, x.numel() // scale.numel()))


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


def _matrix(dense: Tensor, rows: int) -> Tensor:
    """A dense tensor as ``(rows, elements per row)`` in memory order."""
    if dense.is_contiguous():
        return dense.view(rows, -1)
    columns = dense.numel() // rows
    return dense.as_strided((rows, columns), (columns, 1))


def _is_fused(x: Tensor, scale: Tensor, levels: Range) -> bool:
    least = _COMPILE_ALL_FROM if levels.compiles_all else _COMPILE_FROM
    worth_it = least <= x.numel() < _COMPILE_BELOW and x.dtype is torch.float32
    supported = scale.numel() == 1 or not levels.is_bounded  # the kernel of many scales knows no activation
    return (worth_it and supported and type(x) in _PLAIN
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing())


@functools.lru_cache(maxsize=None)
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compile a function, or give it back as it is where this machine has no working compiler."""
    try:
        one, many = (compile_kernel(function, _examples(function, *shape, device)) for shape in ((1, 8192), (64, 1024)))
    except Exception as error:  # a missing compiler surfaces as any of a dozen types, all of which mean: run eagerly
        logger.info("fake quantization runs eagerly, compiling it does not work here: %s", error)
        return function
    return lambda x, *more: (one if x.shape[0] == 1 else many)(x, *more)


def _examples(function: Callable[..., Any], rows: int, columns: int, device: str) -> List[Tensor]:
    """Arguments to compile for.

    Any number of columns will do, but TorchInductor sums up more than 4096 of them in a way that is more accurate and
    takes a lot longer: worth it for a whole tensor, not for a channel.
    """
    x = torch.ones(rows, columns, device=device)
    limits = Range.of(-1.0, 1.0, 1e-6, device=torch.device(device)).limits
    tensors = [x, torch.ones(rows, 1, device=device), limits, torch.empty_like(x)]
    return tensors if function is _forward_kernel else [*tensors, torch.empty_like(x)]
