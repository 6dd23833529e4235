"""The structure of a decomposed model: read from it or from its weights, given to another one, and undone."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple, Type, TypeVar

from torch import nn

from slimtrain.callbacks.factors import LowRankChain, dense_layer, empty_chain, replace_everywhere
from slimtrain.callbacks.layers import weight_count

#: layer name -> shapes of the weights that took its weight's place, as JSON has it
Structure = Dict[str, List[List[int]]]

_Model = TypeVar("_Model", bound=nn.Module)


def structure_of(model: nn.Module) -> Structure:
    """The chains of a model."""
    return {name: [list(shape) for shape in module.shapes()] for name, module in model.named_modules()
            if isinstance(module, LowRankChain)}


def structure_in(state_dict: Mapping[str, Any], model: nn.Module, prefix: str = "") -> Structure:
    """The chains that the weights of a checkpoint ask for.

    Args:
        state_dict: of a decomposed model.
        model: a model of its class, dense or decomposed: its layers are looked for.
        prefix: of the keys that are the model's.
    """
    found: Structure = {}
    for name in _layers(model):
        links: List[List[int]] = []
        while "%s%s.%d.weight" % (prefix, name, len(links)) in state_dict:
            links.append(list(state_dict["%s%s.%d.weight" % (prefix, name, len(links))].shape))
        if links:
            found[name] = links
    return found


def apply_structure(model: nn.Module, structure: Mapping[str, Sequence[Sequence[int]]]) -> nn.Module:
    """Give a model exactly these chains, so that the ``state_dict`` of the one they are from loads; in place.

    Chains that are there already stay the objects they are; chains that the structure has not become dense layers.

    Args:
        model: a model of the class that was decomposed.
        structure: of :func:`structure_of`, :func:`structure_in` or ``LowRankDecomposition.structure``.

    Returns:
        the model. The weights of new chains are random.

    Raises:
        ValueError: a layer does not exist, or cannot be such a chain.
    """
    layers = _layers(model)
    replacements: Dict[nn.Module, nn.Module] = {}
    for name, shapes in structure.items():
        if name not in layers:
            raise ValueError("the structure has a layer %r, which this %s has not" % (name, type(model).__name__))
        wanted = [tuple(shape) for shape in shapes]
        layer = layers[name]
        if not (isinstance(layer, LowRankChain) and layer.shapes() == wanted):
            replacements[layer] = _chain(name, layer, wanted)
    for name, layer in layers.items():
        if isinstance(layer, LowRankChain) and name not in structure:
            replacements[layer] = dense_layer(layer)
    replace_everywhere(model, replacements)
    return model


def restore_dense(model: nn.Module) -> nn.Module:
    """Multiply all factors out again: the model has its first architecture and computes the same; in place."""
    return apply_structure(model, {})


def load_decomposed(model_class: Type[_Model], checkpoint: Any, **arguments: Any) -> _Model:
    """``model_class.load_from_checkpoint`` for a checkpoint of a decomposed LightningModule.

    Args:
        model_class: the LightningModule's class.
        checkpoint: the file; with or without its callbacks' state.
        arguments: of ``load_from_checkpoint``.

    Returns:
        the module with its chains, an instance of ``model_class`` itself.
    """

    class Rebuilding(model_class):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            apply_structure(self, structure_in(state_dict, self))
            return super().load_state_dict(state_dict, *args, **kwargs)

    Rebuilding.__name__, Rebuilding.__qualname__ = model_class.__name__, model_class.__qualname__
    model: Any = Rebuilding.load_from_checkpoint(checkpoint, **arguments)
    model.__class__ = model_class
    return model


def _layers(model: nn.Module) -> Dict[str, nn.Module]:
    """Dense layers with weights, and chains."""
    links = {id(link) for module in model.modules() if isinstance(module, LowRankChain) for link in module}
    return {name: module for name, module in model.named_modules() if id(module) not in links
            and (isinstance(module, LowRankChain) or weight_count(module))}


def _chain(name: str, layer: nn.Module, shapes: List[Tuple[int, ...]]) -> nn.Module:
    try:
        return empty_chain(dense_layer(layer) if isinstance(layer, LowRankChain) else layer, shapes)
    except (ValueError, IndexError, AttributeError) as error:
        raise ValueError("layer %r, %s, cannot become a chain: %s" % (name, type(layer).__name__, error)) from error
