"""Moved to ``slimtrain.proto.onnx_placement``."""
from slimtrain.proto.onnx_placement import clip_kind, is_fusable, place_onnx

__all__ = ["clip_kind", "is_fusable", "place_onnx"]
