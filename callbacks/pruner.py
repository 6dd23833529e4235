"""What all pruners of a PyTorch model share: sensitivities, pruning events, weights that stay at zero.

The model keeps its parameters; pruned weights are set to zero after each optimizer step, so momentum and weight decay
cannot bring them back and every checkpoint of the model is sparse.
"""
from __future__ import annotations

import logging
import os
from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from slimtrain.callbacks.pruning_layers import LayerSparsity
from slimtrain.core import (
    OVERALL,
    PruningSchedule,
    Ramp,
    mean_share,
    read_prune_ratios,
    sparsity_of,
    write_prune_ratios,
)
from slimtrain.proto import PruneType, prune_algorithm, save_algorithm

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

#: integers by bytes
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pruner:
    """Prunes the weights whose absence the loss notices least.

    Sensitivities are measured in the ``sensitivity_steps`` calls up to each pruning event; the first event is at the
    last of the first ``sensitivity_steps`` calls.

    Args:
        model: the model; it stays the object it is.
        sparsity: share of the prunable weights to prune in the end, in [0, 1).
        total_pruning_iterations: number of pruning events.
        config_file: YAML file of ratios by weight name, as ``do_pruning`` writes it; layers it names get these ratios.
        debug_info: log each layer's ratio at every event.
        prune_finetune_iterations: calls without pruning between two events.
        max_prune_ratio: no layer loses a larger share.
        skip_layers: names or patterns of layers to leave alone.
        sensitivity_steps: calls whose gradients count for an event.
        ramp: how sparsity grows from event to event.

    Raises:
        TypeError: ``model`` is not a module, ``ramp`` not a Ramp.
        ValueError: bad numbers or names; nothing to prune.
    """

    prune_type: PruneType

    def __init__(self, model: nn.Module, sparsity: float, total_pruning_iterations: int,
                 config_file: Optional[PathLike], debug_info: bool, prune_finetune_iterations: int,
                 max_prune_ratio: float, *, skip_layers: Collection[str], sensitivity_steps: int, ramp: Ramp) -> None:
        self.model = model
        self.schedule = make_schedule(sparsity, total_pruning_iterations, prune_finetune_iterations, max_prune_ratio,
                                      sensitivity_steps, ramp)
        self.layers = self._choose_layers(skip_layers)
        self._config = read_prune_ratios(config_file, list(self.weights())) if config_file else {}
        self._max_prune_ratio = max_prune_ratio
        self._window = sensitivity_steps
        self._debug = debug_info
        self._step = 0
        self._batches = 0
        self._scores: Dict[str, Tensor] = {}
        self._keeps: Dict[str, Tensor] = {}    #: parameter name -> bool, True = survives
        self._bits: Dict[str, Tensor] = {}     #: the same as masks of a weight's bits: NaN times zero would stay NaN

    # -- what an algorithm does

    def _choose_layers(self, skip: Collection[str]) -> Dict[str, nn.Module]:
        """The layers to prune, by name."""
        raise NotImplementedError

    def _decide(self, scores: Mapping[str, np.ndarray], fraction: float) -> Dict[str, np.ndarray]:
        """Keep-masks by parameter name at a fraction of the final sparsity."""
        raise NotImplementedError

    def report(self) -> List[LayerSparsity]:
        """Each layer with weights, its share of zeros, and why it has none if it was left alone."""
        raise NotImplementedError

    # -- the seed's interface

    def do_pruning(self, result_file: Optional[PathLike] = "found_prune_ratios.yml") -> None:
        """Call after every ``optimizer.step()``: looks at gradients, prunes when it is time, keeps zeros zero.

        Args:
            result_file: where the ratios of the layers are written at the first and the last pruning event; None for
                no file. At the first event they are those that the full sparsity would have.

        Raises:
            RuntimeError: gradients are needed and there are none.
        """
        self.look()
        if self.prune_if_due():
            self.write_ratios(result_file)
        self.apply()

    def current_prune_ratios(self) -> Dict[str, float]:
        """The share of zeros by weight name, and over all of them under ``overall_prune_ratio``."""
        counts = {name: self._count(name, weight) for name, weight in self.weights().items()}
        ratios = {name: 1.0 - kept / total for name, (kept, total) in counts.items()}
        kept, total = (sum(values) for values in zip(*counts.values()))
        ratios[OVERALL] = 1.0 - kept / total
        return ratios

    def save_compress_params(self, filename: PathLike, append: bool = False) -> None:
        """Write the pruning parameters that MNN's converter reads.

        Args:
            filename: the parameter file.
            append: keep the other algorithms that the file holds already.

        Raises:
            RuntimeError: nothing has been pruned yet.
            ParameterFileError: nothing to append to, or an unreadable file.
        """
        if not self._keeps:
            raise RuntimeError("nothing has been pruned yet: the first pruning event is at call %d of do_pruning, "
                               "there were %d" % (self.schedule.begin_step + 1, self._step))
        ratios = self.current_prune_ratios()
        names = list(self.weights())
        blocks = [4] * len(names) if self.prune_type is PruneType.SIMD_OC else []
        algorithm = prune_algorithm(self.prune_type, names, [ratios[name] for name in names], list(self.layers), blocks)
        save_algorithm(filename, algorithm, append)

    # -- the parts of do_pruning, for loops that know more about their steps

    def look(self) -> None:
        """Take in the gradients of this step, if they count for an event."""
        if not self.schedule.looks_at(self._step, self._window):
            return
        share = mean_share(self._batches, self._window)
        with torch.no_grad():
            for name, weight in self.weights().items():
                self._look_at(name, weight, share)
        self._batches += 1

    def prune_if_due(self) -> bool:
        """End this step; True when it was that of an event, and weights were pruned."""
        event = self.schedule.event_at(self._step)
        self._step += 1
        if event is None:
            return False
        self._prune(self.schedule.fraction(event))
        if self._debug:
            for name, ratio in self.current_prune_ratios().items():
                logger.info("pruning %d of %d, %s: %.4f", event + 1, self.schedule.events, name, ratio)
        return True

    def write_ratios(self, result_file: Optional[PathLike]) -> None:
        """Write the ratios found after the first and after the last event; None writes nothing."""
        first = self._step == self.schedule.begin_step + 1
        if result_file is not None and (first or self.finished):
            write_prune_ratios(result_file, self.found_ratios())

    def see_example(self, example: Any) -> None:
        """An input of the model, for algorithms that need to know its structure."""

    def apply(self) -> None:
        """Set pruned weights to zero."""
        if self._bits:
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, bits in self._bits.items():
                    integers = _INTEGERS[parameters[name].element_size()]
                    if bits.dtype is not integers:  # the model was converted since
                        self._bits[name] = bits = bits.to(integers)
                    parameters[name].view(integers).bitwise_and_(bits)

    def found_ratios(self) -> Dict[str, float]:
        """The ratios of the final sparsity, as ``config_file`` takes them: foreseen until the last event is over."""
        if self.finished:
            return self.current_prune_ratios()
        keeps = self._decide(self._numpy_scores(), 1.0)
        ratios = {name: sparsity_of({name: keeps[name]}) for name in self.weights()}
        ratios[OVERALL] = sparsity_of(keeps)
        return ratios

    @property
    def finished(self) -> bool:
        """Whether the last pruning event is over."""
        return self._step > self.schedule.last_step

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that is zero."""
        return self.current_prune_ratios()[OVERALL]

    def weights(self) -> Dict[str, nn.Parameter]:
        """The prunable weights by parameter name."""
        return {name + ".weight" if name else "weight": layer.weight  # type: ignore[misc]
                for name, layer in self.layers.items()}

    # -- state

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next step depends on, as tensors and numbers."""
        return {"step": self._step, "batches": self._batches,
                "schedule": [self.schedule.events, self.schedule.interval, self.schedule.begin_step],
                "keep": {name: keep.clone() for name, keep in self._keeps.items()},
                "scores": {name: score.clone() for name, score in self._scores.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is that of other weights.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in (*state["scores"].items(), *state["keep"].items()):
            if name not in parameters or parameters[name].shape[:value.dim()] != value.shape:
                raise ValueError("the saved pruning state is of another model: it has a weight %r of shape %s" %
                                 (name, tuple(value.shape)))
        events, interval, begin_step = state["schedule"]
        self.schedule = PruningSchedule(self.schedule.sparsity, events, interval, begin_step, self.schedule.ramp)
        self._step, self._batches = int(state["step"]), int(state["batches"])
        self._scores = {name: score.to(parameters[name].device) for name, score in state["scores"].items()}
        self._set_keeps({name: keep.to(parameters[name].device) for name, keep in state["keep"].items()})

    # -- inside

    def _look_at(self, name: str, weight: nn.Parameter, share: float) -> None:
        if weight.grad is None:
            raise RuntimeError("weight %r has no gradient: call do_pruning after backward() and before the next "
                               "zero_grad(); name the layer in skip_layers if it is not trained" % name)
        score = self._sensitivity(weight, weight.grad).float()
        score = torch.nan_to_num_(score, nan=0.0, posinf=0.0, neginf=0.0)
        if name in self._scores:
            self._scores[name].lerp_(score, share)
        else:
            self._scores[name] = score

    def _sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs_()

    def _prune(self, fraction: float) -> None:
        self._install(self._decide(self._numpy_scores(), fraction))

    def _install(self, keeps: Mapping[str, np.ndarray]) -> None:
        """From now on these weights survive and the others are zero."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._set_keeps({name: torch.from_numpy(keep).to(parameters[name].device) for name, keep in keeps.items()})

    def _set_keeps(self, keeps: Dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._keeps = keeps
        for name, keep in keeps.items():
            if name not in self._bits:
                self._bits[name] = torch.empty_like(keep, dtype=_INTEGERS[parameters[name].element_size()])
            self._bits[name].copy_(keep).neg_()

    def _numpy_scores(self) -> Dict[str, np.ndarray]:
        if not self._scores:
            raise RuntimeError("no gradients were seen before the pruning event")
        return {name: score.cpu().numpy() for name, score in self._scores.items()}

    def _numpy_keeps(self) -> Dict[str, np.ndarray]:
        return {name: keep.cpu().numpy() for name, keep in self._keeps.items()}

    def _count(self, name: str, weight: Tensor) -> Tuple[int, int]:
        """Weights that survive, and all."""
        if name in self._keeps:
            return int(torch.count_nonzero(self._keeps[name])), self._keeps[name].numel()
        return weight.numel(), weight.numel()


def make_schedule(sparsity: float, events: int, finetune: int, max_prune_ratio: float, sensitivity_steps: int,
                  ramp: Ramp) -> PruningSchedule:
    """The schedule of a plain loop, in calls of ``do_pruning``.

    Raises:
        ValueError, TypeError: numbers out of range.
    """
    if not 0.0 < max_prune_ratio <= 1.0:
        raise ValueError("max_prune_ratio must lie in (0, 1], got %r" % (max_prune_ratio,))
    if sparsity > max_prune_ratio:
        raise ValueError("a sparsity of %r cannot be reached when no layer loses more than max_prune_ratio=%r" %
                         (sparsity, max_prune_ratio))
    if isinstance(finetune, bool) or not isinstance(finetune, int) or finetune < 0:
        raise ValueError("prune_finetune_iterations must be an integer of at least 0, got %r" % (finetune,))
    if sensitivity_steps < 1:
        raise ValueError("sensitivity_steps must be at least 1, got %r" % (sensitivity_steps,))
    return PruningSchedule(sparsity, events, finetune + 1, sensitivity_steps - 1, ramp)
