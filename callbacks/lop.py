"""Linear over-parameterization (ExpandNets): train a wider model, deploy the small one it equals."""
from __future__ import annotations

import copy
import logging
import os
from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from slimtrain.callbacks.expanded import EXPANDED, ExpandedLayer
from slimtrain.callbacks.expansion import expand_layer, merge_layer, start_layers
from slimtrain.callbacks.factors import shared_weights, why_dense
from slimtrain.callbacks.layers import layer_kind, weight_count
from slimtrain.core import ExpandedLine, select
from slimtrain.proto import save_parameterless

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class LOP:
    """Expands the convolutions of a model into linear chains for training, and merges them back.

    The expanded model's ``state_dict()`` is that of the small one; :meth:`state_dict` here holds what resumes the
    expanded training.

    Args:
        model: the small model. It stays as it is unless it is expanded in place.

    Raises:
        TypeError: ``model`` is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        self.model = model
        #: every layer with weights and what became of it
        self.report: Tuple[ExpandedLine, ...] = ()
        self._expanded: Optional[nn.Module] = None

    @staticmethod
    def check(expand_rate: int) -> None:
        """Refuse a bad rate before there is a model.

        Raises:
            ValueError: ``expand_rate`` is no integer of at least 1.
        """
        if isinstance(expand_rate, bool) or not isinstance(expand_rate, int) or expand_rate < 1:
            raise ValueError("expand_rate must be an integer of at least 1, got %r" % (expand_rate,))

    def linear_expand_layers(self, expand_rate: int, compress_params_file: Optional[PathLike],
                             add_batchnorm: bool = True, add_bypass: bool = True, append: bool = False, *,
                             in_place: bool = False, skip_layers: Collection[str] = (), expand_pointwise: bool = False,
                             expand_linear: bool = False, keep_weights: bool = False) -> nn.Module:
        """Expand the layers of one group with kernels of more than one position.

        Args:
            expand_rate: channels in between over channels of the layer, at least 1; 2 to 16 are usual.
            compress_params_file: made without an algorithm, so that a later one can append to it; None makes none.
            add_batchnorm: normalize in between.
            add_bypass: add a layer's input to its output where they have one shape.
            append: the file exists already, of an earlier algorithm, and is left as it is.
            in_place: expand the model itself instead of a copy.
            skip_layers: names or patterns (``features.*``) of layers to leave.
            expand_pointwise, expand_linear: 1x1 convolutions and linear layers too.
            keep_weights: start from the model's weights; otherwise expanded layers start at random.

        Returns:
            the model to train.

        Raises:
            ValueError: a bad rate, a name that matches no layer, nothing to expand, layers that are expanded already.
            ParameterFileError: there is nothing to append to.
            OSError: the file cannot be written; the model is as it was.
        """
        self.check(expand_rate)
        reasons = _reasons(self.model, [name for name in skip_layers if name], expand_pointwise, expand_linear)
        if all(reasons.values()):
            raise ValueError("nothing to expand (%s)" % ("; ".join("%s: %s" % item for item in reasons.items())
                                                         or "no layer with weights was found"))
        if compress_params_file is not None:
            save_parameterless(compress_params_file, append)
        expanded = self.model if in_place else copy.deepcopy(self.model)
        modules = dict(expanded.named_modules())
        before = {name: weight_count(modules[name]) for name in reasons}
        for name, reason in reasons.items():
            if not reason:
                expand_layer(modules[name], expand_rate, add_batchnorm, add_bypass)
        start_layers([module for module in modules.values() if isinstance(module, ExpandedLayer)], keep_weights)
        self._expanded = expanded
        self.report = tuple(
            ExpandedLine(name, layer_kind(modules[name]), (before[name], weight_count(modules[name])),
                         getattr(modules[name], "tap", None) is not None, reason) for name, reason in reasons.items())
        logger.info("expanded %d of %d layers", sum(not reason for reason in reasons.values()), len(reasons))
        return expanded

    def linear_merge_layers(self, *, in_place: bool = False) -> nn.Module:
        """The small model that the expanded one equals in evaluation mode.

        Args:
            in_place: merge the expanded model itself instead of a copy; its training is over then.

        Raises:
            RuntimeError: nothing has been expanded.
        """
        model = self._model()
        # merging drops the wide weights, the bulk of the model, and fills the small ones: neither need be copied
        unread: Dict[int, Tensor] = {}
        for layer in self._layers().values():
            unread.update((id(value), value) for value in layer.wide())
            unread.update((id(value), nn.Parameter(torch.empty_like(value), value.requires_grad))
                          for value in layer.compact_weight)
        merged = model if in_place else copy.deepcopy(model, unread)
        for module in list(merged.modules()):
            if isinstance(module, ExpandedLayer):
                merge_layer(module)
        if in_place:
            self._expanded = None
        return merged

    def state_dict(self) -> Dict[str, Dict[str, Tensor]]:
        """The parameters and statistics of every expanded layer, as plain tensors."""
        return {name: {key: value.detach().clone() for key, value in _tensors(layer).items()}
                for name, layer in self._layers().items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            RuntimeError: nothing has been expanded.
            ValueError: the state is of other layers, or of another rate or other options.
        """
        layers = self._layers()
        if set(state) != set(layers):
            raise ValueError("the saved state is of other layers than those expanded here: %s" % ", ".join(
                sorted(set(state) ^ set(layers))))
        for name, layer in layers.items():
            here = {key: tuple(value.shape) for key, value in _tensors(layer).items()}
            saved = {key: tuple(value.shape) for key, value in state[name].items()}
            if here != saved:
                raise ValueError("layer %r was expanded otherwise when it was saved: it had %s, it has %s. Use the "
                                 "same expand_rate and add_batchnorm" % (name, saved, here))
        with torch.no_grad():
            for name, layer in layers.items():
                for key, value in _tensors(layer).items():
                    value.copy_(state[name][key])

    def _model(self) -> nn.Module:
        if self._expanded is None:
            raise RuntimeError("nothing is expanded: call linear_expand_layers first")
        return self._expanded

    def _layers(self) -> Dict[str, ExpandedLayer]:
        return {name: module for name, module in self._model().named_modules() if isinstance(module, ExpandedLayer)}


def _tensors(layer: nn.Module) -> Dict[str, Tensor]:
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _reasons(model: nn.Module, skip: Collection[str], pointwise: bool, linear: bool) -> Dict[str, str]:
    """Every layer with weights, and why it is not expanded; "" when it is."""
    weighted = {name: module for name, module in model.named_modules() if weight_count(module)}
    if any(isinstance(module, ExpandedLayer) for module in weighted.values()):
        raise ValueError("the model is expanded already: merge it first")
    skipped = set(select(list(weighted), skip)) if skip else set()
    shared = shared_weights(weighted)
    return {name: "named in skip_layers" if name in skipped else _why_not(module, pointwise, linear) or shared[name]
            for name, module in weighted.items()}


def _why_not(module: Any, pointwise: bool, linear: bool) -> str:
    reason = why_dense(module)
    if reason or type(module) not in EXPANDED:
        return reason
    if isinstance(module, nn.Linear):
        return "" if linear else "linear layers are expanded with expand_linear=True only"
    wide: List[int] = [extent for extent in module.kernel_size if extent > 1]
    return "" if wide or pointwise else "1x1 convolutions are expanded with expand_pointwise=True only"
