"""TensorFlow 1.15, and 2.x through ``tensorflow.compat.v1``: compression of graphs, and hooks for sessions."""

from slimtrain.hooks import helpers
from slimtrain.hooks.ema_quantizer import EMAQuantizer
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.oaq_quantizer import OAQQuantizer
from slimtrain.hooks.pruner_hooks import SIMDOCPrunerHook, SNIPLevelPrunerHook, TaylorFOChannelPrunerHook
from slimtrain.hooks.quantizer_hooks import EMAQuantizerHook, LSQQuantizerHook, OAQQuantizerHook
from slimtrain.hooks.sensitivity import SensitivityAnalyzer
from slimtrain.hooks.simd_oc_pruner import SIMDOCPruner
from slimtrain.hooks.snip_pruner import SNIPLevelPruner
from slimtrain.hooks.strip import MNN_QAT_variables, get_qat_state_placeholder, strip_MNN_QAT_ops
from slimtrain.hooks.taylor_fo_pruner import TaylorFOChannelPruner

__all__ = [
    "EMAQuantizer",
    "EMAQuantizerHook",
    "LSQQuantizer",
    "LSQQuantizerHook",
    "MNN_QAT_variables",
    "OAQQuantizer",
    "OAQQuantizerHook",
    "SIMDOCPruner",
    "SIMDOCPrunerHook",
    "SNIPLevelPruner",
    "SNIPLevelPrunerHook",
    "SensitivityAnalyzer",
    "TaylorFOChannelPruner",
    "TaylorFOChannelPrunerHook",
    "get_qat_state_placeholder",
    "helpers",
    "strip_MNN_QAT_ops",
]
