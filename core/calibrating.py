"""From what calibration saw of a tensor, or from a weight, to a scale; one function per method."""
from __future__ import annotations

from enum import Enum
from typing import Callable, Dict, Type, TypeVar, Union

import numpy as np

from slimtrain.core.entropy import entropy_threshold
from slimtrain.core.grid import Grid
from slimtrain.core.observers import BINS, Observation
from slimtrain.core.scales import SMALLEST_SCALE, admm_scale, max_abs_scale, mse_scale

Method = TypeVar("Method", bound=Enum)


class ActivationMethod(Enum):
    """How the scale of an activation is found from what was seen of it."""

    EMA = "ema"          #: a moving average over batches of the largest value
    KL = "kl"            #: least information lost, see :func:`entropy_threshold`
    ADMM = "admm"        #: alternating updates of scale and levels, see :func:`admm_scale`
    MSE = "mse"          #: least squared error, see :func:`mse_scale`
    MAX_ABS = "max_abs"  #: the largest value of all


class WeightMethod(Enum):
    """How the scales of a weight are found, one per output channel."""

    MAX_ABS = "max_abs"
    ADMM = "admm"
    MSE = "mse"


def method_of(kind: Type[Method], value: Union[str, Method]) -> Method:
    """A method by its name, in any case.

    Raises:
        ValueError: no such method; the message lists all.
    """
    if isinstance(value, kind):
        return value
    try:
        return kind(str(value).lower())
    except ValueError as error:
        known = ", ".join(repr(member.value) for member in kind)
        raise ValueError("method must be one of %s, got %r" % (known, value)) from error


def calibrated_scale(seen: Observation, grid: Grid, method: ActivationMethod) -> float:
    """The scale of a tensor, float32 and at least ``SMALLEST_SCALE``.

    Args:
        seen: what calibration saw of it.
        grid: its integer levels; an unsigned grid looks at positive values only.
        method: see :class:`ActivationMethod`.

    Raises:
        ValueError: nothing was seen.
    """
    if not seen.batches:
        raise ValueError("a scale needs at least one batch, none was observed")
    return float(np.float32(max(_ACTIVATIONS[method](seen, grid), SMALLEST_SCALE)))


def weight_scales(weight: np.ndarray, grid: Grid, method: WeightMethod) -> np.ndarray:
    """The scales of a weight [O, ...], float32 [O].

    Raises:
        ValueError: an empty weight, or one that is not finite.
    """
    return _WEIGHTS[method](weight, grid, 0)


def _from_range(lowest: float, highest: float, grid: Grid) -> float:
    return (max(-lowest, highest) if grid.signed else highest) / grid.upper


def _entropy(seen: Observation, grid: Grid) -> float:
    positive = seen.counts[BINS:]
    magnitudes = positive + seen.counts[BINS - 1::-1] if grid.signed else positive
    if not magnitudes.any():
        return SMALLEST_SCALE
    largest = _from_range(seen.lowest, seen.highest, grid)
    return min(entropy_threshold(magnitudes, grid.upper) * seen.limit / BINS / grid.upper, largest)


def _of_distribution(scale: Callable[..., np.ndarray], seen: Observation, grid: Grid) -> float:
    values, counts = seen.distribution()
    return float(scale(values, grid, counts=counts))


_ACTIVATIONS: Dict[ActivationMethod, Callable[[Observation, Grid], float]] = {
    ActivationMethod.EMA: lambda seen, grid: _from_range(seen.average_lowest, seen.average_highest, grid),
    ActivationMethod.KL: _entropy,
    ActivationMethod.ADMM: lambda seen, grid: _of_distribution(admm_scale, seen, grid),
    ActivationMethod.MSE: lambda seen, grid: _of_distribution(mse_scale, seen, grid),
    ActivationMethod.MAX_ABS: lambda seen, grid: _from_range(seen.lowest, seen.highest, grid),
}
_WEIGHTS: Dict[WeightMethod, Callable[[np.ndarray, Grid, int], np.ndarray]] = {
    WeightMethod.MAX_ABS: max_abs_scale,
    WeightMethod.ADMM: admm_scale,
    WeightMethod.MSE: mse_scale,
}
