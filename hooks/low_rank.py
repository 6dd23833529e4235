"""Low-rank decomposition of TensorFlow graphs: Tucker-2 for convolutions, SVD for matrix products and 1x1."""
from __future__ import annotations

import logging
import os
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

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
from slimtrain.hooks.checks import check_editable
from slimtrain.hooks.compositions import compositions
from slimtrain.hooks.factor_chain import replace_layer
from slimtrain.hooks.layers import Layer, LayerKind
from slimtrain.hooks.own_weights import UNREAD, OwnWeight, find_own_weights, from_core, is_read
from slimtrain.hooks.strip import is_quantized
from slimtrain.hooks.warm_start import start_common_variables
from slimtrain.hooks.weight_file import read_weights
from slimtrain.proto import save_parameterless
from slimtrain.proto.progress import with_progress

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]

#: operation -> shapes of the variables that took its weight's place, as JSON has it
Structure = Dict[str, List[List[int]]]


class Layers(NamedTuple):
    """The layers of a graph that has not been decomposed yet."""

    all: Dict[str, Layer]
    own: Dict[str, OwnWeight]   #: those that can be decomposed
    dense: Dict[str, str]       #: the others, and why they stay as they are


class LowRankDecomposition:
    """Decides which layers of a forward graph become chains of smaller ones, and makes them so.

    Args:
        graph: the forward graph, before its optimizer and without a session.
        weight_npy_file: the trained weights: a file of :func:`get_op_weight_values`, or a checkpoint.
        skip_layers: names or patterns (``block1/*``) of operations to leave; "" means none.
        align_channels: ranks are multiples of it.
        tucker_minimal_ratio: Tucker-2 keeps at least this share of the channels.
        reserved_singular_value_ratio: share of the sum of the singular values that SVD keeps.
        rank_rule: another rule for all layers: ``EnergyRanks``, ``ExplicitRanks``, ``BudgetRanks``, ... of
            ``slimtrain.core``.
        separable: names or patterns of convolutions to write as k x 1 and 1 x k instead.
        refinements: rounds of orthogonal iteration for Tucker-2.

    Raises:
        TypeError: ``graph`` is not a graph.
        RuntimeError: it is finalized, quantized, decomposed already, has gradients or a session.
        ValueError: a bad value, a name that matches no layer, nothing that could be decomposed, weights that are
            missing or of another shape.
        SlimtrainError: ``weight_npy_file`` cannot be read.
    """

    def __init__(self, graph: tf.Graph, weight_npy_file: PathLike, skip_layers: Collection[str] = (),
                 align_channels: int = 8, tucker_minimal_ratio: float = 0.25,
                 reserved_singular_value_ratio: float = 0.5, *, rank_rule: Optional[RankRule] = None,
                 separable: Collection[str] = (), refinements: int = 2) -> None:
        self.check(align_channels, tucker_minimal_ratio, reserved_singular_value_ratio, refinements)
        self.graph = graph
        self._weight_file = weight_npy_file
        found = decomposable(graph, [name for name in skip_layers if name])
        if not found.own:
            raise ValueError("no layer can be decomposed ({})".format(
                "; ".join("{}: {}".format(*item) for item in found.dense.items())
                or "the graph has no convolution or matrix product with a weight"))
        rule = rank_rule or toolbox_rule(reserved_singular_value_ratio)
        positions = _positions(found.all)
        if isinstance(rule, BudgetRanks) and rule.cost is Cost.MULTIPLY_ADDS and not positions:
            raise ValueError("a budget of multiply-adds needs a graph whose images have a known height and width")
        spatial = set(select(list(found.own), separable)) if separable else set()
        weights = _weights(found.own, weight_npy_file)
        kernels = {name: _kernel(own, weights[name], name in spatial, positions.get(name, 1))
                   for name, own in with_progress(found.own.items(), "decomposing")}
        plans = plan_layers(list(kernels.values()), rule, Alignment(align_channels, tucker_minimal_ratio))
        self.plans = plans
        self.spectra = {name: kernel.analysis.spectra for name, kernel in kernels.items()}
        self._own = found.own
        self._factors = {plan.name: truncate_weight(kernels[plan.name].analysis, plan.ranks, refinements)
                         for plan in plans if plan.ranks}
        errors = {name: chain_error(kernels[name].analysis.weight, chain) for name, chain in self._factors.items()}
        by_name = {plan.name: plan for plan in plans}
        #: every layer with weights, in the order of the graph
        self.report: Tuple[FactorizedLayer, ...] = tuple(
            _line(layer, by_name[name], errors.get(name, 0.0)) if name in by_name
            else _dense_line(layer, found.dense[name], positions.get(name, 1)) for name, layer in found.all.items())

    @staticmethod
    def check(align_channels: int, tucker_minimal_ratio: float, reserved_singular_value_ratio: float,
              refinements: int) -> None:
        """Refuse bad numbers before there is a graph.

        Raises:
            ValueError: a number out of its range.
        """
        Alignment(align_channels, tucker_minimal_ratio)
        toolbox_rule(reserved_singular_value_ratio)
        if refinements < 0:
            raise ValueError("refinements must not be negative, got {!r}".format(refinements))

    @property
    def structure(self) -> Structure:
        """What ``apply_structure`` needs to give another graph of this network the same layers."""
        return {name: [list(value.shape) for value in self._values(name)] for name in self._factors}

    def apply(self) -> None:
        """Put the chains in the place of their layers, and let all variables start from the trained weights.

        Raises:
            RuntimeError: as the constructor; the graph changed in between.
        """
        check_decomposable(self.graph)
        for name in self._factors:
            replace_layer(self._own[name], self._values(name))
        start_common_variables(self.graph, self._weight_file)

    def _values(self, name: str) -> List[np.ndarray]:
        return [np.ascontiguousarray(from_core(factor, self._own[name].transposed)) for factor in self._factors[name]]


def low_rank_decompose(graph: tf.Graph, weight_npy_file: PathLike, compress_params_file: Optional[PathLike],
                       skip_layers: Collection[str] = (), align_channels: int = 8, tucker_minimal_ratio: float = 0.25,
                       reserved_singular_value_ratio: float = 0.5, append: bool = False, *,
                       rank_rule: Optional[RankRule] = None, separable: Collection[str] = (),
                       refinements: int = 2) -> None:
    """Decompose the forward graph of a trained network; train the result on to regain its accuracy.

    Afterwards the initializers of all variables give the trained weights: the factors of those that were decomposed,
    the others as the file has them. The variables of decomposed weights are in no collection any more.

    Args:
        compress_params_file: made without an algorithm, so that a later one can append to it; None makes none. The
            converter needs to know nothing: factors are layers like all others.
        append: the file exists already, of an earlier algorithm, and is left as it is.
        graph, weight_npy_file, skip_layers, align_channels, tucker_minimal_ratio, reserved_singular_value_ratio,
            rank_rule, separable, refinements: see :class:`LowRankDecomposition`, which also gives a report.

    Raises:
        TypeError, RuntimeError, ValueError, SlimtrainError: as :class:`LowRankDecomposition`.
        ParameterFileError: there is nothing to append to.
        OSError: the file cannot be written; the graph is as it was.
    """
    decomposition = LowRankDecomposition(
        graph, weight_npy_file, skip_layers, align_channels, tucker_minimal_ratio, reserved_singular_value_ratio,
        rank_rule=rank_rule, separable=separable, refinements=refinements)
    if compress_params_file is not None:
        save_parameterless(compress_params_file, append)
    log_report(decomposition.report)
    decomposition.apply()


def log_report(report: Sequence[FactorizedLayer]) -> None:
    """One line per layer, and one for the network."""
    for line in describe_factorized(report):
        logger.info("%s", line)


def check_decomposable(graph: tf.Graph) -> None:
    """Make sure that layers of ``graph`` may still be replaced by others.

    Raises:
        TypeError: ``graph`` is not a graph.
        RuntimeError: it is finalized, quantized, decomposed or expanded already, has gradients or a session.
        ValueError: layers are hidden in function bodies.
    """
    check_editable(graph)
    if is_quantized(graph):
        raise RuntimeError("the graph is quantized already: change its layers first, then construct the quantizer")
    if compositions(graph):
        raise RuntimeError("layers of the graph were decomposed or expanded already ({}): do so once per graph".format(
            compositions(graph)[0].layer))


def decomposable(graph: tf.Graph, skip: Collection[str]) -> Layers:
    """The layers of a graph, split into those that can become chains and the others.

    Raises:
        ValueError: a name that matches no layer.
        TypeError, RuntimeError: as :func:`check_decomposable`.
    """
    check_decomposable(graph)
    layers, own, dense = find_own_weights(graph)
    skipped = select(list(layers), skip) if skip else []
    dense.update((name, UNREAD) for name in own if not is_read(layers[name]))
    dense.update((name, "named in skip_layers") for name in skipped)
    return Layers(layers, {name: value for name, value in own.items() if name not in dense}, dense)


def _weights(own: Mapping[str, OwnWeight], path: PathLike) -> Dict[str, np.ndarray]:
    """The weight of each layer as [O, I, *extents]."""
    names = {name: weight.variable.op.name for name, weight in own.items()}
    values = read_weights(path, sorted(set(names.values())))
    found = {}
    for name, weight in own.items():
        shape = weight.variable.shape.as_list()
        if names[name] not in values or list(values[names[name]].shape) != shape:
            there = "has it with the shape {}".format(list(values[names[name]].shape)) if names[name] in values \
                else "does not have it"
            raise ValueError("layer {!r} needs the weight {!r} of shape {}, and {!r} {}: give the weights of this "
                             "network".format(name, names[name], shape, os.fspath(path), there))
        found[name] = weight.matrix(values[names[name]])
    return found


def _kernel(own: OwnWeight, weight: np.ndarray, separable: bool, positions: int) -> Kernel:
    factorization = Factorization.SEPARABLE if separable else natural_factorization(weight.shape)
    try:
        return Kernel(own.layer.name, analyse_weight(weight, factorization), own.stride, positions)
    except ValueError as error:
        raise ValueError("layer {!r}: {}".format(own.layer.name, error)) from error


def _positions(layers: Mapping[str, Layer]) -> Dict[str, int]:
    """Output positions of each layer for one example; empty where a size is not known."""
    counts = {}
    for name, layer in layers.items():
        shape = layer.op.outputs[0].shape
        sizes: List[Any] = shape.as_list()[1:] if shape.rank else [None]
        if layer.kind is LayerKind.MATMUL:
            sizes = []
        elif layer.op.get_attr("data_format") == b"NCHW":
            sizes = sizes[1:]
        else:
            sizes = sizes[:-1]
        if None in sizes:
            return {}
        counts[name] = int(np.prod(sizes, dtype=np.int64))
    return counts


def _line(layer: Layer, plan: RankPlan, error: float) -> FactorizedLayer:
    return FactorizedLayer(layer.name, layer.kind.value, plan.factorization.value if plan.ranks else "", plan.ranks,
                           plan.parameters, plan.multiply_adds, error, plan.reason)


def _dense_line(layer: Layer, reason: str, positions: int) -> FactorizedLayer:
    shape = layer.kernel.shape
    count = layer.parameters if shape.is_fully_defined() else 0
    return FactorizedLayer(layer.name, layer.kind.value, "", (), (count, count), (count * positions,) * 2, 0.0, reason)
