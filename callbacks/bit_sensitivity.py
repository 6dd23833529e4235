"""How much a network minds each width of each layer: one layer quantized at a time, all others float."""
from __future__ import annotations

import contextlib
from typing import Any, Callable, Collection, Dict, Iterator, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.layers import choose_layers, weight_count
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.operations import tensors_in
from slimtrain.callbacks.weight_quantizer import WeightQuantizer, why_not_stored
from slimtrain.core import LayerState, WeightMode
from slimtrain.core.bit_choice import BitSensitivity
from slimtrain.proto.bit_sensitivity import NetworkRun, WeightSize, check_examples, measure_layers

#: a batch: the model's input (a tuple is several, a dict named ones), and what the loss compares its output with
Example = Tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


def weight_sensitivity(model: nn.Module, examples: Sequence[Example], loss: Loss, bits: Sequence[int] = (8, 6, 4, 3, 2),
                       *, mode: Union[str, WeightMode] = WeightMode.SYMMETRIC, skip_quant_layers: Collection[str] = (),
                       block_size: int = 0) -> BitSensitivity:
    """Store the weights of one layer at a time in few bits, and see what the network makes of it.

    Runs the model in evaluation mode ``1 + layers x widths`` times over all examples; it is left as it was.
    ``WeightQuantizer`` with ``layer_bits`` and ``skip_quant_layers`` of the plan that ``choose`` gives then stores the
    whole model.

    Args:
        model: a trained float model.
        examples: (input, target) pairs, best some hundred samples that the model was not trained with.
        loss: from the model's output and a target to a scalar, the mean over the batch.
        bits: the widths to try, 2 to 8.
        mode, skip_quant_layers, block_size: as for :class:`slimtrain.callbacks.WeightQuantizer`.

    Returns:
        the measurements, that of a layer left float among them.

    Raises:
        ValueError: no examples or widths; as ``WeightQuantizer``.
    """
    choice = choose_layers(model, skip_quant_layers, why_not_stored)

    def quantizer(layer: str, width: int) -> WeightQuantizer:
        others = [name for name in (*choice.quantized, *choice.left_float) if name != layer]
        return WeightQuantizer(model, width, mode=mode, skip_quant_layers=others, block_size=block_size)

    return _measured(model, choice.quantized, examples, loss, bits, LayerState.WEIGHT_ONLY, quantizer)


def int8_sensitivity(model: nn.Module, examples: Sequence[Example], loss: Loss, bits: Sequence[int] = (8,),
                     *, skip_quant_layers: Collection[str] = ()) -> BitSensitivity:
    """Run one layer at a time in int8, its scales calibrated on the examples, and see what the network makes of it.

    The file of a fully quantized layer holds 8 bits, whatever the width of its levels. So what there is to choose is
    which layers to skip: those whose ``skip_quant_layers`` the plan lists hurt more than they save.

    Args:
        model, examples, loss: as :func:`weight_sensitivity`.
        bits: widths of weights and activations to measure; a plan takes the widest, as narrower ones save nothing.
        skip_quant_layers: as for :class:`slimtrain.callbacks.LSQQuantizer`.

    Raises:
        ValueError: no examples or widths; as ``LSQQuantizer``.
    """
    choice = choose_layers(model, skip_quant_layers)

    def quantizer(layer: str, width: int) -> LSQQuantizer:
        others = [name for name in (*choice.quantized, *choice.left_float) if name != layer]
        made = LSQQuantizer(model, others, bits=width)
        made.calibrate([inputs for inputs, _ in examples])
        return made

    return _measured(model, choice.quantized, examples, loss, bits, LayerState.INT8, quantizer)


# -- inside


def _measured(model: nn.Module, layers: Dict[str, nn.Module], examples: Sequence[Example], loss: Loss,
              bits: Sequence[int], state: LayerState, quantizer: Callable[[str, int], Any]) -> BitSensitivity:
    check_examples(examples, bits)

    def quantized(name: str, width: int) -> NetworkRun:
        with _attached(quantizer(name, width)):
            return _run(model, examples, loss)

    sizes = {name: WeightSize(weight_count(layer), len(layer.weight))  # type: ignore[arg-type]
             for name, layer in layers.items()}
    return measure_layers(sizes, _run(model, examples, loss), quantized, bits, state)


def _run(model: nn.Module, examples: Sequence[Example], loss: Loss) -> NetworkRun:
    outputs, losses, counts = [], [], []
    with unnoticed(model), evaluation(model), torch.no_grad():
        for inputs, target in examples:
            args, kwargs = arguments(inputs)
            result = model(*args, **kwargs)
            tensors = tensors_in(result)
            outputs += [tensor.detach().double().cpu().numpy().ravel() for tensor in tensors]
            losses.append(float(loss(result, target)))
            counts.append(len(tensors[0]))
    return NetworkRun(np.concatenate(outputs), float(np.average(losses, weights=counts)))


@contextlib.contextmanager
def _attached(quantizer: Any) -> Iterator[None]:
    quantizer.attach()
    try:
        yield
    finally:
        quantizer.detach()
