"""Moved to ``slimtrain.proto.onnx_match``."""
from slimtrain.proto.onnx_match import Match, Weight, match_layers, node_weight

__all__ = ["Match", "Weight", "match_layers", "node_weight"]
