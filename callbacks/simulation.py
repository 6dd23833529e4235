"""Running a model as it will be deployed: every planned tensor and every weight is put on its integer grid."""
from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.fake_quant import fake_quantize
from slimtrain.callbacks.layer_scales import LayerScales, scales_of
from slimtrain.callbacks.operations import argument, map_tensors
from slimtrain.callbacks.recording import Plan
from slimtrain.callbacks.tracking import Call, Handler, Mark, Tracker
from slimtrain.core import SMALLEST_SCALE, Grid, OpKind, Quantizer, Role

logger = logging.getLogger(__name__)

_SAME_GRID = (OpKind.VIEW, OpKind.MAX_POOL)


class Simulation(Handler):
    """Fake-quantizes the tensors of a plan.

    A tensor that the plan does not know (another branch of the forward was taken, a layer is called from outside)
    is quantized around the layer: its input before it, its output right behind it.
    """

    def __init__(self, layers: Mapping[str, nn.Module], plan: Plan) -> None:
        self.plan = plan
        self._layers = layers
        self._inputs = {call.layer: call.input for call in reversed(plan.calls)}
        self._folded = frozenset(call.layer for call in plan.calls if call.batch_norm)
        self._unplanned: Set[str] = set()

    def enter(self, name: str, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        if mark is None and value.is_floating_point():
            mark = tracker.mark(value, name)
        owner = self.plan.owners.get(name)
        if owner is None or mark is None or mark.scale_owner is not None or mark.open_layer:
            return value
        return self._quantized(value, owner, mark, tracker)

    def execute(self, call: Call, tracker: Tracker) -> Any:
        if call.kind is OpKind.LAYER:
            return self._run_layer(call, tracker)
        if any(mark is not None and mark.open_layer for mark in call.marks):
            if call.name not in self.plan.fused:
                call = self._settle(call, tracker)
            elif call.kind is OpKind.BATCH_NORM:
                return self._run_batch_norm(call)
        return call.run()

    def produced(self, call: Call, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        assert mark is not None
        source = call.marks[0] if call.marks else None
        if call.kind is OpKind.LAYER:
            mark.open_layer = call.layer
        elif source is not None and source.open_layer and call.name in self.plan.fused:
            mark.open_layer = source.open_layer
        elif source is not None and call.kind in _SAME_GRID:
            mark.scale_owner = source.scale_owner
        owner = self.plan.owners.get(call.name)
        if owner is not None and mark.scale_owner is None:
            return self._quantized(value, owner, mark, tracker)
        if mark.open_layer and call.name not in self.plan.fused:
            return self._close_layer(value, mark, tracker)
        return value

    def leave(self, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        return self._close_layer(value, mark, tracker) if mark is not None and mark.open_layer else value

    # -- layers

    def _run_layer(self, call: Call, tracker: Tracker) -> Tensor:
        layer = self._layers[call.layer]
        scales = scales_of(layer)
        x, owner = self._layer_input(call, tracker)
        weight = argument(call.args, call.kwargs, 1, "weight")
        quantized = weight if scales.keep is None else weight * scales.keep
        quantized = fake_quantize(quantized, scales.weight_scale(), scales.weight_range())
        bias = argument(call.args, call.kwargs, 2, "bias")
        if bias is not None and is_depthwise(layer) and call.layer not in self._folded:
            bias = on_grid(bias, self._scale(owner).to(bias.dtype) * scales.weight_scale().to(bias.dtype))
        rest = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}
        return call.function(x, quantized, bias, *call.args[3:], **rest)  # type: ignore[no-any-return]

    def _layer_input(self, call: Call, tracker: Tracker) -> Tuple[Tensor, Quantizer]:
        x, mark = call.inputs[0], call.marks[0]
        if mark is not None and mark.scale_owner is not None:
            return x, mark.scale_owner
        owner = self._inputs.get(call.layer)
        if owner is None:
            self._report_unplanned(call.layer, "input")
            owner = Quantizer(call.layer, Role.INPUT)
        return self._quantized(x, owner, mark or tracker.mark(x, call.name + "/input"), tracker), owner

    def _run_batch_norm(self, call: Call) -> Any:
        """In evaluation the folded bias of a depthwise layer lies on the accumulator's grid, because MNN truncates it.

        Training normalises with the statistics of the batch, which no deployed bias corresponds to.
        """
        source = call.marks[0]
        training = argument(call.args, call.kwargs, 5, "training", False)
        if source is None or training or not is_depthwise(self._layers[source.open_layer]):
            return call.run()
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        values = dict(zip(names, call.args), **call.kwargs)
        mean, variance = values["running_mean"], values["running_var"]
        factor = torch.rsqrt(variance + values.get("eps", 1e-5))
        factor = factor if values.get("weight") is None else factor * values["weight"]
        shift = -mean * factor if values.get("bias") is None else values["bias"] - mean * factor
        layer_bias = self._layers[source.open_layer].bias
        folded = shift if layer_bias is None else shift + layer_bias.to(shift.dtype) * factor
        layer = self._layers[source.open_layer]
        unit = self._input_scale_of(source.open_layer).to(factor.dtype) * scales_of(layer).weight_scale().to(factor.dtype)
        values["bias"] = on_grid(folded, unit * factor.abs()) - folded + shift + mean * factor
        return call.function(**values)

    def _input_scale_of(self, layer: str) -> Tensor:
        return self._scale(self._inputs.get(layer, Quantizer(layer, Role.INPUT)))

    # -- tensors

    def _settle(self, call: Call, tracker: Tracker) -> Call:
        """Quantize operands that wait for a fused operation which this is not."""
        def close(value: Tensor) -> Tensor:
            mark = tracker.mark_of(value)
            return self._close_layer(value, mark, tracker) if mark is not None and mark.open_layer else value

        args, kwargs = map_tensors(close, call.args), map_tensors(close, dict(call.kwargs))
        inputs = tuple(close(value) for value in call.inputs)
        return call._replace(args=args, kwargs=kwargs, inputs=inputs,
                             marks=tuple(tracker.mark_of(value) for value in inputs))

    def _close_layer(self, value: Tensor, mark: Mark, tracker: Tracker) -> Tensor:
        self._report_unplanned(mark.open_layer, "output")
        return self._quantized(value, Quantizer(mark.open_layer, Role.OUTPUT), mark, tracker)

    def _quantized(self, value: Tensor, owner: Quantizer, mark: Mark, tracker: Tracker) -> Tensor:
        scales = scales_of(self._layers[owner.layer])
        result = self.quantize(value, owner, scales)
        copy = tracker.mark(result, mark.name)
        copy.scale_owner = owner
        return result

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        """Put one activation on its grid."""
        return fake_quantize(value, self._scale(owner), scales.activation_range(owner.role))

    def _scale(self, owner: Quantizer) -> Tensor:
        return scales_of(self._layers[owner.layer]).activation_scale(owner.role)

    def _report_unplanned(self, layer: str, what: str) -> None:
        if layer not in self._unplanned:
            self._unplanned.add(layer)
            logger.warning("the %s of layer %r is not where it was when the model was recorded; the layer is "
                           "quantized on its own", what, layer)


class Calibration(Simulation):
    """A simulation that first sets the scale of each tensor it quantizes, to the mean over all it has seen.

    Args:
        choose: from a tensor and its integer grid to a scale.
        observing: tells whether the present run counts; the others only simulate.
    """

    def __init__(self, layers: Mapping[str, nn.Module], plan: Plan, choose: Callable[[Tensor, Grid], float],
                 observing: Callable[[], bool] = lambda: True) -> None:
        super().__init__(layers, plan)
        self._choose = choose
        self._observing = observing
        self._counts = False
        self.seen: Dict[Quantizer, Tuple[int, float]] = {}  #: tensors looked at, mean of their scales

    def begin(self) -> None:
        self._counts = self._observing()

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        if self._counts:
            count, mean = self.seen.get(owner, (0, 0.0))
            mean += (self._choose(value, scales.grid(owner.role)) - mean) / (count + 1)
            self.seen[owner] = (count + 1, mean)
            scales.set_activation_scale(owner.role, mean)
        return super().quantize(value, owner, scales)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether MNN runs the layer with its depthwise kernel."""
    groups: Optional[int] = getattr(layer, "groups", None)
    return groups is not None and groups > 1 and groups == layer.in_channels == layer.out_channels


def on_grid(bias: Tensor, unit: Tensor) -> Tensor:
    """Round a bias to whole accumulator units, half away from zero, with a straight-through gradient."""
    unit = unit.detach().clamp_min(SMALLEST_SCALE * SMALLEST_SCALE)
    units = bias.detach() / unit
    rounded = torch.sign(units) * torch.floor(torch.abs(units) + 0.5)
    return bias + (rounded * unit - bias.detach())
