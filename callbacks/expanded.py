"""Layers that train as a chain of wider ones and are one layer to everybody else.

A layer becomes 1x1, k x k and 1x1 with ``rate`` times the channels in between, each but the last followed by a batch
normalization, plus its own input (Guo et al., "ExpandNets", arXiv 1811.10495).  All of that is linear once the
statistics are fixed, so it is one layer of the original's shape, and the object stays the user's own: its class is
exchanged for one below, its ``weight`` is computed, and ``state_dict()`` knows nothing but ``weight`` and ``bias``.

Being linear is used in training too.  The first normalization only scales, because the second takes out every
constant; its scale is put into the kernel, so that the k x k convolution runs on the narrow input: rate times the
original's multiply-adds instead of rate**2.  Nothing has a bias before the padding, which one layer could not imitate.
"""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-5
_MOMENTUM = 0.1
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ExpandedLayer(nn.Module):
    """What the expanded layers share: parameters ``first`` [rI, I], ``middle`` [rO, rI, *k], ``last`` [O, rO]."""

    first: Tensor
    middle: Tensor
    last: Tensor
    first_gain: Optional[Tensor]    #: [rI]; None without batch normalization, and then all of the following
    middle_gain: Optional[Tensor]   #: [rO]
    first_var: Tensor
    middle_mean: Tensor
    middle_var: Tensor
    bias: Optional[Tensor]          #: the original's own
    compact_weight: Tuple[nn.Parameter, ...]  #: the original's; its values mean nothing while it is expanded
    tap: Optional[Tuple[int, ...]]  #: where the kernel passes the input through; None without bypass

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.first_gain is not None and self.middle_gain is not None:
            return self._normalize_batch(x, self.first_gain, self.middle_gain)
        return self._run(self._pad(x), *self.compact())

    def _normalize_batch(self, x: Tensor, first_gain: Tensor, middle_gain: Tensor) -> Tensor:
        padded = self._pad(x)
        inner = self._point(padded, self.first)
        first_var, _ = self._statistics(inner, self.first_var, None)
        scale = first_gain * torch.rsqrt(first_var + _EPS)
        first = scale.unsqueeze(1) * self.first
        y = self._run(padded, torch.einsum("rs...,si->ri...", self.middle, first))
        middle_var, middle_mean = self._statistics(y, self.middle_var, self.middle_mean)
        last = self.last * (middle_gain * torch.rsqrt(middle_var + _EPS))
        y = self._point(y, last, None if self.bias is None else self.bias - last @ middle_mean)
        return y if self.tap is None else y + x

    def compact(self) -> Tuple[Tensor, Optional[Tensor]]:
        """Weight and bias of the layer that this one equals in evaluation mode: float32 at least, differentiable."""
        with torch.autocast(self.middle.device.type, enabled=False):
            first, last = self._scaled_ends()
            weight = _product(last, self.middle.to(first.dtype), first)
            if self.tap is not None:
                place: Tuple[Any, ...] = (slice(None), slice(None), *self.tap)
                weight[place].diagonal().add_(1)
            if self.bias is None or self.first_gain is None:
                return weight, None if self.bias is None else self.bias.to(weight.dtype)
            return weight, self.bias.to(weight.dtype) - last @ self.middle_mean.to(weight.dtype)

    def wide(self) -> Tuple[Tensor, Tensor, Tensor]:
        """The weights that are much larger than the layer."""
        return self.first, self.middle, self.last

    @property
    def weight(self) -> Tensor:
        """As :meth:`compact`; regularizers and pruning criteria read it."""
        return self.compact()[0]

    @torch.no_grad()
    def set_compact(self, weight: Tensor, bias: Optional[Tensor]) -> None:
        """Equal the layer with this weight and bias, by the smallest change of ``middle`` that does so."""
        now, now_bias = self.compact()
        first, last = (end.double() for end in self._scaled_ends())
        missing = weight.to(now).double() - now.double()
        left = torch.linalg.solve(last @ last.T, last).T
        right = torch.linalg.solve(first.T @ first, first.T)
        self.middle += _product(left, missing, right).to(self.middle)
        if self.bias is not None and bias is not None and now_bias is not None:
            self.bias += (bias.to(now_bias) - now_bias).to(self.bias)

    def _scaled_ends(self) -> Tuple[Tensor, Tensor]:
        """``first`` and ``last`` with the scales of the normalizations that follow and precede them."""
        dtype = torch.promote_types(self.first.dtype, torch.float32)
        first, last = self.first.to(dtype), self.last.to(dtype)
        if self.first_gain is None or self.middle_gain is None:
            return first, last
        scales = [gain.to(dtype) * torch.rsqrt(var.to(dtype) + _EPS)
                  for gain, var in ((self.first_gain, self.first_var), (self.middle_gain, self.middle_var))]
        return scales[0].unsqueeze(1) * first, last * scales[1]

    def _statistics(self, y: Tensor, running_var: Tensor, running_mean: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Variance and mean of each channel, float32; the running ones follow."""
        axis = y.dim() - len(self.middle.shape[2:]) - 1
        var, mean = torch.var_mean(y.float(), [d for d in range(y.dim()) if d != axis], correction=0)
        count = y.numel() // y.shape[axis]
        running_var.lerp_(var.detach().to(running_var) * (count / max(count - 1, 1)), _MOMENTUM)
        if running_mean is not None:
            running_mean.lerp_(mean.detach().to(running_mean), _MOMENTUM)
        return var, mean

    def _pad(self, x: Tensor) -> Tensor:
        """All padding, before anything else."""
        raise NotImplementedError

    def _run(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """The layer's own operation without its padding."""
        raise NotImplementedError

    def _point(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """A matrix applied at every position."""
        raise NotImplementedError

    # -- to state_dict() this is the layer that it equals

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in zip(("weight", "bias"), self.compact()):
            if value is not None:
                destination[prefix + name] = value.detach().to(self.middle.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: List[str], unexpected_keys: List[str], error_msgs: List[str]) -> None:
        names = ["weight"] + (["bias"] if self.bias is not None else [])
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys += [prefix + name for name in names if name not in found] if strict else []
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix)
                            and key[len(prefix):] not in names]
        if len(found) < len(names):
            return
        wanted = (self.last.shape[0], self.first.shape[1], *self.middle.shape[2:])
        if tuple(found["weight"].shape) != wanted:
            error_msgs.append("size mismatch for %sweight: the file has %s, the model %s" % (
                prefix, tuple(found["weight"].shape), wanted))
            return
        self.set_compact(found["weight"], found.get("bias"))


class _ExpandedConvolution(ExpandedLayer):
    def _pad(self, x: Tensor) -> Tensor:
        amounts = [amount for both in reversed(padding_of(self)) for amount in both]
        if not any(amounts):
            return x
        mode = str(self.padding_mode)
        return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)

    def _run(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        stride: Any = self.stride
        dilation: Any = self.dilation
        return _CONVOLVE[weight.dim() - 2](x, weight, bias, stride=stride, dilation=dilation)

    def _point(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        axes = self.middle.dim() - 2
        return _CONVOLVE[axes](x, weight.reshape(*weight.shape, *([1] * axes)), bias)


class ExpandedConv1d(_ExpandedConvolution, nn.Conv1d):  # type: ignore[override]
    """An expanded ``nn.Conv1d``."""


class ExpandedConv2d(_ExpandedConvolution, nn.Conv2d):  # type: ignore[override]
    """An expanded ``nn.Conv2d``."""


class ExpandedConv3d(_ExpandedConvolution, nn.Conv3d):  # type: ignore[override]
    """An expanded ``nn.Conv3d``."""


class ExpandedLinear(ExpandedLayer, nn.Linear):  # type: ignore[override, misc]
    """An expanded ``nn.Linear``."""

    def _pad(self, x: Tensor) -> Tensor:
        return x

    def _run(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return F.linear(x, weight, bias)

    def _point(self, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return F.linear(x, weight, bias)


EXPANDED: Dict[Type[nn.Module], Type[ExpandedLayer]] = {
    nn.Conv1d: ExpandedConv1d, nn.Conv2d: ExpandedConv2d, nn.Conv3d: ExpandedConv3d, nn.Linear: ExpandedLinear}


def _product(last: Tensor, middle: Tensor, first: Tensor) -> Tensor:
    """last [O, R] times middle [R, S, ...] times first [S, I], the shorter way round.

    Where both are equally long, the one that multiplies ``middle`` as it lies in memory.
    """
    if last.shape[0] <= first.shape[1]:
        return torch.einsum("os...,si->oi...", torch.einsum("or,rs...->os...", last, middle), first).contiguous()
    return torch.einsum("or,ri...->oi...", last, torch.einsum("rs...,si->ri...", middle, first))


def padding_of(layer: Any) -> List[Tuple[int, int]]:
    """Padding of a convolution before and after each axis."""
    if layer.padding == "same":
        totals = [dilation * (extent - 1) for dilation, extent in zip(layer.dilation, layer.kernel_size)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(0, 0)] * len(layer.kernel_size) if layer.padding == "valid" else [(p, p) for p in layer.padding]
