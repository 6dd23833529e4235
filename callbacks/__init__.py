"""slimtrain for PyTorch: compression objects for plain loops and a Lightning callback over each."""

from slimtrain.callbacks.exporting import Deployed, Exported
from slimtrain.callbacks.low_rank import FactorizedLayer, LowRankDecomposition, low_rank_decompose
from slimtrain.callbacks.low_rank_structure import apply_structure, restore_dense
from slimtrain.callbacks.lsq_callback import LSQQuantizerCallback
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.weight_quantizer import WeightQuantizer
from slimtrain.callbacks.weight_quantizer_callback import WeightQuantizerCallback

__all__ = [
    "Deployed",
    "Exported",
    "FactorizedLayer",
    "LSQQuantizer",
    "LSQQuantizerCallback",
    "LowRankDecomposition",
    "WeightQuantizer",
    "WeightQuantizerCallback",
    "apply_structure",
    "low_rank_decompose",
    "restore_dense",
]
