"""Low-rank decomposition of PyTorch models: Tucker-2 for convolutions, SVD for linear layers and 1x1."""
from __future__ import annotations

import copy
import logging
import os
from typing import Any, Collection, Dict, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from slimtrain.callbacks.batches import arguments
from slimtrain.callbacks.factors import (
    LowRankChain,
    array_of,
    filled_chain,
    has_hooks,
    replace_everywhere,
    shared_weights,
    stride_of,
    why_dense,
)
from slimtrain.callbacks.layers import layer_kind, weight_count
from slimtrain.callbacks.low_rank_structure import Structure
from slimtrain.callbacks.model_view import evaluation, unnoticed
from slimtrain.core import (
    Alignment,
    BudgetRanks,
    Cost,
    Factorization,
    FactorizedLayer,
    Kernel,
    RankPlan,
    RankRule,
    analyse_weight,
    chain_error,
    describe_factorized,
    natural_factorization,
    plan_layers,
    select,
    toolbox_rule,
    truncate_weight,
)
from slimtrain.proto import save_parameterless
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class LowRankDecomposition:
    """Decides which layers of a model become chains of smaller ones, and makes them so, in place.

    Args:
        model: the trained float model; it is only read here.
        skip_layers: names or patterns (``features.*``) of layers to leave; "" means none.
        align_channels: ranks are multiples of it.
        tucker_minimal_ratio: Tucker-2 keeps at least this share of the channels.
        reserved_singular_value_ratio: share of the sum of the singular values that SVD keeps.
        rank_rule: another rule for all layers: ``EnergyRanks``, ``ExplicitRanks``, ``BudgetRanks``, ... of
            ``slimtrain.core``.
        separable: names or patterns of convolutions to write as k x 1 and 1 x k instead.
        refinements: rounds of orthogonal iteration for Tucker-2.
        example_input: counts multiply-adds of whole layers; needed for a budget of multiply-adds.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a bad value, a name that matches no layer, nothing that could be decomposed.
    """

    def __init__(self, model: nn.Module, skip_layers: Collection[str] = (), align_channels: int = 8,
                 tucker_minimal_ratio: float = 0.25, reserved_singular_value_ratio: float = 0.5, *,
                 rank_rule: Optional[RankRule] = None, separable: Collection[str] = (), refinements: int = 2,
                 example_input: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("model must be a torch.nn.Module, got %s" % type(model).__name__)
        self.check(align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, refinements)
        alignment = Alignment(align_channels, tucker_minimal_ratio)
        rule = rank_rule or toolbox_rule(reserved_singular_value_ratio)
        if isinstance(rule, BudgetRanks) and rule.cost is Cost.MULTIPLY_ADDS and example_input is None:
            raise ValueError("a budget of multiply-adds needs an example_input, which tells the sizes of the layers")
        self.model = model
        dense = _dense_layers(model, [name for name in skip_layers if name])
        layers = {name: module for name, module in _weighted(model).items() if name not in dense}
        if not layers:
            raise ValueError("no layer can be decomposed (%s)" % ("; ".join("%s: %s" % item for item in dense.items())
                                                                  or "no layer with weights was found"))
        spatial = set(select(list(layers), separable)) if separable else set()
        positions = _positions(model, example_input)
        kernels = {name: _kernel(name, layer, name in spatial, positions.get(name, 1))
                   for name, layer in with_progress(layers.items(), "decomposing")}
        self.plans = plan_layers(list(kernels.values()), rule, alignment)
        self.spectra = {name: kernel.analysis.spectra for name, kernel in kernels.items()}
        self._factors = {plan.name: truncate_weight(kernels[plan.name].analysis, plan.ranks, refinements)
                         for plan in self.plans if plan.ranks}
        errors = {name: chain_error(kernels[name].analysis.weight, factors) for name, factors in self._factors.items()}
        plans = {plan.name: plan for plan in self.plans}
        #: every layer with weights, in the order of the model
        self.report: Tuple[FactorizedLayer, ...] = tuple(
            _line(name, layer, plans[name], errors.get(name, 0.0)) if name in plans
            else _dense_line(name, layer, dense[name], positions.get(name, 1))
            for name, layer in _weighted(model).items())

    @staticmethod
    def check(align_channels: int, tucker_minimal_ratio: float, reserved_singular_value_ratio: float,
              refinements: int) -> None:
        """Refuse bad numbers before there is a model.

        Raises:
            ValueError: a number out of its range.
        """
        Alignment(align_channels, tucker_minimal_ratio)
        toolbox_rule(reserved_singular_value_ratio)
        if refinements < 0:
            raise ValueError("refinements must not be negative, got %r" % (refinements,))

    @property
    def structure(self) -> Structure:
        """What ``apply_structure`` needs to give another model of this class the same layers."""
        return {name: [list(factor.shape) for factor in factors] for name, factors in self._factors.items()}

    def apply(self, model: Optional[nn.Module] = None) -> nn.Module:
        """Put the chains in the place of their layers; returns the model.

        An optimizer must be made afterwards: the factors are new parameters.

        Args:
            model: a copy of the model, or None for the model itself.
        """
        model = self.model if model is None else model
        layers = dict(model.named_modules())
        replace_everywhere(model, {layers[name]: filled_chain(layers[name], factors)
                                   for name, factors in self._factors.items()})
        return model


def low_rank_decompose(model: nn.Module, compress_params_file: Optional[PathLike], skip_layers: Collection[str] = (),
                       align_channels: int = 8, in_place: bool = False, tucker_minimal_ratio: float = 0.25,
                       reserved_singular_value_ratio: float = 0.5, append: bool = False, *,
                       rank_rule: Optional[RankRule] = None, separable: Collection[str] = (), refinements: int = 2,
                       example_input: Any = None) -> nn.Module:
    """Decompose a trained model; train the result on to regain its accuracy.

    Args:
        model: the trained float model.
        compress_params_file: made without an algorithm, so that a later one can append to it; None makes none. The
            converter needs to know nothing: factors are layers like all others.
        in_place: change the model itself instead of a copy.
        append: the file exists already, of an earlier algorithm, and is left as it is.
        skip_layers, align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, rank_rule, separable,
            refinements, example_input: see :class:`LowRankDecomposition`, which also gives a report.

    Returns:
        the decomposed model.

    Raises:
        TypeError, ValueError: as :class:`LowRankDecomposition`.
        ParameterFileError: there is nothing to append to.
        OSError: the file cannot be written; the model is as it was.
    """
    decomposition = LowRankDecomposition(
        model, skip_layers, align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, rank_rule=rank_rule,
        separable=separable, refinements=refinements, example_input=example_input)
    if compress_params_file is not None:
        save_parameterless(compress_params_file, append)
    log_report(decomposition.report)
    return decomposition.apply(model if in_place else copy.deepcopy(model))


def log_report(report: Sequence[FactorizedLayer]) -> None:
    """One line per layer, and one for the model."""
    for line in describe_factorized(report):
        logger.info("%s", line)


def _weighted(model: nn.Module) -> Dict[str, nn.Module]:
    """Layers with weights; those of a chain are no candidates again."""
    done = {id(link) for module in model.modules() if isinstance(module, LowRankChain) for link in module}
    return {name: module for name, module in model.named_modules() if weight_count(module) and id(module) not in done}


def _dense_layers(model: nn.Module, skip: Collection[str]) -> Dict[str, str]:
    """Layers that stay as they are, and why."""
    weighted = _weighted(model)
    skipped = set(select(list(weighted), skip)) if skip else set()
    shared = shared_weights(weighted)
    encoders = {id(layer) for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)
                for layer in (module.linear1, module.linear2)}
    reasons = {}
    for name, module in weighted.items():
        reasons[name] = "named in skip_layers" if name in skipped else why_dense(module) or shared[name] or (
            "it carries hooks, which would be lost: decompose before pruning and quantization" if has_hooks(module)
            else "it is the whole model" if not name
            else "TransformerEncoderLayer reads its weight itself" if id(module) in encoders else "")
    return {name: reason for name, reason in reasons.items() if reason}


def _kernel(name: str, layer: nn.Module, separable: bool, positions: int) -> Kernel:
    weight = array_of(layer.weight)  # type: ignore[arg-type]
    factorization = Factorization.SEPARABLE if separable else natural_factorization(weight.shape)
    try:
        return Kernel(name, analyse_weight(weight, factorization), stride_of(layer), positions)
    except ValueError as error:
        raise ValueError("layer %r: %s" % (name, error)) from error


def _positions(model: nn.Module, example_input: Any) -> Dict[str, int]:
    """Output positions of each layer in a run of one example."""
    counts: Dict[str, int] = {}
    if example_input is None:
        return counts

    def count(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + output.numel() // len(layer.weight)  # type: ignore[arg-type]
        return hook

    layers = _weighted(model)
    handles = [layer.register_forward_hook(count(name, layer)) for name, layer in layers.items()]
    args, kwargs = arguments(example_input)
    try:
        with unnoticed(model), evaluation(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _line(name: str, layer: nn.Module, plan: RankPlan, error: float) -> FactorizedLayer:
    return FactorizedLayer(name, layer_kind(layer), plan.factorization.value if plan.ranks else "", plan.ranks,
                           plan.parameters, plan.multiply_adds, error, plan.reason)


def _dense_line(name: str, layer: nn.Module, reason: str, positions: int) -> FactorizedLayer:
    count = weight_count(layer)
    return FactorizedLayer(name, layer_kind(layer), "", (), (count, count), (count * positions,) * 2, 0.0, reason)
