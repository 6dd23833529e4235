"""Which layers can be pruned, and why the others are left."""
from __future__ import annotations

from typing import Collection, Dict, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtrain.callbacks.layers import weight_count
from slimtrain.core import select


class PrunableLayers(NamedTuple):
    """The parameterised layers of a model, in its order."""

    layers: Dict[str, nn.Module]  #: name -> layer with a weight [out_channels, ...]
    left: Dict[str, str]          #: name -> reason


class LayerSparsity(NamedTuple):
    """One line of a pruner's report."""

    name: str
    parameters: int   #: number of weights
    ratio: float      #: share of them that is pruned
    reason: str       #: why it is not, or not fully, subject to pruning; ""


def prunable_layers(model: nn.Module, skip: Collection[str], skip_first: bool = False,
                    skip_last: bool = False) -> PrunableLayers:
    """Split the parameterised layers of a model.

    Args:
        model: the model.
        skip: names or patterns (``features.*``) of layers to leave alone.
        skip_first, skip_last: leave the first or last prunable layer alone, in the order of ``named_modules``.

    Raises:
        ValueError: an entry of ``skip`` names no layer; nothing is left to prune.
    """
    weighted = {name: module for name, module in model.named_modules() if weight_count(module)}
    skipped = dict.fromkeys(select(list(weighted), list(skip)), "named in skip_layers") if skip else {}
    left = {name: skipped.get(name) or why_not(module) for name, module in weighted.items()}
    owners: Dict[int, str] = {}
    for name, module in weighted.items():
        owner = name if left[name] else owners.setdefault(id(module.weight), name)
        left[name] = left[name] if owner == name else "its weight is that of %s and pruned there" % owner
    layers = {name: module for name, module in weighted.items() if not left[name]}
    names = list(layers)
    for wanted, name, reason in ((skip_first, names[:1], "the first layer"), (skip_last, names[-1:], "the last layer")):
        if wanted and name:
            layers.pop(name[0], None)
            left[name[0]] = reason
    if not layers:
        found = "; ".join("%s: %s" % item for item in left.items()) or "no layer with weights was found"
        raise ValueError("nothing to prune (%s)" % found)
    return PrunableLayers(layers, {name: reason for name, reason in left.items() if reason})


def why_not(module: nn.Module) -> str:
    """The reason why single weights of a layer are not pruned; "" when they can be."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        return "%s has no sparse form in MNN" % type(module).__name__
    if parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), Tensor):
        return "its weight is computed from other parameters; remove the parametrization first"
    if getattr(module, "groups", 1) > 1:
        return "a grouped convolution has few weights per channel, and MNN stores them dense"
    return ""
