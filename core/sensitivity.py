"""How much the loss would notice if a weight were not there.

The sensitivity of a weight is ``|w * dL/dw|``, the first-order change of the loss when it is set to zero (SNIP,
Lee et al., arXiv 1810.02340, equation 4; Molchanov et al., arXiv 1906.10771, equation 8). One batch says little, so it
is averaged over several: a plain mean at first, an exponential one once ``window`` batches were seen.
"""
from __future__ import annotations

import io
import os
import zipfile
from typing import Any, Dict, Mapping, NamedTuple, Union

import numpy as np

from slimtrain.core.files import write_whole

PathLike = Union[str, "os.PathLike[str]"]


class Sensitivity(NamedTuple):
    """Mean sensitivities so far."""

    scores: Dict[str, np.ndarray]  #: weight name -> float32, the shape of the weight
    batches: int


def accumulate_sensitivity(before: Sensitivity, weights: Mapping[str, np.ndarray],
                           gradients: Mapping[str, np.ndarray], window: int) -> Sensitivity:
    """Take in one more batch.

    Args:
        before: what is known; ``Sensitivity({}, 0)`` at the start.
        weights, gradients: arrays of equal shapes under equal names.
        window: batches that the mean reaches back, at least 1.

    Raises:
        ValueError: names or shapes differ; ``window`` is below 1.
    """
    if set(weights) != set(gradients) or (before.batches and set(before.scores) != set(weights)):
        raise ValueError("weights and gradients must have the names of the sensitivities so far, got %s and %s"
                         % (sorted(weights), sorted(gradients)))
    share = mean_share(before.batches, window)
    scores = {}
    for name, weight in weights.items():
        if weight.shape != gradients[name].shape:
            raise ValueError("weight %r has shape %s, its gradient %s" % (name, weight.shape, gradients[name].shape))
        score = finite(np.abs(weight.astype(np.float32) * gradients[name].astype(np.float32)))
        scores[name] = score if not before.batches else before.scores[name] + share * (score - before.scores[name])
    return Sensitivity(scores, before.batches + 1)


def mean_share(batches: int, window: int) -> float:
    """The share of the next batch in the mean, after ``batches`` of them."""
    if window < 1:
        raise ValueError("the sensitivity needs a window of at least 1 batch, got %r" % (window,))
    return 1.0 / min(batches + 1, window)


def finite(score: np.ndarray) -> np.ndarray:
    """The score with NaN and infinity as zero: an overflowing batch (mixed precision skips its step) says nothing."""
    return np.where(np.isfinite(score), score, np.float32(0))


def save_sensitivity(path: PathLike, scores: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name to one file, whole or not at all; no pickle, whatever the suffix."""
    buffer = io.BytesIO()
    arrays: Dict[str, Any] = {name: np.asarray(score, dtype=np.float32) for name, score in scores.items()}
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def load_sensitivity(path: PathLike) -> Dict[str, np.ndarray]:
    """The inverse of :func:`save_sensitivity`.

    Raises:
        ValueError: the file is not one of these.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError("%s holds no sensitivities by weight name: %s" % (os.fspath(path), error)) from error
