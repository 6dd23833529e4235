"""Pruning of whole channels by the first-order change of the loss."""
from __future__ import annotations

from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.channel_trace import trace_channels
from slimtrain.callbacks.operations import map_tensors
from slimtrain.callbacks.pruner import PathLike, Pruner
from slimtrain.callbacks.pruning_layers import LayerSparsity
from slimtrain.callbacks.shrinking import shrink
from slimtrain.core import OVERALL, ChannelClasses, ChannelPlan, Ramp, channel_plan, choose_channels, plan_keeps
from slimtrain.proto import PruneType

Example = Tuple[Tuple[Any, ...], Mapping[str, Any]]


class TaylorFOChannelPruner(Pruner):
    """Prunes channels with all that belongs to them (Taylor-FO, Molchanov et al., arXiv 1906.10771).

    A channel is its filters in all layers whose outputs meet (residual adds, depthwise convolutions behind them), their
    biases and norms, and the weights that read it. All of it is set to zero; :meth:`shrink` takes it out. The
    ``sparsity`` is that of the weights which are then gone.

    Args:
        align_channels: a layer keeps a multiple of this many channels (or all).
        example_input: a tensor, a tuple of positional or a dict of keyword arguments of the model's forward, to find
            out which channels depend on each other; the first batch that the model sees when None.
        others: see :class:`slimtrain.callbacks.pruner.Pruner`.
    """

    # FILTER would let the converter remove channels itself, which it does wrongly where a depthwise convolution follows
    prune_type = PruneType.RANDOM

    def __init__(self, model: nn.Module, sparsity: float = 0.5, total_pruning_iterations: int = 1,
                 config_file: Optional[PathLike] = None, debug_info: bool = False, prune_finetune_iterations: int = 0,
                 max_prune_ratio: float = 0.99, align_channels: int = 4, *, skip_layers: Collection[str] = (),
                 sensitivity_steps: int = 10, ramp: Ramp = Ramp.CUBIC, example_input: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        if align_channels < 1:
            raise ValueError("align_channels must be at least 1, got %r" % (align_channels,))
        self._align = align_channels
        self._skip = tuple(skip_layers)
        super().__init__(model, sparsity, total_pruning_iterations, config_file, debug_info, prune_finetune_iterations,
                         max_prune_ratio, skip_layers=skip_layers, sensitivity_steps=sensitivity_steps, ramp=ramp)
        self._classes: Optional[ChannelClasses] = None
        self._alive: Optional[np.ndarray] = None
        self._example: Optional[Example] = None
        if example_input is None:
            self._listen()
        else:
            self.see_example(example_input)

    # -- results

    @property
    def classes(self) -> ChannelClasses:
        """Which channels of the model depend on each other.

        Raises:
            RuntimeError: the model has not run yet and no example input was given.
        """
        if self._classes is None:
            args, kwargs = self._known_example()
            self._classes = trace_channels(self.model, args, kwargs, self._skip)
        return self._classes

    def plan(self) -> ChannelPlan:
        """The channels that are left; with ``to_json`` and ``save_channel_plan`` for a file beside a checkpoint."""
        if self._alive is None:
            raise RuntimeError("nothing has been pruned yet: there is no plan of channels")
        return channel_plan(self.classes, self._alive)

    def shrink(self, in_place: bool = False) -> nn.Module:
        """The model without its pruned channels, checked to compute the same.

        Args:
            in_place: change the model itself, which ends the pruning; an optimizer must be made anew.

        Raises:
            RuntimeError: nothing has been pruned yet; the model's code depends on a number of channels.
        """
        self.apply()
        smaller = shrink(self.model, self.plan(), in_place, self._known_example())
        if in_place:
            self._step = max(self._step, self.schedule.last_step + 1)
            self._bits = {}
        return smaller

    def see_example(self, example: Any) -> None:
        if self._example is None:
            self._example = _first(arguments(example))

    def report(self) -> List[LayerSparsity]:
        ratios = self.current_prune_ratios()
        fixed = self.classes.fixed
        return [LayerSparsity(name, parameter.numel(), ratios[weight], fixed.get(name, ""))
                for name, (weight, parameter) in zip(self.layers, self.weights().items())]

    def state_dict(self) -> Dict[str, Any]:
        alive = None if self._alive is None else torch.from_numpy(self._alive.copy())
        return {**super().state_dict(), "alive": alive,
                "example": None if self._example is None else [list(self._example[0]), dict(self._example[1])]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._alive = None if state["alive"] is None else state["alive"].cpu().numpy()
        if state["example"] is not None:
            self._example = tuple(state["example"][0]), dict(state["example"][1])

    # -- what this algorithm does

    def _choose_layers(self, skip: Collection[str]) -> Dict[str, nn.Module]:
        layers: Dict[str, nn.Module] = {
            name: module for name, module in self.model.named_modules()
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))}
        owners: Dict[int, str] = {}
        for name, module in layers.items():
            if not isinstance(module._parameters.get("weight"), Tensor):
                raise ValueError("channels around layer %r cannot be removed: its weight is computed from other "
                                 "parameters; remove the parametrization first" % name)
            owner = owners.setdefault(id(module.weight), name)
            if owner != name:
                raise ValueError("channels around layers %r and %r cannot be removed: they share one weight; give each "
                                 "a copy of its own" % (owner, name))
        return layers

    def _sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        # each weight by itself: behind a filter with a batch norm, the sum of the products is zero whatever they do
        return (weight * gradient).abs_().flatten(1).sum(1)

    def _choose(self, fraction: float) -> np.ndarray:
        scores, totals = self._numpy_scores(), np.zeros(self.classes.size)
        for name, layer in self.classes.layers.items():
            np.add.at(totals, layer.rows, scores[_weight_name(name)].astype(np.float64))
        shares = {name: self._config[weight] * fraction for name, weight in zip(self.layers, self.weights())
                  if weight in self._config}
        return choose_channels(self.classes, totals, self.schedule.sparsity * fraction, self._align,
                               self._max_prune_ratio, self._alive, shares).keep

    def _decide(self, scores: Mapping[str, np.ndarray], fraction: float) -> Dict[str, np.ndarray]:
        return self._keeps_of(self._choose(fraction))

    def _prune(self, fraction: float) -> None:
        self._alive = self._choose(fraction)
        self._install(self._keeps_of(self._alive))

    def found_ratios(self) -> Dict[str, float]:
        """Shares of the layers' output channels, as ``config_file`` takes them."""
        keep = self._alive if self._alive is not None and self.finished else self._choose(1.0)
        ratios = {_weight_name(name): 1.0 - float(np.mean(keep[layer.rows]))
                  for name, layer in self.classes.layers.items()}
        ratios[OVERALL] = 1.0 - self.classes.weights(keep) / self.classes.weights(np.ones_like(keep))
        return ratios

    def _keeps_of(self, keep: np.ndarray) -> Dict[str, np.ndarray]:
        """Masks for everything that belongs to a channel."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        masks: Dict[str, np.ndarray] = {}
        for name, pairs in plan_keeps(self.classes, keep).items():
            weight = _weight_name(name)
            shape = tuple(parameters[weight].shape)
            masks[weight] = np.broadcast_to(pairs.reshape(pairs.shape + (1,) * (len(shape) - 2)), shape).copy()
            bias = weight[:-len("weight")] + "bias"
            if bias in parameters:
                masks[bias] = keep[self.classes.layers[name].rows]
        for name, channels in self.classes.vectors.items():
            for parameter in ("weight", "bias"):
                if "%s.%s" % (name, parameter) in parameters:
                    masks["%s.%s" % (name, parameter)] = keep[channels]
        return masks

    # -- the example input

    def _listen(self) -> None:
        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._example = _first((args, kwargs)) if self._example is None else self._example
            handle.remove()

        handle = self.model.register_forward_pre_hook(remember, with_kwargs=True)

    def _known_example(self) -> Example:
        if self._example is None:
            raise RuntimeError("the model has not run yet, so it is not known how its channels depend on each other: "
                               "pass example_input, or run a forward first")
        device = next(self.model.parameters()).device
        args, kwargs = map_tensors(lambda value: value.to(device), list(self._example))
        return tuple(args), dict(kwargs)


def _weight_name(layer: str) -> str:
    return layer + ".weight" if layer else "weight"


def _first(example: Example) -> Example:
    """The first item of a batch: structure does not depend on the others."""
    args, kwargs = map_tensors(lambda value: value.detach()[:1].clone() if value.dim() > 1 else value.detach().clone(),
                               [list(example[0]), dict(example[1])])
    return tuple(args), dict(kwargs)
