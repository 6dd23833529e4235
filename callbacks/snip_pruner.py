"""Pruning of single weights by connection sensitivity."""
from __future__ import annotations

from slimtrain.callbacks.level_pruner import LevelPruner
from slimtrain.proto import PruneType


class SNIPLevelPruner(LevelPruner):
    """Prunes single weights (SNIP, Lee et al., arXiv 1810.02340, measured during training instead of before it).

    The finest grain: it shrinks files (``slimtrain convert --sparse``), and computes faster only from about 80 % zeros
    on devices with sparse kernels.
    """

    block = 1
    prune_type = PruneType.RANDOM
