"""What all quantizers of a PyTorch model share: layers, scales, plan, state; in place on the user's model."""
from __future__ import annotations

import contextlib
import json
import logging
from typing import Any, Collection, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.batches import Batch, arguments
from slimtrain.callbacks.calibration import Calibration
from slimtrain.callbacks.handling import Handler
from slimtrain.callbacks.layer_scales import (
    SCALES,
    Bits,
    LayerScales,
    average_activation_scales,
    load_scales,
    scales_of,
    scales_state,
)
from slimtrain.callbacks.layers import choose_layers, weight_count
from slimtrain.callbacks.model_view import evaluation, is_compiled, unnoticed
from slimtrain.callbacks.ranks import are_several, least_over_ranks
from slimtrain.callbacks.recording import Plan, Recorder
from slimtrain.callbacks.simulation import Simulation
from slimtrain.callbacks.tracked_model import TrackedModel
from slimtrain.callbacks.tracking import OwnHook
from slimtrain.callbacks.weight_decay import ScaleGroups
from slimtrain.core import Grid, Role, activation_grid, mse_scale
from slimtrain.core import Quantizer as Owner
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

_STORED_BITS = 8
_LARGE = 1 << 17  #: weights of a network that trains for so long that seconds of compiling do not count


class Quantizer(TrackedModel):
    """Simulates a model as MNN will run it in int8, in place.

    The model object, its submodules and its parameters stay what they are; scales are added to its ``parameters()``
    but never to its ``state_dict()``.

    Args:
        model: the float model.
        skip_quant_layers: names or patterns of layers that stay float.
        weight_bits, activation_bits: 2 to 8.
        unsigned_activations: below 8 bits, give activations that are never negative the range 0..2^bits - 1.
        retain_sparsity: weights that are zero now stay zero.
        scale_lr_ratio: learning rate of the scales over that of the group the optimizer holds them in.
        debug_info: log each layer's scales when they are set.

    Raises:
        TypeError: ``model`` is not a module, or a compiled one.
        ValueError: bad bits or names; nothing to quantize.
    """

    def __init__(self, model: nn.Module, skip_quant_layers: Collection[str], weight_bits: int, activation_bits: int,
                 *, unsigned_activations: bool = True, retain_sparsity: bool = False, scale_lr_ratio: float = 1.0,
                 debug_info: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        if any(is_compiled(module) for module in model.modules()):
            raise TypeError("the model, or a part of it, went through torch.compile, which hides what happens to its "
                            "tensors; quantize the uncompiled model")
        if scale_lr_ratio <= 0:
            raise ValueError("scale_lr_ratio must be positive, got %r" % scale_lr_ratio)
        super().__init__(model, choose_layers(model, skip_quant_layers), Handler())
        self.bits = Bits(weight_bits, activation_bits)
        self.plan: Optional[Plan] = None
        self.calibrating = False
        self.frozen = False  #: whether scales stay as they are
        self.seen: Dict[Owner, Any] = {}  #: what calibration has seen of each activation
        self._skip = tuple(skip_quant_layers)
        self._unsigned = unsigned_activations
        self._retain_sparsity = retain_sparsity
        self._scale_lr_ratio = scale_lr_ratio
        self._debug = debug_info
        self.scales = {name: self.make_scales(layer) for name, layer in self.layers.items()}
        is_large = sum(map(weight_count, self.layers.values())) >= _LARGE
        for scales in self.scales.values():
            scales.compiles_all = is_large
        self._groups = ScaleGroups(self, scale_lr_ratio)

    def scale_parameters(self) -> List[nn.Parameter]:
        """The scales, as parameters."""
        return [parameter for scales in self.scales.values() for parameter in scales.parameters()]

    def scale_sizes(self) -> Dict[int, float]:
        """The size of each scale when its training began, by the ``id`` of the parameter."""
        units = {}
        for scales in self.scales.values():
            units[id(scales.weight)], units[id(scales.activation)] = scales.sizes
        return units

    # -- what an algorithm decides

    def choose_weight_scale(self, weight: np.ndarray, grid: Grid) -> np.ndarray:
        """The start of a weight's scales, one per output channel: least squared error."""
        return mse_scale(weight, grid, axis=0)

    def choose_activation_scale(self, value: Tensor, grid: Grid) -> float:
        """The scale that one tensor asks for: least squared error."""
        return choose_activation_scale(value, grid)

    def make_scales(self, layer: nn.Module) -> LayerScales:
        """The scales that hang on one layer."""
        return LayerScales(layer, self.bits, self._retain_sparsity)

    def make_calibration(self, plan: Plan) -> Any:
        """What runs the model while its scales are chosen: a simulation whose ``counted()`` tells what it has seen."""
        return Calibration(self.modules(), plan, self.choose_activation_scale)

    def make_simulation(self) -> Simulation:
        """What runs the model from now on."""
        return Simulation(self.modules(), self.known_plan())

    def forget(self) -> None:
        """Learn the plan and all scales anew, from the next batch that comes in training mode."""
        self.plan, self.seen, self.frozen = None, {}, False
        self._tracker.handler = Handler()

    def freeze_scales(self) -> None:
        """Let scales stay as they are from now on, while weights go on learning.

        Scales that follow from the weights as they are go on doing so.

        Raises:
            RuntimeError: there are no scales yet.
        """
        self.known_plan()
        self.frozen = True

    def restore_optimizers(self) -> None:
        """Give optimizers their own parameter groups back, after a step that was broken off by an exception."""
        self._groups.restore()

    # -- presence on the model

    def attach(self) -> None:
        """Put scales and hooks on the model; does nothing when they are there.

        Raises:
            RuntimeError: another quantizer's are there.
        """
        if self.is_attached:
            return
        for name, layer in self.layers.items():
            if SCALES in layer._modules:
                raise RuntimeError("layer %r is quantized already, by another quantizer: strip_qat_ops() of that one "
                                   "first" % name)
        for name, layer in self.layers.items():
            layer.add_module(SCALES, self.scales[name])
        super().attach()
        self._handles.append(
            self.model.register_forward_pre_hook(_FirstBatch(self), with_kwargs=True, prepend=True))

    def detach(self) -> None:
        """Take scales and hooks off the model; it computes as the float model it is. Nothing is forgotten."""
        super().detach()
        for layer in self.layers.values():
            layer._modules.pop(SCALES, None)

    # -- the plan and the start of the scales

    def starts_now(self) -> bool:
        """Whether the batch that the model is given shall choose the scales."""
        return self.model.training

    def start_from(self, batch: Batch) -> None:
        """Choose all scales from one batch."""
        self.calibrate([batch])

    def calibrate(self, batches: Iterable[Any]) -> int:
        """Find out where the model is quantized, and a start for each activation's scale.

        Args:
            batches: inputs of the model; a tuple is several positional arguments, a dict keyword arguments.

        Returns:
            how many batches were seen. The model's buffers and the random state are left as they were.

        Raises:
            ValueError: there was no batch.
        """
        self.attach()
        self.restart_weight_scales()
        count = 0
        calibration: Any = None
        with unnoticed(self.model), self._calibrating():
            for batch in with_progress(batches, "calibrating"):
                args, kwargs = arguments(batch)
                if calibration is None:
                    calibration = self.make_calibration(self.record(args, kwargs))
                with self.handling(calibration):
                    self.model(*args, **kwargs)
                count += 1
        if not count:
            raise ValueError("calibration needs at least one batch, got none")
        average_activation_scales(list(self.scales.values()))
        self._measure_sizes()
        self.seen = calibration.counted()
        self.simulate_from_now()
        return count

    def record(self, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Record the plan from one run in evaluation mode."""
        norms = {id(module.running_mean): name for name, module in self.model.named_modules()
                 if isinstance(getattr(module, "running_mean", None), Tensor)}
        recorder = Recorder(norms)
        with unnoticed(self.model), evaluation(self.model), self.handling(recorder):
            outputs = self.model(*args, **kwargs)
            # the marks on the outputs belong to the run that just ended, which is still the tracker's latest
            self.plan = plan = self._agree_on_signs(recorder.finish(outputs, self._tracker))
        self._choose_ranges()
        for name in self.unused_layers():
            logger.warning("the model's forward does not run %r as a layer: it stays float", name)
        return plan

    def restart_weight_scales(self) -> None:
        """Choose the weight scales anew, from the weights as they are."""
        for name, layer in self.layers.items():
            scales, weight = self.scales[name], layer.get_parameter("weight")
            start = self.choose_weight_scale(weight.detach().float().cpu().numpy(), scales.weight_grid)
            with torch.no_grad():
                scales.weight.copy_(torch.from_numpy(np.asarray(start)))
                if scales.keep is not None:
                    scales.keep.copy_(weight != 0)

    def unused_layers(self) -> List[str]:
        """Quantizable layers that the recorded run never reached."""
        used = {call.layer for call in self.plan.calls} if self.plan else set(self.layers)
        return [name for name in self.layers if name not in used]

    def simulate_from_now(self) -> None:
        """From the next run on, the model computes as it will be deployed."""
        self._tracker.handler = self.make_simulation()
        if self._debug:
            for name in self.layers:
                scales = scales_of(self.layers[name])
                logger.info("%s: weight scales %.3g..%.3g, input %.3g, output %.3g", name,
                            scales.weight_scale().min().item(), scales.weight_scale().max().item(),
                            scales.activation_scale(Role.INPUT).item(), scales.activation_scale(Role.OUTPUT).item())

    def known_plan(self) -> Plan:
        """The plan.

        Raises:
            RuntimeError: there is none yet.
        """
        if self.plan is None:
            raise RuntimeError("nothing is known of the activations yet: train, or call calibrate(batches), first")
        return self.plan

    # -- results

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in evaluation mode exactly as a device runs it; modes, buffers and gradients stay as they are.

        Raises:
            RuntimeError: nothing is known of the activations yet.
        """
        self.known_plan()
        with self.attached(), unnoticed(self.model), evaluation(self.model):
            return self.model(*args, **kwargs)

    def why_left(self, name: str) -> str:
        unused = name in self.layers and name in self.unused_layers()
        return "the model's forward does not run it as a layer" if unused else super().why_left(name)

    # -- state

    def configuration(self) -> Dict[str, Any]:
        """Constructor arguments that make an equal quantizer of the same model; JSON-able."""
        return {
            "skip_quant_layers": list(self._skip), "weight_bits": self.bits.weight,
            "activation_bits": self.bits.activation, "unsigned_activations": self._unsigned,
            "retain_sparsity": self._retain_sparsity, "scale_lr_ratio": self._scale_lr_ratio,
        }

    def state_dict(self) -> Dict[str, Any]:
        """Configuration, scales and plan as plain tensors, numbers and strings."""
        state: Dict[str, Any] = {
            "algorithm": type(self).__name__,
            "configuration": self.configuration(),
            "plan": json.dumps(self.plan.to_json(), sort_keys=True) if self.plan else "",
            "frozen": self.frozen,
            **scales_state(self.scales),
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of other layers or bit widths.
        """
        mine, saved = self.configuration(), state["configuration"]
        for name in ("weight_bits", "activation_bits", "unsigned_activations"):
            if saved[name] != mine[name]:
                raise ValueError("the saved scales are for %s=%r, this quantizer has %r" % (
                    name, saved[name], mine[name]))
        load_scales(self.scales, state)
        self.frozen = bool(state["frozen"])
        if state["plan"]:
            self.plan = Plan.from_json(json.loads(state["plan"]))
            self._choose_ranges()
            self.simulate_from_now()

    # -- inside

    def _measure_sizes(self) -> None:
        """How large each scale is, for optimizers that would move it by their learning rate whatever its size."""
        owners = set(self.known_plan().owners.values())
        for name, scales in self.scales.items():
            scales.measure_sizes([owner.role for owner in sorted(owners, key=str) if owner.layer == name])

    @contextlib.contextmanager
    def _calibrating(self) -> Iterator[None]:
        plan, self.calibrating = self.plan, True
        try:
            yield
        except BaseException:
            self.plan = plan  # with a plan, but no scales, the model would silently train as a float model
            raise
        finally:
            self.calibrating = False

    def _choose_ranges(self) -> None:
        """Give each tensor its integer levels.

        What no quantized layer reads (sums of a residual, outputs of the network) keeps 8 bits: the device stores it in
        8 bits anyway, and coarser levels would only lose accuracy.
        """
        plan = self.known_plan()
        read = {call.input for call in plan.calls}
        for owner in set(plan.owners.values()):
            signed = not self._unsigned or owner not in plan.non_negative
            bits = self.bits.activation if owner in read else _STORED_BITS
            self.scales[owner.layer].set_grid(owner.role, activation_grid(bits, signed))

    def _agree_on_signs(self, plan: Plan) -> Plan:
        """A tensor that any rank saw below zero is signed on all."""
        if not are_several():
            return plan
        owners = sorted(set(plan.owners.values()), key=lambda owner: (owner.layer, owner.role.value))
        device = next(iter(self.scales.values())).weight.device
        flags = torch.tensor([owner in plan.non_negative for owner in owners], dtype=torch.int32, device=device)
        least_over_ranks(flags)
        return plan._replace(non_negative=frozenset(owner for owner, flag in zip(owners, flags.tolist()) if flag))


def choose_activation_scale(value: Tensor, grid: Grid) -> float:
    """The start of an activation's scale: least squared error."""
    return float(mse_scale(value.detach().float().cpu().numpy(), grid))


class _FirstBatch(OwnHook):
    """Forward pre-hook of the model: chooses the scales from the first batch that comes."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._quantizer.plan is not None or self._quantizer.calibrating:
            return
        if not self._quantizer.starts_now():
            logger.warning("the model is run in evaluation mode before its activations were calibrated: "
                           "it computes as the float model")
            return
        self._quantizer.start_from(Batch(args, kwargs))
