"""Running a model as it will be deployed: every planned tensor and every weight is put on its integer grid.

In training mode a layer computes with fake-quantized floats, which carry gradients. In evaluation mode its value is
that of the device, integer for integer (a float32 sum differs in its last bits from an integer one, which rounds a
value to the neighbouring level now and then): what is validated is what is deployed.
"""
from __future__ import annotations

import logging
import math
from typing import Any, Dict, Mapping, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from slimtrain.callbacks.deployment import IntegerLayer, integer_layer, output_grid
from slimtrain.callbacks.device import input_levels, mean_on_device, run_on_device
from slimtrain.callbacks.fake_quant import Bounds, fake_quantize, source_of
from slimtrain.callbacks.handling import Call, Handler
from slimtrain.callbacks.input_convolution import convolve_input, geometry_of
from slimtrain.callbacks.layer_scales import LayerScales, scales_of
from slimtrain.callbacks.layers import is_depthwise
from slimtrain.callbacks.marks import Mark
from slimtrain.callbacks.operations import argument, map_tensors, mean_of, works_in_place
from slimtrain.callbacks.recording import Plan, PlannedCall
from slimtrain.callbacks.tracking import Tracker
from slimtrain.core import SMALLEST_SCALE, Grid, OpKind, Quantizer, Role

logger = logging.getLogger(__name__)

_MOVES = (OpKind.VIEW, OpKind.MAX_POOL, OpKind.CONCAT)
_BOUNDS = {OpKind.RELU: Bounds(0.0, math.inf), OpKind.RELU6: Bounds(0.0, 6.0)}


class Simulation(Handler):
    """Quantizes the tensors of a plan.

    A tensor that the plan does not know (another branch of the forward was taken, a layer is called from outside)
    is quantized around the layer: its input before it, its output right behind it.

    Args:
        modules: all modules of the model by name.
        plan: where they are quantized.
    """

    #: whether an activation may run inside the quantization of its result; not where that result has to be seen
    runs_activations = True

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan) -> None:
        self.plan = plan
        self._modules = modules
        self._calls: Dict[Tuple[str, Quantizer], PlannedCall] = {(call.layer, call.input): call for call in plan.calls}
        self._inputs = {call.layer: call.input for call in reversed(plan.calls)}
        self._outputs = {call.layer: call.output for call in reversed(plan.calls)}
        self._folded = frozenset(call.layer for call in plan.calls if call.batch_norm)
        self._unplanned: Set[str] = set()
        self._exact = False
        self._latest_exact: Optional[Tensor] = None
        self._quantized_already: Optional[Tensor] = None  #: what the operation that runs made, on its grid

    def begin(self, tracker: Tracker) -> None:
        self._exact = not tracker.root.training

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
        waiting = None
        for mark in call.marks:
            if mark is not None and mark.open_layer:
                waiting = mark
                break
        if waiting is not None:
            if call.name not in self.plan.fused:
                return self._run(self._settle(call, tracker))
            if waiting.exact is not None and not torch.is_grad_enabled():
                return call.inputs[0]  # the exact value has this operation in it already
        if self.runs_activations and not self._exact and call.kind in _BOUNDS and call.name in self.plan.owners:
            return self._activated(call, self.plan.owners[call.name], tracker)
        return self._run(call)

    def _run(self, call: Call) -> Any:
        """Run an operation that no layer does, as the device does where that shows."""
        if self._exact and call.kind is OpKind.COMBINE and not torch.is_grad_enabled():
            mean = mean_of(call.function, call.args, call.kwargs)
            if mean is not None and call.inputs[0].dtype is torch.float32:
                value = mean_on_device(call.inputs[0], mean.axes)
                return value if mean.keeps_axes else value.flatten(-mean.axes - 1)
        return call.run()

    def _activated(self, call: Call, owner: Quantizer, tracker: Tracker) -> Tensor:
        """Run an activation and quantize what it makes, in one pass over memory; autograd keeps one tensor less."""
        source, scales = call.inputs[0], scales_of(self._modules[owner.layer])
        levels = scales.activation_range(owner.role, _BOUNDS[call.kind])
        self._quantized_already = result = fake_quantize(source, scales.learned_activation(owner.role), levels)
        if works_in_place(call.function, call.args, call.kwargs):
            tracker.replace(source, result)
        return result

    def produced(self, call: Call, value: Tensor, tracker: Tracker) -> Tensor:
        mark = tracker.mark_of(value)
        assert mark is not None
        source = call.marks[0] if call.marks else None
        if call.kind is OpKind.LAYER:
            mark.open_layer, mark.exact = call.layer, self._latest_exact
        elif source is not None and source.open_layer and call.name in self.plan.fused:
            mark.open_layer, mark.exact = source.open_layer, source.exact
        elif call.kind in _MOVES and len({None if each is None else each.scale_owner for each in call.marks}) == 1:
            mark.scale_owner = source.scale_owner if source is not None else None
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
        layer = self._modules[call.layer]
        scales = scales_of(layer)
        x, owner = self._layer_input(call, tracker)
        self._latest_exact = self._device_value(call, owner, x)
        if self._latest_exact is not None and not torch.is_grad_enabled():
            return self._latest_exact
        weight = argument(call.args, call.kwargs, 1, "weight")
        quantized = weight if scales.keep is None else weight * scales.keep
        quantized = fake_quantize(quantized, scales.weight, scales.weight_range(), owns_gradient=True)
        bias = argument(call.args, call.kwargs, 2, "bias")
        if bias is not None and is_depthwise(layer) and call.layer not in self._folded:
            bias = on_grid(bias, self._scale(owner).to(bias.dtype) * scales.weight_scale().to(bias.dtype))
        result = self.compute(call, owner, x, quantized, bias)
        self.computed(call.layer, owner, result, bias)
        return result

    def compute(self, call: Call, owner: Quantizer, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """Compute a layer from an input of ``owner`` and weights that lie on their grids."""
        source = source_of(x) if torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type) else None
        geometry = None if source is None else geometry_of(call)
        if source is not None and geometry is not None:
            scale = scales_of(self._modules[owner.layer]).learned_activation(owner.role)
            return convolve_input(x, source, scale.to(x.dtype), weight, bias, geometry)
        return call.function(x, weight, bias, *call.args[3:], **_options(call))

    def computed(self, layer: str, owner: Quantizer, result: Tensor, bias: Optional[Tensor]) -> None:
        """A layer computed ``result`` in training, from the input of ``owner``."""

    def _device_value(self, call: Call, owner: Quantizer, x: Tensor) -> Optional[Tensor]:
        """The layer's fused output as the device computes it; None in training and where there is no plan."""
        planned = self._calls.get((call.layer, owner)) if self._exact else None
        if planned is None:
            return None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            scales = {name: scales_of(self._modules[name])
                      for name in {call.layer, planned.input.layer, planned.output.layer}}
            norm = self._modules[planned.batch_norm] if planned.batch_norm else None
            layer = self._modules[call.layer]
            integer = integer_layer(layer, norm, planned, scales)
            cut = output_grid(planned, scales)
            if planned.activation:
                cut = cut._replace(lower=max(cut.lower, 0))
            grids = scales[owner.layer].grid(owner.role), scales[call.layer].weight_grid, cut
            return self.compute_integers(call, owner, integer, x.float(), grids).to(x.dtype)

    def compute_integers(self, call: Call, owner: Quantizer, integer: IntegerLayer, x: Tensor,
                         grids: Tuple[Grid, Grid, Grid]) -> Tensor:
        """Compute a layer as the device does; ``grids`` of input, weight and output (cut by an activation)."""
        more = _options(call)
        return run_on_device(self._modules[call.layer], integer, x, lambda *args: call.function(*args, **more),
                             call.args[3:], grids)

    def _layer_input(self, call: Call, tracker: Tracker) -> Tuple[Tensor, Quantizer]:
        x, mark = call.inputs[0], call.marks[0]
        if mark is not None and mark.open_layer:
            x = self._close_layer(x, mark, tracker)
            mark = tracker.mark_of(x)
        if mark is not None and mark.scale_owner is not None:
            return x, mark.scale_owner
        owner = self._inputs.get(call.layer)
        if owner is None:
            self._report_unplanned(call.layer, "input")
            owner = Quantizer(call.layer, Role.INPUT)
        return self._quantized(x, owner, mark or tracker.mark(x, call.name + "/input"), tracker), owner

    # -- tensors

    def _settle(self, call: Call, tracker: Tracker) -> Call:
        """Quantize operands that wait for a fused operation which this is not."""
        def close(value: Tensor) -> Tensor:
            mark = tracker.mark_of(value)
            return self._close_layer(value, mark, tracker) if mark is not None and mark.open_layer else value

        args, kwargs = map_tensors(close, call.args), map_tensors(close, dict(call.kwargs))
        return call._replace(args=args, kwargs=kwargs)

    def _close_layer(self, value: Tensor, mark: Mark, tracker: Tracker) -> Tensor:
        """Quantize a layer's output where it is, though the plan says that more would be fused into it."""
        self._report_unplanned(mark.open_layer, "output")
        mark.exact = None
        owner = self._outputs.get(mark.open_layer, Quantizer(mark.open_layer, Role.OUTPUT))
        return self._quantized(value, owner, mark, tracker)

    def _quantized(self, value: Tensor, owner: Quantizer, mark: Mark, tracker: Tracker) -> Tensor:
        scales = scales_of(self._modules[owner.layer])
        if value is self._quantized_already:
            result, self._quantized_already = value, None
        elif mark.exact is not None and not torch.is_grad_enabled():
            result = mark.exact
        else:
            result = self.quantize(value, owner, scales)
            result = result if mark.exact is None else _Swap.apply(result, mark.exact)
        copy = tracker.mark(result, mark.name)
        copy.scale_owner = owner
        return result

    def quantize(self, value: Tensor, owner: Quantizer, scales: LayerScales) -> Tensor:
        """Put one activation on its grid."""
        if self._exact and not torch.is_grad_enabled():
            return input_levels(value, self._scale(owner), scales.grid(owner.role))
        return fake_quantize(value, scales.learned_activation(owner.role), scales.activation_range(owner.role))

    def _scale(self, owner: Quantizer) -> Tensor:
        return scales_of(self._modules[owner.layer]).activation_scale(owner.role)

    def _report_unplanned(self, layer: str, what: str) -> None:
        if layer not in self._unplanned:
            self._unplanned.add(layer)
            logger.warning("the %s of layer %r is not where it was when the model was recorded; the layer is "
                           "quantized on its own", what, layer)


def _options(call: Call) -> Dict[str, Any]:
    """The keyword arguments of a layer's function that are not its tensors (stride, padding, ...)."""
    return {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}


class _Swap(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Tensor, None]:
        return grads[0], None


def on_grid(bias: Tensor, unit: Tensor) -> Tensor:
    """Round a bias to whole accumulator units, half away from zero, with a straight-through gradient."""
    unit = unit.detach().clamp_min(SMALLEST_SCALE * SMALLEST_SCALE)
    units = bias.detach() / unit
    rounded = torch.sign(units) * torch.floor(torch.abs(units) + 0.5)
    return bias + (rounded * unit - bias.detach())
