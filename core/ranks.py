"""Rank rules as values, and the plan they make: which layers become chains, of which ranks, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from slimtrain.core.chain import Shape, chain_multiply_adds, chain_parameters
from slimtrain.core.decompose import Analysis, Factorization, chain_shapes, full_ranks
from slimtrain.core.vbmf import evbmf

Ranks = Tuple[int, ...]


class Kernel(NamedTuple):
    """A layer that can be factorized."""

    name: str
    analysis: Analysis
    stride: Tuple[int, ...]
    positions: int = 1  #: output positions; multiply-adds of layers are compared only where they are known

    @property
    def shape(self) -> Shape:
        """[O, I, *extents]."""
        return tuple(self.analysis.weight.shape)

    @property
    def full(self) -> Ranks:
        """The ranks that lose nothing."""
        return full_ranks(self.shape, self.analysis.factorization)

    def shapes(self, ranks: Ranks) -> Tuple[Shape, ...]:
        """The shapes of the factors."""
        return chain_shapes(self.shape, self.analysis.factorization, ranks)


class RankPlan(NamedTuple):
    """What becomes of one layer; ``ranks`` is empty and ``reason`` says why where it stays as it is."""

    name: str
    factorization: Factorization
    ranks: Ranks
    reason: str
    parameters: Tuple[int, int]     #: weights before and after
    multiply_adds: Tuple[int, int]  #: before and after, times ``Kernel.positions``


@dataclass(frozen=True)
class Alignment:
    """Ranks as multiples of what a device computes at once.

    Args:
        channels: ranks are rounded down to multiples of it, but not to 0; 1 rounds nothing.
        minimal_ratio: Tucker-2 keeps at least this share of the channels, rounded likewise.

    Raises:
        ValueError: ``channels`` is not positive, or ``minimal_ratio`` not in [0, 1].
    """

    channels: int = 8
    minimal_ratio: float = 0.25

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"align_channels must be at least 1, got {self.channels!r}")
        _check_share("tucker_minimal_ratio", self.minimal_ratio, 0.0)

    def rank(self, rank: int, full: int, factorization: Factorization) -> int:
        """The nearest lower aligned rank."""
        ratio = self.minimal_ratio if factorization is Factorization.TUCKER2 else 0.0
        aligned = self._down(rank, full)
        return aligned if aligned >= ratio * full else self._down(int(full * ratio), full)

    def _down(self, rank: int, full: int) -> int:
        return rank // self.channels * self.channels or min(self.channels, full)


class RankRule:
    """Chooses ranks for layers; subclasses are values."""

    def choose(self, kernels: Sequence[Kernel], alignment: Alignment) -> Dict[str, Ranks]:
        """Ranks by name; a layer that is not in the result stays as it is.

        Raises:
            ValueError: what is asked for is impossible.
        """
        raise NotImplementedError


class LayerRule(RankRule):
    """A rule that looks at one unfolding at a time."""

    def choose(self, kernels: Sequence[Kernel], alignment: Alignment) -> Dict[str, Ranks]:
        return {kernel.name: self._ranks(kernel, alignment) for kernel in kernels}

    def rank(self, values: np.ndarray, rows: int, columns: int) -> int:
        """The rank of an unfolding [rows, columns] with these singular values, before alignment."""
        raise NotImplementedError

    def _ranks(self, kernel: Kernel, alignment: Alignment) -> Ranks:
        ranks = [self.rank(spectrum.values, *size) for spectrum, size in zip(kernel.analysis.spectra, _sizes(kernel))]
        return tuple(alignment.rank(rank, full, kernel.analysis.factorization)
                     for rank, full in zip(ranks, kernel.full))


@dataclass(frozen=True)
class EvbmfRanks(LayerRule):
    """As many components as empirical variational Bayes tells from noise (``core.vbmf``)."""

    def rank(self, values: np.ndarray, rows: int, columns: int) -> int:
        return evbmf(values[:min(rows, columns)], rows, columns).rank


@dataclass(frozen=True)
class EnergyRanks(LayerRule):
    """The fewest components that hold a share of the energy, the sum of the squared singular values."""

    share: float = 0.9

    def __post_init__(self) -> None:
        _check_share("share", self.share, 0.0)

    def rank(self, values: np.ndarray, rows: int, columns: int) -> int:
        return _fewest(values**2, self.share)


@dataclass(frozen=True)
class SingularValueRanks(LayerRule):
    """The fewest components whose singular values make up a share of the sum of all."""

    share: float = 0.5

    def __post_init__(self) -> None:
        _check_share("reserved_singular_value_ratio", self.share, 0.0)

    def rank(self, values: np.ndarray, rows: int, columns: int) -> int:
        return _fewest(values, self.share)


@dataclass(frozen=True)
class ExplicitRanks(RankRule):
    """Ranks by layer name, taken as they are; all other layers stay as they are."""

    ranks: Mapping[str, Ranks] = field(default_factory=dict)

    def choose(self, kernels: Sequence[Kernel], alignment: Alignment) -> Dict[str, Ranks]:
        known = {kernel.name: kernel for kernel in kernels}
        for name, ranks in self.ranks.items():
            if name not in known:
                raise ValueError(f"ranks are given for {name!r}, which is not a layer that can be factorized; those "
                                 f"are {', '.join(map(repr, known)) or 'none'}")
            try:
                known[name].shapes(tuple(ranks))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return {name: tuple(ranks) for name, ranks in self.ranks.items()}


@dataclass(frozen=True)
class PerFactorization(RankRule):
    """A rule for each factorization."""

    rules: Mapping[Factorization, RankRule]

    def choose(self, kernels: Sequence[Kernel], alignment: Alignment) -> Dict[str, Ranks]:
        chosen: Dict[str, Ranks] = {}
        for factorization, rule in self.rules.items():
            chosen.update(rule.choose([k for k in kernels if k.analysis.factorization is factorization], alignment))
        return chosen


def toolbox_rule(reserved_singular_value_ratio: float = 0.5) -> RankRule:
    """The toolbox' own choice: Tucker-2 by variational Bayes, the rest by a share of the singular values."""
    share = SingularValueRanks(reserved_singular_value_ratio)
    return PerFactorization({Factorization.TUCKER2: EvbmfRanks(), Factorization.SVD: share,
                             Factorization.SEPARABLE: share})


def plan_layers(kernels: Sequence[Kernel], rule: RankRule, alignment: Alignment) -> List[RankPlan]:
    """The plan of every layer, in order: factorized where that saves multiply-adds.

    Raises:
        ValueError: the rule cannot be met.
    """
    explicit = isinstance(rule, ExplicitRanks)
    large = [kernel for kernel in kernels if explicit or min(kernel.shape[:2]) > alignment.channels]
    chosen = rule.choose(large, alignment)
    few = {kernel.name for kernel in kernels} - {kernel.name for kernel in large}
    plans = []
    for kernel in kernels:
        if kernel.name in few:
            reason = "it has %d outputs and %d inputs, both must be more than align_channels = %d" % (
                kernel.shape[:2] + (alignment.channels,))
        else:
            reason = "" if kernel.name in chosen else "the rank rule leaves it as it is"
        plans.append(_plan(kernel, chosen.get(kernel.name, ()), reason))
    return plans


def _plan(kernel: Kernel, ranks: Ranks, reason: str) -> RankPlan:
    before = (chain_parameters([kernel.shape]), chain_multiply_adds([kernel.shape], kernel.stride))
    after = before
    if ranks:
        shapes = kernel.shapes(ranks)
        after = (chain_parameters(shapes), chain_multiply_adds(shapes, kernel.stride))
        if after[1] >= before[1]:
            reason = "at ranks %s it would take %d multiply-adds per output position instead of %d" % (
                ranks, after[1], before[1])
            ranks, after = (), before
    return RankPlan(kernel.name, kernel.analysis.factorization, ranks, reason, (before[0], after[0]),
                     (before[1] * kernel.positions, after[1] * kernel.positions))


def _sizes(kernel: Kernel) -> List[Tuple[int, int]]:
    """Rows and columns of each unfolding."""
    rows = [spectrum.values.size for spectrum in kernel.analysis.spectra]
    return [(count, kernel.analysis.weight.size // count) for count in rows]


def _fewest(strengths: np.ndarray, share: float) -> int:
    total = np.cumsum(strengths)
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1) if total[-1] else 1


def _check_share(name: str, share: float, least: float) -> None:
    if not least <= share <= 1:
        raise ValueError(f"{name} must lie in [{least:g}, 1], got {share!r}")
