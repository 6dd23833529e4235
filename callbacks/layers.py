"""Which layers of a model can run in int8, and why the others cannot."""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtrain.core import has_small_groups, select


class LayerChoice(NamedTuple):
    """The parameterised layers of a model."""

    quantized: Dict[str, nn.Module]  #: name -> layer, in the order of the model
    left_float: Dict[str, str]       #: name -> reason


def choose_layers(model: nn.Module, skip: Collection[str],
                  reason_for: Optional[Callable[[nn.Module], str]] = None) -> LayerChoice:
    """Split the parameterised layers of a model into quantized and float ones.

    Args:
        model: the model.
        skip: names or patterns (``features.*``) of layers that the user wants to keep float.
        reason_for: why a layer has to stay float, "" if it need not; :func:`why_float` when None.

    Raises:
        ValueError: an entry of ``skip`` names no layer; weights are not finite; no layer can be quantized.
    """
    weighted = {name: module for name, module in model.named_modules() if weight_count(module)}
    skipped = set(select(list(weighted), list(skip))) if skip else set()
    quantized: Dict[str, nn.Module] = {}
    left_float: Dict[str, str] = {}
    seen: Set[Tuple[int, int]] = set()
    for name, module in weighted.items():
        reason = "named in skip_quant_layers" if name in skipped else (reason_for or why_float)(module)
        if not reason and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            reason = "torch runs it inside the one operation that is the whole attention"
        if reason:
            left_float[name] = reason
        elif (id(module.weight), id(module.bias)) not in seen:  # a tied layer without a bias is the same layer
            _check_finite(name, module.weight)
            quantized[name] = module
            seen.add((id(module.weight), id(module.bias)))
    if not quantized:
        found = "; ".join("%s: %s" % item for item in left_float.items()) or "no layer with weights was found"
        raise ValueError("nothing to quantize (%s). Layers made in LightningModule.setup do not exist yet when a "
                         "callback is set up: make them in __init__ or configure_model" % found)
    return LayerChoice(quantized, left_float)


def _check_finite(name: str, weight: Any) -> None:
    broken = int((~torch.isfinite(weight.detach())).sum())
    if broken:
        raise ValueError("%d of the %d weights of layer %r are not finite" % (broken, weight.numel(), name))


def why_float(module: nn.Module) -> str:
    """The reason why MNN cannot run a layer in int8; "" when it can."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        return "MNN has no int8 %s" % type(module).__name__
    if parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), Tensor):
        return "its weight is computed from other parameters; remove the parametrization first"
    if not isinstance(module, nn.Linear) and has_small_groups(module.in_channels, module.out_channels, module.groups):
        return "MNN takes a convolution with so small groups apart into float ones"
    return ""


def layer_kind(module: nn.Module) -> str:
    """What a person calls the layer: ``Conv2d 3x3``, ``Linear``."""
    kernel: List[int] = list(getattr(module, "kernel_size", ()))
    return " ".join([type(module).__name__] + (["x".join(map(str, kernel))] if kernel else []))


def weight_count(module: nn.Module) -> int:
    """Number of weights a layer multiplies with (biases and the affine of a norm are not compressed)."""
    if isinstance(module, parametrize.ParametrizationList):
        return 0  # counted where they are used
    computed = [getattr(module, name) for name in getattr(module, "parametrizations", ())]
    return sum(each.numel() for each in (*module.parameters(recurse=False), *computed) if each.dim() >= 2)


def is_depthwise(module: nn.Module) -> bool:
    """Whether MNN runs a convolution with its depthwise kernel (one channel to one channel counts as such)."""
    groups = getattr(module, "groups", None)
    return groups is not None and groups == module.in_channels == module.out_channels
