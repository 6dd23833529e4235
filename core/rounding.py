"""Rounding that looks at the data: which weights go up, which go down, and what bias makes up for the rest.

Rounding to nearest has the least error of the weights, not of what the layer computes. With H = E[x x^T] over the
inputs of a channel, the expected squared error of its output is e^T H e for the errors e of its weights: the local
objective of AdaRound (Nagel et al., ICML 2020, equation 12), here reduced by coordinate descent instead of a
relaxation.
"""
from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import numpy as np

from slimtrain.core.grid import Grid, quantize, round_half_away

Pair = Tuple[int, int]

#: receptive fields of one layer that one batch adds to its moments
FIELDS_PER_BATCH = 256
#: the longest receptive field of which a square matrix is kept
LONGEST_FIELD = 2304


class InputMoments(NamedTuple):
    """First and second moments of what the channels of a layer read; start with ``InputMoments()``."""

    samples: int = 0
    mean: Optional[np.ndarray] = None     #: float64 [groups, K]: E[x] of a receptive field, K = I / groups * kernel
    second: Optional[np.ndarray] = None   #: float64 [groups, K, K]: E[x x^T]

    def covariance(self) -> np.ndarray:
        """E[x x^T] - E[x] E[x]^T: what counts where the bias makes up for the mean of an error."""
        assert self.mean is not None and self.second is not None, "nothing was seen yet"
        return np.asarray(self.second - self.mean[:, :, None] * self.mean[:, None, :])


class RoundedWeight(NamedTuple):
    """A weight on its grid."""

    levels: np.ndarray                  #: int32, the shape of the weight
    correction: Optional[np.ndarray]    #: float64 [O], what to add to the bias; None for nothing


def round_weight(weight: np.ndarray, scales: np.ndarray, grid: Grid, moments: InputMoments, *, adaptive: bool,
                 correct_bias: bool) -> RoundedWeight:
    """Put a weight on its grid, with the help of what the layer reads where there are moments of it.

    Args:
        weight: float [O, I / groups, ...].
        scales: [O], positive.
        grid: the integer levels.
        moments: of the receptive fields of the layer.
        adaptive: round by what the layer computes (:func:`adaptive_levels`), not to the nearest level.
        correct_bias: give the outputs their mean back (:func:`bias_correction`).
    """
    levels = quantize(weight, scales, grid, axis=0)
    if adaptive and moments.second is not None:
        levels = adaptive_levels(weight, scales, grid, moments.covariance() if correct_bias else moments.second)
    if not correct_bias or moments.mean is None:
        return RoundedWeight(levels, None)
    error = levels * np.reshape(scales, (-1,) + (1,) * (levels.ndim - 1)) - weight
    return RoundedWeight(levels, bias_correction(error, moments.mean))


def add_moments(seen: InputMoments, fields: np.ndarray) -> InputMoments:
    """The moments after more receptive fields; ``seen`` is left as it is.

    Args:
        seen: the moments so far.
        fields: float [groups, samples, K], as :func:`receptive_fields` gives them.

    Raises:
        ValueError: no samples, or another shape than before.
    """
    values = np.asarray(fields, dtype=np.float64)
    count = values.shape[1] if values.ndim == 3 else 0
    if not count or (seen.mean is not None and seen.mean.shape != (values.shape[0], values.shape[2])):
        raise ValueError("expected receptive fields [groups, samples, K] of one shape, got %s" % (values.shape,))
    mean, second = values.mean(axis=1), np.matmul(np.swapaxes(values, 1, 2), values) / count
    if seen.mean is None or seen.second is None:
        return InputMoments(count, mean, second)
    total = seen.samples + count
    share = count / total
    return InputMoments(total, seen.mean + share * (mean - seen.mean), seen.second + share * (second - seen.second))


def receptive_fields(x: np.ndarray, kernel: Pair, strides: Pair, padding: Tuple[Pair, Pair], dilation: Pair,
                     groups: int, most: int) -> np.ndarray:
    """What the channels of a convolution read at evenly strided places: [groups, samples, I / groups * kh * kw].

    Args:
        x: [N, I, H, W].
        kernel, strides, dilation: (height, width).
        padding: ((top, bottom), (left, right)).
        groups: of the convolution.
        most: the largest number of samples.
    """
    padded = np.pad(x, ((0, 0), (0, 0)) + tuple(padding), mode="constant")
    sizes = [(padded.shape[2 + axis] - (kernel[axis] - 1) * dilation[axis] - 1) // strides[axis] + 1 for axis in (0, 1)]
    total = len(x) * sizes[0] * sizes[1]
    places = np.arange(0, total, -(-total // most))
    image, rest = np.divmod(places, sizes[0] * sizes[1])
    row, column = np.divmod(rest, sizes[1])
    rows = row[:, None] * strides[0] + np.arange(kernel[0]) * dilation[0]
    columns = column[:, None] * strides[1] + np.arange(kernel[1]) * dilation[1]
    seen = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]    # [samples, kh, kw, I]
    fields = np.moveaxis(seen, 3, 1).reshape(len(places), groups, -1)
    return np.asarray(np.swapaxes(fields, 0, 1))


def output_error(error: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The expected squared error of each output, e^T H e: float64 [O].

    Args:
        error: quantized minus float weights, [O, I / groups, ...].
        second: E[x x^T], [groups, K, K].
    """
    groups = len(second)
    rows = np.asarray(error, np.float64).reshape(groups, len(error) // groups, -1)
    return np.asarray(np.einsum("gok,gkl,gol->go", rows, second, rows, optimize=True).reshape(-1))


def adaptive_levels(weight: np.ndarray, scales: np.ndarray, grid: Grid, second: np.ndarray) -> np.ndarray:
    """Integer levels of a weight with a small error of the output, each next to its weight: up or down.

    Two starts: the nearest levels, and levels that are rounded one by one, each error handed on to the weights that
    are still to be rounded (as in GPTQ, Frantar et al., ICLR 2023). From each, the weight of an output channel that
    reduces e^T H e most is flipped to its other neighbour, until none does; the better result of a channel is kept.

    Args:
        weight: float [O, I / groups, ...].
        scales: [O], positive.
        grid: the integer levels.
        second: E[x x^T], [groups, K, K].

    Returns:
        int32, the shape of ``weight``.

    Raises:
        ValueError: ``second`` does not fit the weight.
    """
    rows = np.asarray(weight, np.float64).reshape(len(weight), -1) / np.asarray(scales, np.float64)[:, None]
    groups, size = len(second), rows.shape[1]
    if second.shape != (groups, size, size) or len(rows) % groups:
        raise ValueError("moments of shape %s do not fit a weight of shape %s" % (second.shape, np.shape(weight)))
    parts = [_best_levels(part, grid, moments) for part, moments in zip(np.split(rows, groups), second)]
    return np.concatenate(parts).astype(np.int32).reshape(np.shape(weight))


def _best_levels(rows: np.ndarray, grid: Grid, second: np.ndarray) -> np.ndarray:
    nearest = np.clip(round_half_away(rows), grid.lower, grid.upper)
    found = [_descend(rows, start, grid, second) for start in (nearest, _handed_on(rows, grid, second))]
    errors = [output_error(levels - rows, second[None]) for levels in found]
    return np.where((errors[1] < errors[0])[:, None], found[1], found[0])


def _handed_on(rows: np.ndarray, grid: Grid, second: np.ndarray) -> np.ndarray:
    """Levels rounded from the first weight to the last, the error of each made up for by those after it."""
    size = len(second)
    # inputs that never occur, or always together, leave the matrix without an inverse
    damped = second + np.eye(size) * max(1e-3 * float(np.trace(second)) / size, np.finfo(np.float64).tiny)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    down, up = np.clip(np.floor(rows), grid.lower, grid.upper), np.clip(np.ceil(rows), grid.lower, grid.upper)
    rest, levels = rows.copy(), np.empty_like(rows)
    for index in range(size):
        levels[:, index] = np.clip(round_half_away(rest[:, index]), down[:, index], up[:, index])
        error = (rest[:, index] - levels[:, index]) / factor[index, index]
        rest[:, index + 1:] -= error[:, None] * factor[index, index + 1:]
    return levels


def _descend(rows: np.ndarray, levels: np.ndarray, grid: Grid, second: np.ndarray) -> np.ndarray:
    levels = levels.copy()
    down, up = np.clip(np.floor(rows), grid.lower, grid.upper), np.clip(np.ceil(rows), grid.lower, grid.upper)
    inside = (rows >= grid.lower) & (rows <= grid.upper)
    gradient = (levels - rows).dot(second)
    diagonal = np.diagonal(second)
    active = np.arange(len(rows))
    for _ in range(4 * rows.shape[1]):
        steps = np.where(levels[active] == down[active], up[active], down[active]) - levels[active]
        gains = np.where(inside[active], 2 * steps * gradient[active] + steps * steps * diagonal, 0.0)
        best = np.argmin(gains, axis=1)
        chosen = gains[np.arange(len(active)), best]
        # what rounding of the sums alone could have made is no gain
        better = chosen < -1e-12 * np.maximum(diagonal[best], np.finfo(np.float64).tiny)
        active, best, steps = active[better], best[better], steps[better]
        if not active.size:
            break
        step = steps[np.arange(len(active)), best]
        levels[active, best] += step
        gradient[active] += step[:, None] * second[best]
    return levels


def bias_correction(error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """What to add to the bias so that the mean of each output is that of the float layer: float64 [O].

    Section 4.2 of Nagel et al., ICCV 2019: -E[(quantized - float) x], from the mean of the receptive fields.

    Args:
        error: quantized minus float weights, [O, I / groups, ...].
        mean: E[x] of a receptive field, [groups, K].
    """
    groups = len(mean)
    rows = np.asarray(error, np.float64).reshape(groups, len(error) // groups, -1)
    return np.asarray(-np.einsum("gok,gk->go", rows, mean).reshape(-1))
