"""Turning layers into expanded ones and back, without changing which objects they are."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, List, Literal, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.expanded import _EPS, EXPANDED, ExpandedLayer, padding_of
from slimtrain.callbacks.model_view import float_view
from slimtrain.core import identity_tap

_BUFFERS = ("first_var", "middle_mean", "middle_var")


def expand_layer(layer: Any, rate: int, add_batchnorm: bool, add_bypass: bool) -> None:
    """Make a layer an expanded one, in place; what its weights are is up to :func:`start_layers`.

    Args:
        layer: nn.Linear or nn.Conv1d, 2d, 3d of one group.
        rate: channels in between over channels of the layer.
        add_batchnorm: normalize in between.
        add_bypass: add the input to the output where they have one shape.
    """
    weight = layer.weight
    layer.tap = _tap(layer) if add_bypass else None
    layer.compact_weight = (weight,)  # in a tuple it is no parameter; merging brings the very object back
    del layer._parameters["weight"]
    layer.__class__ = EXPANDED[type(layer)]
    outputs, inputs, extents = weight.shape[0], weight.shape[1], weight.shape[2:]
    for name, shape in (("first", (rate * inputs, inputs)), ("middle", (rate * outputs, rate * inputs, *extents)),
                        ("last", (outputs, rate * outputs))):
        layer.register_parameter(name, nn.Parameter(weight.new_empty(shape), weight.requires_grad))
    _add_normalizations(layer, rate * inputs, rate * outputs, add_batchnorm)


def start_layers(layers: Sequence[ExpandedLayer], keep_weights: bool) -> None:
    """Give expanded layers the weights that training starts from.

    A normalized chain does not notice the scale of its weights, but their steps are the longer the smaller they are:
    torch's own start, several times smaller than this one, trains to worse nets. The last weight keeps activations at
    the size at which a ReLU expects them.

    Args:
        layers: what :func:`expand_layer` made.
        keep_weights: compute the same in evaluation mode as before they were expanded; otherwise start at random.
    """
    weights: List[Tuple[Tensor, Literal["fan_in", "fan_out"]]] = []
    for layer in layers:
        weights += [(layer.first, "fan_out"), (layer.middle, "fan_out"), (layer.last, "fan_in")]
    # torch draws a tensor's numbers on one core, and those of two tensors from one generator one after the other
    sources = [torch.Generator().manual_seed(seed) if weight.is_cpu else None
               for seed, (weight, _) in zip(torch.randint(2 ** 62, (len(weights),)).tolist(), weights)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        waiting = [pool.submit(nn.init.kaiming_normal_, weight, mode=mode, nonlinearity="relu", generator=source)
                   for source, (weight, mode) in zip(sources, weights)]
        for done in waiting:
            done.result()
    if keep_weights:
        for layer in layers:
            bias = layer.bias
            layer.set_compact(layer.compact_weight[0].detach(), None if bias is None else bias.detach().clone())


def merge_layer(layer: Any) -> None:
    """Undo :func:`expand_layer`: the plain layer that it equals in evaluation mode, with the original parameters."""
    with torch.no_grad():
        weight, bias = layer.compact()
    original, own_bias = layer.compact_weight[0], layer.bias
    layer.__class__ = next(plain for plain, expanded in EXPANDED.items() if expanded is type(layer))
    del layer.compact_weight, layer.tap
    layer._parameters.clear()
    for name in _BUFFERS:
        del layer._buffers[name]
    original.data = weight.detach().to(original.dtype)
    layer.register_parameter("weight", original)
    layer.register_parameter("bias", own_bias)
    if bias is not None:
        own_bias.data = bias.detach().to(own_bias.dtype)


def merged_view(model: nn.Module) -> nn.Module:
    """The small model that an expanded one equals in evaluation mode, beside it.

    What an exporter does to it does not reach the model that is being trained. Layers that are not expanded share their
    parameters.
    """
    view = float_view(model)
    for module in list(view.modules()):
        if isinstance(module, ExpandedLayer):
            layer: Any = module
            layer.compact_weight = tuple(nn.Parameter(torch.empty_like(weight)) for weight in layer.compact_weight)
            if layer.bias is not None:
                layer._parameters["bias"] = nn.Parameter(layer.bias.detach().clone())
            merge_layer(layer)
    return view


def _add_normalizations(layer: ExpandedLayer, inner: int, outer: int, present: bool) -> None:
    like = layer.first
    for name, count in (("first_gain", inner), ("middle_gain", outer)):
        layer.register_parameter(name, nn.Parameter(like.new_ones(count)) if present else None)
    for name, value in (("first_var", like.new_ones(inner) - _EPS), ("middle_mean", like.new_zeros(outer)),
                        ("middle_var", like.new_ones(outer) - _EPS)):
        layer.register_buffer(name, value if present else None)


def _tap(layer: Any) -> Optional[Tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        return () if layer.in_features == layer.out_features else None
    if layer.in_channels != layer.out_channels:
        return None
    return identity_tap(layer.kernel_size, layer.stride, padding_of(layer), layer.dilation)
