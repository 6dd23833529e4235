"""What the layers of a PyTorch model read, as moments of their receptive fields."""
from __future__ import annotations

import logging
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.handling import Call
from slimtrain.callbacks.observing import FloatObserving
from slimtrain.callbacks.operations import argument
from slimtrain.callbacks.ranks import are_several, sum_over_ranks
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import FIELDS_PER_BATCH, LONGEST_FIELD, InputMoments, add_moments, receptive_fields

logger = logging.getLogger(__name__)

Pair = Tuple[int, int]


class MomentObserving(FloatObserving):
    """Observes the tensors of the float model, and what each layer reads; all uses of a layer count together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moments: Dict[str, InputMoments] = {}  #: by layer

    def _run_layer(self, call: Call, tracker: Tracker) -> Tensor:
        x, _ = self._layer_input(call, tracker)
        if self._counts:
            self._add(call, x.detach())
        result: Tensor = call.run()
        return result

    def _add(self, call: Call, x: Tensor) -> None:
        layer = self._modules[call.layer]
        weight = argument(call.args, call.kwargs, 1, "weight")
        if weight[0].numel() > LONGEST_FIELD:
            if call.layer not in self.moments:
                logger.warning("layer %r reads %d values at once, more than %d: its rounding and bias are left alone",
                               call.layer, weight[0].numel(), LONGEST_FIELD)
                self.moments[call.layer] = InputMoments()
            return
        fields = _linear_fields(x) if isinstance(layer, nn.Linear) else _convolution_fields(call, layer, weight, x)
        self.moments[call.layer] = add_moments(self.moments.get(call.layer, InputMoments()), fields)


def averaged_over_ranks(moments: Dict[str, InputMoments]) -> Dict[str, InputMoments]:
    """The moments of what all ranks have seen; each has seen other data."""
    if not are_several():
        return moments
    return {name: _summed(seen) for name, seen in sorted(moments.items())}


def _summed(seen: InputMoments) -> InputMoments:
    if seen.mean is None or seen.second is None:
        return seen
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums: List[Tensor] = []
    for value in (np.ones(1), seen.mean, seen.second):
        sums.append(torch.from_numpy(value * seen.samples).to(device))
        sum_over_ranks(sums[-1])
    samples = sums[0].item()
    return InputMoments(int(samples), sums[1].cpu().numpy() / samples, sums[2].cpu().numpy() / samples)


def _linear_fields(x: Tensor) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    return rows[::-(-len(rows) // FIELDS_PER_BATCH)].float().cpu().numpy()[None]


def _convolution_fields(call: Call, layer: Any, weight: Tensor, x: Tensor) -> np.ndarray:
    """As :func:`receptive_fields` gives them; one dimension is an image of height 1."""
    flat = weight.dim() == 3
    kernel = _pair(tuple(weight.shape[2:]), flat, 1)
    strides, dilation = (_pair(argument(call.args, call.kwargs, position, name, 1), flat, 1)
                         for position, name in ((3, "stride"), (5, "dilation")))
    padding = _padding(argument(call.args, call.kwargs, 4, "padding", 0), flat, kernel, dilation)
    image = x if x.dim() == weight.dim() else x[None]
    values = (image[:, :, None] if flat else image).float().cpu().numpy()
    return receptive_fields(values, kernel, strides, padding, dilation, int(layer.groups), FIELDS_PER_BATCH)


def _pair(value: Any, flat: bool, missing: int) -> Pair:
    """(height, width) of a number or a tuple; ``missing`` is the height of a one-dimensional layer."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return (missing if flat else int(numbers[0])), int(numbers[-1])


def _padding(given: Any, flat: bool, kernel: Pair, dilation: Pair) -> Tuple[Pair, Pair]:
    if given == "valid":
        return (0, 0), (0, 0)
    if given == "same":
        height, width = (step * (size - 1) for size, step in zip(kernel, dilation))
        return (height // 2, height - height // 2), (width // 2, width - width // 2)
    height, width = _pair(given, flat, 0)
    return (height, height), (width, width)
