"""Average pools as MNN sums them up in float, so that values halfway between two levels round as on the device."""
from __future__ import annotations

from typing import List, Optional

import numpy as np
import onnx

from slimtrain.proto.onnx_graph import attribute


def simulate_average_pool(node: onnx.NodeProto, x: np.ndarray) -> Optional[np.ndarray]:
    """What MNN computes for an AveragePool: the sum of ``x * (1 / count)`` over a window, row by row, in float32.

    Args:
        node: the pool.
        x: float32 [N, C, H, W].

    Returns:
        float32 [N, C, H', W']; None for a pool of another rank, with padding or dilation, or with its size rounded up.
    """
    kernel = list(attribute(node, "kernel_shape", []))
    is_plain = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and not attribute(node, "ceil_mode", 0)
    if x.ndim != 4 or not is_plain or any(attribute(node, "pads", ())) or set(attribute(node, "dilations", ())) - {1}:
        return None
    strides = list(attribute(node, "strides", [1, 1]))
    sizes = [(x.shape[2 + axis] - kernel[axis]) // strides[axis] + 1 for axis in range(2)]
    inverse = np.float32(1) / np.float32(kernel[0] * kernel[1])
    result = np.zeros(x.shape[:2] + tuple(sizes), np.float32)
    for window in _windows(x.astype(np.float32), kernel, strides, sizes):
        result += window * inverse
    return result


def _windows(values: np.ndarray, kernel: List[int], strides: List[int], sizes: List[int]) -> List[np.ndarray]:
    """The values at each place of the window, row by row."""
    ends = [stride * (size - 1) + 1 for stride, size in zip(strides, sizes)]
    return [values[:, :, row:row + ends[0]:strides[0], column:column + ends[1]:strides[1]]
            for row in range(kernel[0]) for column in range(kernel[1])]
