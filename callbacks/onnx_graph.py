"""Moved to ``slimtrain.proto.onnx_graph``."""
from slimtrain.proto.onnx_graph import OnnxGraph, attribute

__all__ = ["OnnxGraph", "attribute"]
