"""Pruning of blocks of four output channels."""
from __future__ import annotations

from slimtrain.callbacks.level_pruner import LevelPruner
from slimtrain.proto import PruneType


class SIMDOCPruner(LevelPruner):
    """Prunes 1x4 blocks: the weights of four neighbouring output channels at one place of the filter.

    MNN's sparse kernels load such a block at once. Where the number of output channels is no multiple of four, the last
    block of a filter place is shorter.
    """

    block = 4
    prune_type = PruneType.SIMD_OC
