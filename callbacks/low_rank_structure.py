"""The structure of a decomposed model: made from a plan alone, kept with a checkpoint, and undone."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Tuple, cast

from torch import nn

from slimtrain.callbacks.factors import dense_layer, empty_chain, replace_everywhere
from slimtrain.core import Factorization

#: layer name -> {"factorization": str, "ranks": [int, ...]}, as JSON has it
Structure = Dict[str, Dict[str, Any]]


def apply_structure(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give a dense model the layers of a decomposed one, so that its ``state_dict`` loads; in place.

    A layer that is a chain already, of the same shapes, stays.

    Args:
        model: a model of the class that was decomposed.
        structure: what ``LowRankDecomposition.structure`` gave.

    Returns:
        the model. The weights of the chains are random.

    Raises:
        ValueError: a layer does not exist, or cannot have these ranks.
    """
    layers = dict(model.named_modules())
    chains = {}
    for name, plan in structure.items():
        if name not in layers:
            raise ValueError("the structure has a layer %r, which this %s has not" % (name, type(model).__name__))
        chains[layers[name]] = _chain(name, layers[name], plan)
    replace_everywhere(model, chains)
    return model


def restore_dense(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Multiply the factors out again: the model has its first architecture and computes the same; in place.

    Raises:
        ValueError: a layer of the structure is no chain in this model.
    """
    layers = dict(model.named_modules())
    for name in structure:
        if not isinstance(layers.get(name), nn.Sequential):
            raise ValueError("the structure has a chain %r, which this %s has not" % (name, type(model).__name__))
    replace_everywhere(model, {layers[name]: dense_layer(cast(nn.Sequential, layers[name])) for name in structure})
    return model


def _chain(name: str, layer: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    dense = dense_layer(layer) if isinstance(layer, nn.Sequential) else layer
    try:
        chain = empty_chain(dense, Factorization(plan["factorization"]), tuple(plan["ranks"]))
    except (ValueError, AttributeError) as error:
        raise ValueError("layer %r, %s, cannot become a chain of ranks %s: %s" % (
            name, type(layer).__name__, list(plan["ranks"]), error)) from error
    return layer if isinstance(layer, nn.Sequential) and _shapes(layer) == _shapes(chain) else chain


def _shapes(chain: nn.Sequential) -> List[Tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in chain.parameters()]
