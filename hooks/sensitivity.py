"""Measuring, over some batches, how much the loss would notice if a weight were not there."""
from __future__ import annotations

import os
from typing import Any, List, Sequence, Tuple, Union

import numpy as np
import tensorflow.compat.v1 as tf

from slimtrain.core import Sensitivity, accumulate_sensitivity, save_sensitivity

PathLike = Union[str, "os.PathLike[str]"]


class SensitivityAnalyzer:
    """Averages ``|w * dL/dw|`` (SNIP, Lee et al., arXiv 1810.02340, equation 4) over batches, for a pruner's file.

    Args:
        gradients_vars: pairs of gradient and variable, as ``optimizer.compute_gradients`` returns them.

    Raises:
        ValueError: there are no such pairs, or a gradient is None.
    """

    def __init__(self, gradients_vars: Sequence[Tuple[Any, Any]]) -> None:
        self._names: List[str] = [variable.op.name for _, variable in gradients_vars]
        lost = [name for name, (gradient, _) in zip(self._names, gradients_vars) if gradient is None]
        if not self._names or lost:
            raise ValueError("gradients_vars must be pairs of gradient and variable; %s" % (
                "the loss does not depend on %s: leave them out" % ", ".join(lost) if lost else "there are none"))
        # gradients of embeddings come as slices; what is looked up is not pruned
        self._dense = [not isinstance(gradient, tf.IndexedSlices) for gradient, _ in gradients_vars]
        self._state = Sensitivity({}, 0)

    def analyze(self, gradients_vars: Sequence[Tuple[np.ndarray, np.ndarray]]) -> None:
        """Take in one batch.

        Args:
            gradients_vars: what ``sess.run`` returned for the pairs given to the constructor.

        Raises:
            ValueError: another number of pairs, or arrays whose shapes differ.
        """
        if len(gradients_vars) != len(self._names):
            raise ValueError("expected the values of %d pairs of gradient and variable, got %d"
                             % (len(self._names), len(gradients_vars)))
        pairs = {name: pair for name, pair, dense in zip(self._names, gradients_vars, self._dense) if dense}
        weights = {name: np.asarray(weight) for name, (_, weight) in pairs.items()}
        gradients = {name: np.asarray(gradient) for name, (gradient, _) in pairs.items()}
        # a plain mean: the window reaches back to the first batch
        self._state = accumulate_sensitivity(self._state, weights, gradients, self._state.batches + 1)

    def save_sensitivity_npy(self, filename: PathLike) -> None:
        """Write the mean of all batches by variable name, for ``np.load(filename, allow_pickle=False)``.

        Raises:
            RuntimeError: not one batch was analyzed.
        """
        if not self._state.batches:
            raise RuntimeError("nothing was analyzed: call analyze with the gradients of some batches first")
        save_sensitivity(filename, self._state.scores)
