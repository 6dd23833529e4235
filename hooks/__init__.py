"""TensorFlow 1.15, and 2.x through ``tensorflow.compat.v1``: compression of graphs, and hooks for sessions."""

from slimtrain.core import ExpandedLine, FactorizedLayer
from slimtrain.hooks import helpers
from slimtrain.hooks.bit_sensitivity import int8_sensitivity, weight_sensitivity
from slimtrain.hooks.compositions import merged_weights
from slimtrain.hooks.configuration import from_config
from slimtrain.hooks.ema_quantizer import EMAQuantizer
from slimtrain.hooks.lop import LOP
from slimtrain.hooks.lop_hook import LOPHook
from slimtrain.hooks.low_rank import LowRankDecomposition, low_rank_decompose
from slimtrain.hooks.low_rank_hook import LowRankDecompositionHook
from slimtrain.hooks.low_rank_structure import apply_structure, structure_in, structure_of
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.oaq_quantizer import OAQQuantizer
from slimtrain.hooks.offline_quantizer import OfflineQuantizer
from slimtrain.hooks.pruner_hooks import SIMDOCPrunerHook, SNIPLevelPrunerHook, TaylorFOChannelPrunerHook
from slimtrain.hooks.quantizer_hooks import EMAQuantizerHook, LSQQuantizerHook, OAQQuantizerHook, WAQQuantizerHook
from slimtrain.hooks.report_hook import CompressionReportHook
from slimtrain.hooks.sensitivity import SensitivityAnalyzer
from slimtrain.hooks.simd_oc_pruner import SIMDOCPruner
from slimtrain.hooks.snip_pruner import SNIPLevelPruner
from slimtrain.hooks.strip import MNN_QAT_variables, get_qat_state_placeholder, strip_MNN_QAT_ops
from slimtrain.hooks.taylor_fo_pruner import TaylorFOChannelPruner
from slimtrain.hooks.waq_quantizer import WAQQuantizer
from slimtrain.hooks.weight_file import get_op_weight_values
from slimtrain.hooks.weight_quantizer import WeightQuantizer, strip_wq_ops
from slimtrain.hooks.weight_quantizer_hook import WeightQuantizerHook
from slimtrain.proto.bit_picture import draw_sensitivity
from slimtrain.proto.bit_sensitivity import sensitivity_table

__all__ = [
    "CompressionReportHook",
    "EMAQuantizer",
    "EMAQuantizerHook",
    "ExpandedLine",
    "FactorizedLayer",
    "LOP",
    "LOPHook",
    "LSQQuantizer",
    "LSQQuantizerHook",
    "LowRankDecomposition",
    "LowRankDecompositionHook",
    "MNN_QAT_variables",
    "OAQQuantizer",
    "OAQQuantizerHook",
    "OfflineQuantizer",
    "SIMDOCPruner",
    "SIMDOCPrunerHook",
    "SNIPLevelPruner",
    "SNIPLevelPrunerHook",
    "SensitivityAnalyzer",
    "TaylorFOChannelPruner",
    "TaylorFOChannelPrunerHook",
    "WAQQuantizer",
    "WAQQuantizerHook",
    "WeightQuantizer",
    "WeightQuantizerHook",
    "apply_structure",
    "draw_sensitivity",
    "from_config",
    "get_op_weight_values",
    "get_qat_state_placeholder",
    "helpers",
    "int8_sensitivity",
    "low_rank_decompose",
    "merged_weights",
    "sensitivity_table",
    "strip_MNN_QAT_ops",
    "strip_wq_ops",
    "structure_in",
    "structure_of",
    "weight_sensitivity",
]
