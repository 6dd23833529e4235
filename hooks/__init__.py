"""TensorFlow 1.15, and 2.x through ``tensorflow.compat.v1``: quantizers of graphs, and hooks for monitored sessions."""

from slimtrain.hooks import helpers
from slimtrain.hooks.ema_quantizer import EMAQuantizer
from slimtrain.hooks.lsq_quantizer import LSQQuantizer
from slimtrain.hooks.oaq_quantizer import OAQQuantizer
from slimtrain.hooks.quantizer_hooks import EMAQuantizerHook, LSQQuantizerHook, OAQQuantizerHook
from slimtrain.hooks.strip import MNN_QAT_variables, get_qat_state_placeholder, strip_MNN_QAT_ops

__all__ = [
    "EMAQuantizer",
    "EMAQuantizerHook",
    "LSQQuantizer",
    "LSQQuantizerHook",
    "MNN_QAT_variables",
    "OAQQuantizer",
    "OAQQuantizerHook",
    "get_qat_state_placeholder",
    "helpers",
    "strip_MNN_QAT_ops",
]
