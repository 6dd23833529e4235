"""Cross-layer equalisation of a PyTorch model: its chains of layers with at most a batch norm and a ReLU in between."""
from __future__ import annotations

import logging
from collections import Counter
from itertools import groupby
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.layers import is_depthwise
from slimtrain.callbacks.recording import Recorder
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import ChainLayer, equalizable_chains, equalize_chain, fold_factor

logger = logging.getLogger(__name__)


class ChainRecorder(Recorder):
    """Records one run for the chains in it."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__({id(module.running_mean): name for name, module in modules.items()
                          if isinstance(getattr(module, "running_mean", None), Tensor)})
        self._modules = modules

    def leave(self, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        if mark is not None:
            self._outputs.append(str(mark.serial))
        return value

    def chains(self) -> List[Tuple[Tuple[str, str], ...]]:
        """Names of (layer, batch norm behind it or "") in a row."""
        modules = self._modules
        norms = list(self._folded.values())
        holders = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())

        def is_tied(module: nn.Module) -> bool:
            return any(holders[id(value)] > 1 for value in module._parameters.values() if value is not None)

        def usable(link: ChainLayer) -> bool:
            layer: Any = modules[link.layer]
            if is_tied(layer) or (getattr(layer, "groups", 1) > 1 and not is_depthwise(layer)):
                return False
            norm = self._folded.get(link.batch_norm, "")
            return not link.batch_norm or (norms.count(norm) == 1 and _is_affine(modules.get(norm))
                                           and not is_tied(modules[norm]))

        found = equalizable_chains(self._ops, self._outputs, usable)
        named = [[(link.layer, self._folded.get(link.batch_norm, "")) for link in chain] for chain in found]
        # a linear layer behind a convolution reads its last axis, not its channels
        parts = [tuple(part) for chain in named for _, part in groupby(chain, lambda pair: type(modules[pair[0]]))]
        return [part for part in parts if len(part) > 1]


def equalize(modules: Mapping[str, nn.Module], chains: Sequence[Sequence[Tuple[str, str]]]) -> None:
    """Let the layers of each chain trade the ranges of their channels, in place; the model computes what it did.

    Args:
        modules: all modules of the model by name.
        chains: names of (layer, batch norm behind it or ""), in order.
    """
    for chain in chains:
        layers = [modules[name] for name, _ in chain]
        norms = [modules[name] if name else None for _, name in chain]
        factors = equalize_chain([_folded(layer, norm) for layer, norm in zip(layers, norms)], [None] * len(chain),
                                 [is_depthwise(layer) for layer in layers]).factors
        with torch.no_grad():
            for index, (layer, norm) in enumerate(zip(layers, norms)):
                if index:
                    _scale_inputs(layer, factors[index - 1])
                if index + 1 < len(chain):
                    _divide_outputs(layer if norm is None else norm, factors[index])
        logger.info("equalized %s", ", ".join(name for name, _ in chain))


def _is_affine(norm: Optional[nn.Module]) -> bool:
    values = [getattr(norm, name, None) for name in ("weight", "bias", "running_var")]
    return all(isinstance(value, Tensor) for value in values)


def _folded(layer: Any, norm: Any) -> np.ndarray:
    """The weight that is deployed: with the batch norm behind it."""
    weight: np.ndarray = layer.weight.detach().double().cpu().numpy()
    if norm is None:
        return weight
    gamma, variance = (value.detach().double().cpu().numpy() for value in (norm.weight, norm.running_var))
    return weight * fold_factor(gamma, variance, norm.eps).reshape((-1,) + (1,) * (weight.ndim - 1))


def _divide_outputs(module: Any, factor: np.ndarray) -> None:
    """Divide the outputs of a layer, or of the batch norm behind it."""
    is_norm = module.weight.dim() == 1
    columns = factor if is_norm else factor.reshape((-1,) + (1,) * (module.weight.dim() - 1))
    _multiply(module.weight, 1 / columns)
    if module.bias is not None:
        _multiply(module.bias, 1 / factor)


def _scale_inputs(layer: Any, factor: np.ndarray) -> None:
    axis = 0 if is_depthwise(layer) else 1
    shape = [1] * layer.weight.dim()
    shape[axis] = -1
    _multiply(layer.weight, factor.reshape(shape))


def _multiply(parameter: Tensor, factor: np.ndarray) -> None:
    parameter.copy_(parameter.double() * torch.from_numpy(factor).to(parameter.device))
