"""Small models to convert, made with whatever framework the environment has, and what they compute.

With onnx: channels first, run by onnxruntime.  With TensorFlow: a frozen graph, channels last, run by a session.
Both are: 3x3 convolution, ReLU, depthwise convolution, 1x1 convolution to the output.
"""

import importlib.util
from typing import Dict, NamedTuple, Tuple

import numpy as np

HAS_ONNX = importlib.util.find_spec("onnx") is not None


class Conv(NamedTuple):
    """One convolution: names of its output tensor and operator in MNN, weight [O, I / groups, kh, kw], bias."""

    tensor: str
    op_name: str
    weight: np.ndarray
    bias: np.ndarray


class Sample(NamedTuple):
    """A model file, its convolutions in order, inputs by name and the float outputs for them."""

    path: str
    convs: Tuple[Conv, ...]
    inputs: Dict[str, np.ndarray]
    outputs: Dict[str, np.ndarray]


def float_chain(folder):
    """The three convolutions on 8x8 pixels."""
    rng = np.random.RandomState(0)
    weights = [
        (rng.randn(*shape) * 0.3).astype(np.float32) for shape in ((8, 3, 3, 3), (8, 1, 3, 3), (4, 8, 1, 1))
    ]
    biases = [(rng.randn(count) * 0.1).astype(np.float32) for count in (8, 8, 4)]
    x = rng.randn(1, 3, 8, 8).astype(np.float32)
    build = _onnx_chain if HAS_ONNX else _tensorflow_chain
    return build(folder, weights, biases, x)


def pointwise(folder, weight, bias, x, relu=False):
    """One 1x1 convolution; ``x`` is [N, C, H, W] and comes back in ``inputs`` in the layout of the model."""
    build = _onnx_pointwise if HAS_ONNX else _tensorflow_pointwise
    return build(folder, weight, bias, x, relu)


def save_onnx(path, nodes, initializers, inputs, outputs):
    """Write an ONNX model; inputs and outputs are shapes by name, initializers arrays by name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return str(path)


def run_onnx(path, inputs):
    """Outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs)))


def _onnx_chain(folder, weights, biases, x):
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], group=8),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["y"]),
    ]
    arrays = {f"w{i}": weight for i, weight in enumerate(weights)}
    arrays.update({f"b{i}": bias for i, bias in enumerate(biases)})
    path = save_onnx(folder / "chain.onnx", nodes, arrays, {"x": x.shape}, {"y": [1, 4, 8, 8]})
    names = (("r0", "c0"), ("c1", "c1"), ("y__before_tr", "y"))
    convs = tuple(Conv(*pair, weight, bias) for pair, weight, bias in zip(names, weights, biases))
    return Sample(path, convs, {"x": x}, run_onnx(path, {"x": x}))


def _onnx_pointwise(folder, weight, bias, x, relu):
    from onnx import helper

    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c" if relu else "y"])]
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"]))
    shape = [len(x), len(weight), *x.shape[2:]]
    path = save_onnx(folder / "pointwise.onnx", nodes, {"w": weight, "b": bias}, {"x": x.shape}, {"y": shape})
    conv = Conv("y__before_tr", "c" if relu else "y", weight, bias)
    return Sample(path, (conv,), {"x": x}, run_onnx(path, {"x": x}))


def _save_tensorflow(path, build, x):
    """Write the graph of ``build(placeholder)`` for an input [N, H, W, C]; its outputs for ``x``."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        y = build(v1, v1.placeholder(tf.float32, x.shape, "x"))
        with v1.Session() as session:
            outputs = {y.op.name: session.run(y, {"x:0": x})}
    with open(str(path), "wb") as file:
        file.write(graph.as_graph_def().SerializeToString())
    return outputs


def _tensorflow_chain(folder, weights, biases, x):
    def build(v1, y):
        same = {"strides": [1, 1, 1, 1], "padding": "SAME"}
        y = v1.nn.conv2d(y, weights[0].transpose(2, 3, 1, 0), name="c0", **same)
        y = v1.nn.relu(v1.nn.bias_add(y, biases[0], name="b0"), name="r0")
        y = v1.nn.depthwise_conv2d(y, weights[1].transpose(2, 3, 0, 1), name="c1", **same)
        y = v1.nn.bias_add(y, biases[1], name="b1")
        y = v1.nn.conv2d(y, weights[2].transpose(2, 3, 1, 0), name="c2", **same)
        return v1.nn.bias_add(y, biases[2], name="y")

    path, last = folder / "chain.pb", np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    outputs = _save_tensorflow(path, build, last)
    names = (("r0", "b0"), ("b1", "b1"), ("y", "y"))
    convs = tuple(Conv(*pair, weight, bias) for pair, weight, bias in zip(names, weights, biases))
    return Sample(str(path), convs, {"x": last}, outputs)


def _tensorflow_pointwise(folder, weight, bias, x, relu):
    def build(v1, y):
        y = v1.nn.conv2d(y, weight.transpose(2, 3, 1, 0), strides=[1, 1, 1, 1], padding="SAME", name="c")
        y = v1.nn.bias_add(y, bias, name="b" if relu else "y")
        return v1.nn.relu(y, name="y") if relu else y

    path, last = folder / "pointwise.pb", np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    outputs = _save_tensorflow(path, build, last)
    return Sample(str(path), (Conv("y", "b" if relu else "y", weight, bias),), {"x": last}, outputs)
