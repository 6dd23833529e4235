"""Moved to ``slimtrain.proto.onnx_exactness``."""
from slimtrain.proto.onnx_exactness import Step, make_islands, put_on_grid

__all__ = ["Step", "make_islands", "put_on_grid"]
