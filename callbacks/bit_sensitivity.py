"""How much a network minds each width of each layer: one layer quantized at a time, all others float."""
from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, Callable, Collection, Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from slimtrain.callbacks.layers import choose_layers, weight_count
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.callbacks.operations import tensors_in
from slimtrain.callbacks.quantizer import arguments
from slimtrain.callbacks.weight_quantizer import WeightQuantizer, why_not_stored
from slimtrain.core import LayerState, WeightMode, sqnr_db
from slimtrain.core.bit_choice import FLOAT_BITS, BitResult, BitSensitivity, stored_size
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

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


def sensitivity_table(sensitivity: BitSensitivity) -> str:
    """One line per layer: its bytes, and for each width the SQNR of the outputs and what the loss gains, as text."""
    table = Table(box=box.SIMPLE)
    widths = [width for width in sensitivity.widths if width != FLOAT_BITS]
    table.add_column("layer")
    table.add_column("float bytes", justify="right")
    for width in widths:
        table.add_column("%d bits" % width, justify="right")
    by_layer: Dict[str, Dict[int, BitResult]] = {layer: {} for layer in sensitivity.layers}
    for result in sensitivity.results:
        by_layer[result.layer][result.bits] = result
    for layer, results in by_layer.items():
        cells = ["%.1f dB %+.2g" % (results[width].sqnr_db, results[width].loss) for width in widths]
        table.add_row(layer, "{:,}".format(results[FLOAT_BITS].bytes), *cells)
    text = io.StringIO()
    Console(file=text, width=40 + 20 * (1 + len(widths))).print(table)
    return text.getvalue()


# -- inside


class _Run(NamedTuple):
    """The model on all examples."""

    outputs: np.ndarray
    loss: float


def _measured(model: nn.Module, layers: Dict[str, nn.Module], examples: Sequence[Example], loss: Loss,
              bits: Sequence[int], state: LayerState, quantizer: Callable[[str, int], Any]) -> BitSensitivity:
    if not examples or not bits:
        raise ValueError("the sensitivity needs examples and widths, got %d and %d" % (len(examples), len(bits)))
    whole = _run(model, examples, loss)
    results: List[BitResult] = []
    for name, layer in with_progress(layers.items(), "measuring layers"):
        weights, channels = weight_count(layer), len(layer.weight)  # type: ignore[arg-type]
        results.append(BitResult(name, FLOAT_BITS, stored_size(weights, channels, FLOAT_BITS), float("inf"), 0.0))
        for width in sorted(set(bits), reverse=True):
            with _attached(quantizer(name, width)):
                run = _run(model, examples, loss)
            stored = 8 if state is LayerState.INT8 else width
            results.append(BitResult(name, width, stored_size(weights, channels, stored),
                                     sqnr_db(whole.outputs, run.outputs), run.loss - whole.loss))
            logger.info("%s at %d bits: %.1f dB, loss %+.3g", name, width, results[-1].sqnr_db, results[-1].loss)
    return BitSensitivity(state, whole.loss, tuple(results))


def _run(model: nn.Module, examples: Sequence[Example], loss: Loss) -> _Run:
    outputs, losses, counts = [], [], []
    with unnoticed(model), evaluation(model), torch.no_grad():
        for inputs, target in examples:
            args, kwargs = arguments(inputs)
            result = model(*args, **kwargs)
            tensors = tensors_in(result)
            outputs += [tensor.detach().double().cpu().numpy().ravel() for tensor in tensors]
            losses.append(float(loss(result, target)))
            counts.append(len(tensors[0]))
    return _Run(np.concatenate(outputs), float(np.average(losses, weights=counts)))


@contextlib.contextmanager
def _attached(quantizer: Any) -> Iterator[None]:
    quantizer.attach()
    try:
        yield
    finally:
        quantizer.detach()
