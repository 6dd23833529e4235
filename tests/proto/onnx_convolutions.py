"""A writer of ONNX models made of independent convolutions, for the environments without an onnx package.

Field numbers are those of onnx.proto; nothing is written that these models do not need.
"""

from typing import Iterable, List, NamedTuple, Optional, Tuple

import numpy as np

from slimtrain.core import Activation
from wire import block, number, text

Pair = Tuple[int, int]


class Branch(NamedTuple):
    """One convolution of its own input: x0 -> y0 for the first, x1 -> y1 for the next, and so on."""

    input_shape: Tuple[int, ...]
    output_shape: Tuple[int, ...]
    weight: np.ndarray
    bias: Optional[np.ndarray] = None
    strides: Pair = (1, 1)
    padding: Tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Activation = Activation.NONE


def output_names(index: int, branch: Branch) -> List[str]:
    """The names the converter gives to what a branch writes: one, or one for each dense group.

    A graph output is renamed; groups are called after the convolution itself, whatever is fused into it.
    """
    if branch.groups == 1 or branch.groups == len(branch.weight) == branch.input_shape[1]:
        return [f"y{index}__before_tr"]
    own = f"y{index}" if branch.activation is Activation.NONE else f"conv{index}"
    return [f"{own}___output___{group}" for group in range(branch.groups)]


def model(branches: Iterable[Branch]) -> bytes:
    """The serialized ModelProto, opset 13."""
    parts = [text(2, "branches"), _tensor("zero", np.zeros(())), _tensor("six", np.full((), 6))]
    for index, branch in enumerate(branches):
        parts.append(_convolution(index, branch))
        if branch.activation is Activation.RELU:
            parts.append(_node("Relu", [f"conv{index}"], f"y{index}"))
        if branch.activation is Activation.RELU6:
            parts.append(_node("Clip", [f"conv{index}", "zero", "six"], f"y{index}"))
        parts.append(block(11, _value(f"x{index}", branch.input_shape)))
        parts.append(block(12, _value(f"y{index}", branch.output_shape)))
    return number(1, 8) + block(7, *parts) + block(8, number(2, 13))


def _convolution(index: int, branch: Branch) -> bytes:
    (top, bottom), (left, right) = branch.padding
    inputs, initializers = [f"x{index}", f"w{index}"], _tensor(f"w{index}", branch.weight)
    if branch.bias is not None:
        inputs.append(f"b{index}")
        initializers += _tensor(f"b{index}", branch.bias)
    output = f"y{index}" if branch.activation is Activation.NONE else f"conv{index}"
    return initializers + _node(
        "Conv", inputs, output, _integers("kernel_shape", *branch.weight.shape[2:]),
        _integers("strides", *branch.strides), _integers("pads", top, left, bottom, right),
        _integers("dilations", *branch.dilation), _integer("group", branch.groups))


def _node(kind: str, inputs: List[str], output: str, *attributes: bytes) -> bytes:
    names = [text(1, name) for name in inputs]
    return block(1, *names, text(2, output), text(3, output), text(4, kind),
                 *[block(5, attribute) for attribute in attributes])


def _integer(name: str, value: int) -> bytes:
    return text(1, name) + number(20, 2) + number(3, value)


def _integers(name: str, *values: int) -> bytes:
    return text(1, name) + number(20, 7) + b"".join(number(8, value) for value in values)


def _tensor(name: str, values: np.ndarray) -> bytes:
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return block(5, *[number(1, size) for size in values.shape], number(2, 1), text(8, name), block(9, data))


def _value(name: str, shape: Tuple[int, ...]) -> bytes:
    dimensions = [block(1, number(1, size)) for size in shape]
    return text(1, name) + block(2, block(1, number(1, 1), block(2, *dimensions)))
