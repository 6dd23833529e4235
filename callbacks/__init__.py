"""slimtrain for PyTorch: compression objects for plain loops and a Lightning callback over each."""

from slimtrain.callbacks.bit_sensitivity import int8_sensitivity, weight_sensitivity
from slimtrain.callbacks.configuration import from_config
from slimtrain.callbacks.ema_callback import EMAQuantizerCallback
from slimtrain.callbacks.ema_quantizer import EMAQuantizer
from slimtrain.callbacks.exporting import Deployed, Exported
from slimtrain.callbacks.lop import LOP, ExpandedLine
from slimtrain.callbacks.lop_callback import LOPCallback
from slimtrain.callbacks.low_rank import FactorizedLayer, LowRankDecomposition, low_rank_decompose
from slimtrain.callbacks.low_rank_callback import LowRankDecompositionCallback
from slimtrain.callbacks.low_rank_structure import (
    apply_structure,
    load_decomposed,
    restore_dense,
    structure_in,
    structure_of,
)
from slimtrain.callbacks.lsq_callback import LSQQuantizerCallback
from slimtrain.callbacks.lsq_quantizer import LSQQuantizer
from slimtrain.callbacks.oaq_callback import OAQQuantizerCallback
from slimtrain.callbacks.oaq_quantizer import OAQQuantizer
from slimtrain.callbacks.offline_callback import OfflineQuantizerCallback
from slimtrain.callbacks.offline_quantizer import OfflineQuantizer
from slimtrain.callbacks.pruning_export import PrunedFile, deploy_pruned, export_pruned
from slimtrain.callbacks.report_callback import CompressionReportCallback
from slimtrain.callbacks.shrinking import load_channel_plan, load_shrunk, save_channel_plan, shrink
from slimtrain.callbacks.simd_oc_callback import SIMDOCPrunerCallback
from slimtrain.callbacks.simd_oc_pruner import SIMDOCPruner
from slimtrain.callbacks.snip_callback import SNIPLevelPrunerCallback
from slimtrain.callbacks.snip_pruner import SNIPLevelPruner
from slimtrain.callbacks.taylor_fo_callback import TaylorFOChannelPrunerCallback
from slimtrain.callbacks.taylor_fo_pruner import TaylorFOChannelPruner
from slimtrain.callbacks.waq_callback import WAQQuantizerCallback
from slimtrain.callbacks.waq_quantizer import WAQQuantizer
from slimtrain.callbacks.weight_quantizer import WeightQuantizer
from slimtrain.callbacks.weight_quantizer_callback import WeightQuantizerCallback
from slimtrain.proto.bit_picture import draw_sensitivity
from slimtrain.proto.bit_sensitivity import sensitivity_table

__all__ = [
    "CompressionReportCallback",
    "Deployed",
    "EMAQuantizer",
    "EMAQuantizerCallback",
    "ExpandedLine",
    "Exported",
    "FactorizedLayer",
    "LOP",
    "LOPCallback",
    "LSQQuantizer",
    "LSQQuantizerCallback",
    "LowRankDecomposition",
    "LowRankDecompositionCallback",
    "OAQQuantizer",
    "OAQQuantizerCallback",
    "OfflineQuantizer",
    "OfflineQuantizerCallback",
    "PrunedFile",
    "SIMDOCPruner",
    "SIMDOCPrunerCallback",
    "SNIPLevelPruner",
    "SNIPLevelPrunerCallback",
    "TaylorFOChannelPruner",
    "TaylorFOChannelPrunerCallback",
    "WAQQuantizer",
    "WAQQuantizerCallback",
    "WeightQuantizer",
    "WeightQuantizerCallback",
    "apply_structure",
    "deploy_pruned",
    "draw_sensitivity",
    "export_pruned",
    "from_config",
    "int8_sensitivity",
    "load_channel_plan",
    "load_decomposed",
    "load_shrunk",
    "low_rank_decompose",
    "restore_dense",
    "save_channel_plan",
    "sensitivity_table",
    "shrink",
    "structure_in",
    "structure_of",
    "weight_sensitivity",
]
