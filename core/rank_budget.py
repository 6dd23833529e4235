"""A global budget of parameters or multiply-adds, shared out over the layers by their singular values."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from slimtrain.core.chain import Shape, chain_multiply_adds, chain_parameters
from slimtrain.core.ranks import Alignment, Kernel, RankRule, Ranks


class Cost(Enum):
    """What a budget counts."""

    PARAMETERS = "parameters"
    MULTIPLY_ADDS = "multiply-adds"


class _Step(NamedTuple):
    """A rise of one layer's ranks: ranks None makes it dense again."""

    ranks: Optional[Ranks]
    cost: int
    gain: float


# priority, layer, its version, mode (so that no two entries are compared further), step
_Entry = Tuple[float, int, int, int, _Step]


@dataclass(frozen=True)
class BudgetRanks(RankRule):
    """The ranks of least squared error, relative to each layer's energy, within a share of what the layers cost now.

    All layers start at the least aligned ranks; then, again and again, the step of ``align_channels`` ranks that
    removes the most error per cost is taken, for as long as the budget allows. Singular values fall and costs rise,
    so that the greedy choice is the best one up to the last step. A layer whose factors would cost as much as
    itself becomes itself again.

    Args:
        share: of the cost of all layers that can be factorized, in (0, 1].
        cost: what is counted. Multiply-adds need ``Kernel.positions``.

    Raises:
        ValueError: ``share`` is not in (0, 1]; in ``choose``, the least ranks already cost more.
    """

    share: float
    cost: Cost = Cost.PARAMETERS

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"the budget must be a share in (0, 1], got {self.share!r}")

    def choose(self, kernels: Sequence[Kernel], alignment: Alignment) -> Dict[str, Ranks]:
        layers = [_Layer(kernel, self.cost, alignment) for kernel in kernels]
        dense = sum(layer.dense for layer in layers)
        least = sum(layer.current for layer in layers)
        left = self.share * dense - least
        if left < 0:
            raise ValueError(f"a budget of {self.share:.4g} of the {self.cost.value} cannot be met: the least ranks "
                             f"(tucker_minimal_ratio {alignment.minimal_ratio:g}, align_channels "
                             f"{alignment.channels}) need {least / dense:.4g}")
        queue = [entry for index, layer in enumerate(layers) for entry in layer.entries(index)]
        heapq.heapify(queue)
        while queue:
            _, index, version, _, step = heapq.heappop(queue)
            if version == layers[index].version and step.cost <= left:
                left -= step.cost
                layers[index].take(step)
                for entry in layers[index].entries(index):
                    heapq.heappush(queue, entry)
        return {kernel.name: layer.ranks for kernel, layer in zip(kernels, layers) if layer.ranks is not None}


class _Layer:
    """The state of one layer while the budget is shared out."""

    def __init__(self, kernel: Kernel, cost: Cost, alignment: Alignment) -> None:
        self.kernel, self.version = kernel, 0
        self._counts, self._step = cost, alignment.channels
        self._tails = [_tail(spectrum.values) for spectrum in kernel.analysis.spectra]
        self.dense = self._cost_of(None)
        least = tuple(alignment.rank(1, full, kernel.analysis.factorization) for full in kernel.full)
        self.ranks = self._if_cheaper(least)
        self.current = self._cost_of(self.ranks)

    def entries(self, index: int) -> List[_Entry]:
        """The possible next steps, for a queue that gives the best one first."""
        if self.ranks is None:
            return []
        steps = []
        for mode, most in enumerate(self.kernel.full):
            if self.ranks[mode] < most:
                raised = min(self.ranks[mode] + self._step, most)
                steps.append((mode, self._step_to(self.ranks[:mode] + (raised,) + self.ranks[mode + 1:])))
        return [(-step.gain / max(step.cost, 1), index, self.version, mode, step) for mode, step in steps]

    def take(self, step: _Step) -> None:
        """Raise the ranks; earlier entries become void."""
        self.ranks, self.current, self.version = step.ranks, self.current + step.cost, self.version + 1

    def _step_to(self, ranks: Ranks) -> _Step:
        assert self.ranks is not None
        target = self._if_cheaper(ranks)
        return _Step(target, self._cost_of(target) - self.current, self._error(self.ranks) - self._error(target))

    def _if_cheaper(self, ranks: Ranks) -> Optional[Ranks]:
        dense, chain = self._multiply_adds(None), self._multiply_adds(ranks)
        return ranks if chain < dense and self._cost_of(ranks) < self.dense else None

    def _error(self, ranks: Optional[Ranks]) -> float:
        """The squared relative error, or for Tucker-2 its bound, the sum over the modes."""
        return 0.0 if ranks is None else sum(float(tail[rank]) for tail, rank in zip(self._tails, ranks))

    def _cost_of(self, ranks: Optional[Ranks]) -> int:
        if self._counts is Cost.PARAMETERS:
            return chain_parameters(self._shapes(ranks))
        return self._multiply_adds(ranks) * self.kernel.positions

    def _multiply_adds(self, ranks: Optional[Ranks]) -> int:
        return chain_multiply_adds(self._shapes(ranks), self.kernel.stride)

    def _shapes(self, ranks: Optional[Ranks]) -> Tuple[Shape, ...]:
        return (self.kernel.shape,) if ranks is None else self.kernel.shapes(ranks)


def _tail(values: np.ndarray) -> np.ndarray:
    """The share of the energy that lies beyond each rank 0..n."""
    energy = np.concatenate([np.cumsum((values**2)[::-1])[::-1], [0.0]])
    return energy / (energy[0] or 1.0)
