"""Moved to ``slimtrain.proto.onnx_rewrite``."""
from slimtrain.proto.onnx_rewrite import Rewritten, all_params, fused_output, rewrite

__all__ = ["Rewritten", "all_params", "fused_output", "rewrite"]
