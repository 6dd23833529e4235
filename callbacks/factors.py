"""Torch layers and chains of them: taken apart, put together again, built empty from ranks alone."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple, Type

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtrain.core import axis_owners, compose_chain

#: nn.Linear, or nn.Conv1d, 2d or 3d, which have no common base that declares their attributes
Layer = Any
Shape = Tuple[int, ...]

_CONVOLUTIONS: Dict[int, Type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_dense(module: nn.Module) -> str:
    """Why a layer with weights cannot be written as a chain of layers; "" when it can."""
    known = type(module) in (nn.Linear, *_CONVOLUTIONS.values())
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList) or (
            known and not isinstance(module._parameters.get("weight"), Tensor)):  # torch's older weight norms
        return "its weight is computed from other parameters; remove the parametrization first"
    if not known:
        return "%s has no chain of plain layers" % type(module).__name__
    if getattr(module, "groups", 1) != 1:
        return "it is grouped (%s groups): its channels are factorized already" % module.groups
    return ""


def shared_weights(layers: Mapping[str, nn.Module]) -> Dict[str, str]:
    """For each layer the reason not to replace its weight: other layers hold it too; "" for its own."""
    owners: Dict[int, List[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(getattr(layer, "weight", layer)), []).append(name)
    others = {name: [other for other in group if other != name] for group in owners.values() for name in group}
    return {name: "its weight is also that of %s" % ", ".join(found) if found else ""
            for name, found in others.items()}


def stride_of(layer: Layer) -> Shape:
    """The stride per axis; () for a linear layer."""
    return tuple(layer.stride) if not isinstance(layer, nn.Linear) else ()


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what the layer computes."""
    return any(getattr(module, name) for name in _HOOKS)


def array_of(weight: Tensor) -> np.ndarray:
    """A tensor as a float32 (or float64) array of its own."""
    value = weight.detach().cpu()
    return np.array(value.numpy() if value.dtype in (torch.float32, torch.float64) else value.float().numpy())


class LowRankChain(nn.Sequential):
    """Smaller layers in the place of one; its ``state_dict`` is that of any ``nn.Sequential``."""

    def shapes(self) -> List[Shape]:
        """The weights' shapes."""
        links: List[Layer] = list(self)
        return [tuple(link.weight.shape) for link in links]


def empty_chain(layer: Layer, shapes: Sequence[Shape]) -> LowRankChain:
    """The chain of weights of these shapes that takes the place of ``layer``, with random weights.

    Raises:
        ValueError: such a chain has another shape than the layer.
    """
    owners = axis_owners(shapes)
    wanted, ends = tuple(layer.weight.shape), (shapes[-1][0], shapes[0][1])
    extents = tuple(shapes[owner][2 + axis] for axis, owner in enumerate(owners))
    fits = all(len(shape) == len(wanted) for shape in shapes) and all(
        before[0] == after[1] for before, after in zip(shapes, shapes[1:]))
    if not fits or ends + extents != wanted:
        raise ValueError("weights of shapes %s are no chain for one of shape %s" % (list(shapes), wanted))
    return LowRankChain(*(_link(layer, shape, [owner == index for owner in owners], bias=index == len(shapes) - 1)
                          for index, shape in enumerate(shapes))).train(layer.training)


def filled_chain(layer: Layer, factors: Sequence[np.ndarray]) -> LowRankChain:
    """The chain of the given factors, frozen like ``layer`` and with its bias."""
    chain = empty_chain(layer, [factor.shape for factor in factors])
    links: List[Layer] = list(chain)
    with torch.no_grad():
        for link, factor in zip(links, factors):
            link.weight.copy_(torch.from_numpy(factor))
            link.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        links[-1].bias = layer.bias
    return chain


def dense_layer(chain: LowRankChain) -> Layer:
    """The one layer that a chain equals."""
    links: List[Layer] = list(chain)
    weight = compose_chain([array_of(link.weight) for link in links])
    first, last = links[0], links[-1]
    options: Dict[str, Any] = {"bias": last.bias is not None, "device": last.weight.device, "dtype": last.weight.dtype}
    if isinstance(first, nn.Linear):
        layer: Layer = nn.Linear(first.in_features, last.out_features, **options)
    else:
        layer = type(first)(first.in_channels, last.out_channels, weight.shape[2:], **_settings(links), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    layer.weight.requires_grad_(last.weight.requires_grad)
    if last.bias is not None:
        layer.bias = last.bias
    return layer.train(chain.training)


def replace_everywhere(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, under every name they have in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _link(layer: Layer, shape: Shape, owns: List[bool], bias: bool) -> Layer:
    """One layer of the chain; along the axes that it owns it has the original's stride, padding and dilation."""
    options: Dict[str, Any] = {"bias": bias and layer.bias is not None, "device": layer.weight.device,
                               "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(shape[1], shape[0], **options)

    def own(values: Any, otherwise: int) -> Any:
        return tuple(value if mine else otherwise for value, mine in zip(values, owns))

    # a padding by name means the same for every part: "same" pads an axis of one tap by nothing
    padding = layer.padding if isinstance(layer.padding, str) else own(layer.padding, 0)
    mode = layer.padding_mode if any(owns) else "zeros"
    return _CONVOLUTIONS[len(owns)](
        shape[1], shape[0], shape[2:], stride=own(layer.stride, 1), padding=padding, dilation=own(layer.dilation, 1),
        padding_mode=mode, **options)


def _settings(links: Sequence[Layer]) -> Dict[str, Any]:
    """Stride, padding and dilation of the convolution that the links equal."""
    owners = axis_owners([tuple(link.weight.shape) for link in links])
    by_name = links[0].padding
    return {
        "stride": tuple(links[owner].stride[axis] for axis, owner in enumerate(owners)),
        "dilation": tuple(links[owner].dilation[axis] for axis, owner in enumerate(owners)),
        "padding": by_name if isinstance(by_name, str) else tuple(
            links[owner].padding[axis] for axis, owner in enumerate(owners)),
        "padding_mode": next((link.padding_mode for link in links if link.padding_mode != "zeros"), "zeros"),
    }
