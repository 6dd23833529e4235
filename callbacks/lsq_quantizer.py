"""Learned step size quantization (Esser et al., arXiv 1902.08153) of PyTorch models."""
from __future__ import annotations

import logging
import os
from enum import Enum
from typing import Any, Collection, NamedTuple, Optional, Tuple, Union

import onnx
from torch import nn

from slimtrain.callbacks.deployment import deployed_layers
from slimtrain.callbacks.onnx_export import example_inputs, export_float, prepare
from slimtrain.callbacks.quantizer import Quantizer, arguments
from slimtrain.core import Coverage, replace_all
from slimtrain.proto import quantize_algorithm, save_algorithm

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]
