"""What quantization does to each layer of a model, on an example: ranges and what they cut, and the error it makes."""
from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.factors import array_of
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.qat_quantizer import QATQuantizer
from slimtrain.callbacks.weight_quantizer import WeightQuantizer
from slimtrain.core import LayerStatistics, SeenLayer, quantization_statistics, range_of


def layer_statistics(quantizer: Union[QATQuantizer, WeightQuantizer], example: Any) -> LayerStatistics:
    """Run the float model and the simulation on an example, and compare them layer by layer.

    Args:
        quantizer: trained or calibrated; the model is left as it was.
        example: a tensor, a tuple of positional or a dict of keyword arguments.
    """
    present = quantizer.is_attached
    quantizer.detach()
    plain = _run(quantizer, example)
    quantizer.attach()
    simulated = _run(quantizer, example)
    if not present:
        quantizer.detach()
    if isinstance(quantizer, WeightQuantizer):
        return quantization_statistics(_stored(quantizer, plain, simulated))
    return quantization_statistics(_quantized(quantizer, plain, simulated))


def _quantized(quantizer: QATQuantizer, plain: _Seen, simulated: _Seen) -> Dict[str, SeenLayer]:
    seen = {}
    for layer in quantizer.deployed_layers():
        own = quantizer.scales[layer.name]
        trained = array_of(quantizer.layers[layer.name].weight)  # type: ignore[arg-type]
        seen[layer.name] = SeenLayer(
            trained, plain.inputs.get(layer.name), plain.outputs.get(layer.name), simulated.outputs.get(layer.name),
            range_of(own.weight_scale().max().item(), own.weight_grid), range_of(layer.input_scale, layer.input_grid))
    return seen


def _stored(quantizer: WeightQuantizer, plain: _Seen, simulated: _Seen) -> Dict[str, SeenLayer]:
    return {name: SeenLayer(array_of(layer.weight), None, plain.outputs.get(name),  # type: ignore[arg-type]
                            simulated.outputs.get(name)) for name, layer in quantizer.layers.items()}


class _Seen(NamedTuple):
    inputs: Dict[str, np.ndarray]
    outputs: Dict[str, np.ndarray]


def _run(quantizer: Union[QATQuantizer, WeightQuantizer], example: Any) -> _Seen:
    args, kwargs = arguments(example)
    seen = _Seen({}, {})
    # with gradients the simulation computes layer by layer; without, as the device does, with everything fused
    with unnoticed(quantizer.model), evaluation(quantizer.model), torch.enable_grad(), _watching(quantizer, seen):
        quantizer.model(*args, **kwargs)
    return seen


@contextlib.contextmanager
def _watching(quantizer: Union[QATQuantizer, WeightQuantizer], seen: _Seen) -> Iterator[None]:
    handles: List[Any] = []
    for name, layer in quantizer.layers.items():
        def look(_: nn.Module, given: Any, output: Any, name: str = name) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                seen.inputs[name], seen.outputs[name] = _unseen(given[0]), _unseen(output)
        handles.append(layer.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unseen(value: Tensor) -> np.ndarray:
    """The numbers of a tensor, read without the simulation noticing a reader."""
    with torch._C.DisableTorchFunction():  # torch has no public way to step out of a function mode
        copy: np.ndarray = value.detach().float().cpu().numpy().copy()
        return copy
