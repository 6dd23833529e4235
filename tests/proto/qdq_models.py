"""Float ONNX models that onnxruntime's own tool quantizes, and what it computes with them."""
import numpy as np
import onnx
from onnx import helper
from onnxruntime import quantization

from offline_models import model_of, normal
from slimtrain.proto.onnx_check import open_session

SYMMETRIC = {"activation_type": quantization.QuantType.QInt8, "weight_type": quantization.QuantType.QInt8,
             "per_channel": True, "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}}


class Reader(quantization.CalibrationDataReader):
    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


def data(count=8, seed=1, shape=(8, 3, 12, 12)):
    rng = np.random.RandomState(seed)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def quantized(model, folder, batches, **options):
    onnx.save(model, str(folder / "float.onnx"))
    quantization.quantize_static(str(folder / "float.onnx"), str(folder / "net.qdq.onnx"), Reader(batches),
                                 quant_format=quantization.QuantFormat.QDQ, **options)
    return onnx.load(str(folder / "net.qdq.onnx"))


def int8_result(model, x):
    """What onnxruntime's own int8 kernels compute."""
    return open_session(model.SerializeToString()).run(None, x)[0]


def exact_result(model, x):
    """What the Q and DQ nodes say, computed one by one in float: no kernel saturates."""
    return open_session(model.SerializeToString(), optimize=False).run(None, x)[0]


def network(*parts, size=12):
    """A network of 3x3 convolutions (``conv``, ``linear`` without ReLU, ``depthwise``), pools, sums, ... in a row."""
    rng, nodes, constants, at, channels, branch = np.random.RandomState(2), [], {}, "x", 3, "x"

    def add(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, list(inputs), ["t%d" % len(nodes)], **attributes))
        return nodes[-1].output[0]

    def constant(*shape):
        name = "k%d" % len(constants)
        constants[name] = normal(rng, *shape, gain=0.2)
        return name

    for part in parts:
        if part in ("conv", "linear", "depthwise"):
            outputs, groups = (channels, channels) if part == "depthwise" else (16, 1)
            at = add("Conv", at, constant(outputs, channels // groups, 3, 3), constant(outputs), pads=[1] * 4,
                     group=groups)
            channels = outputs
        elif part == "pool":
            at = add("MaxPool", at, kernel_shape=[2, 2], strides=[2, 2])
        elif part == "branch":
            branch = at
        elif part == "add":
            at = add("Add", at, branch)
        elif part == "concat":
            at, channels = add("Concat", at, branch, axis=1), 2 * channels
        elif part == "mean":
            at = add("Flatten", add("GlobalAveragePool", at))
        elif part == "flatten":
            at, channels = add("Flatten", at), channels * (size // 2) ** 2
        elif part in ("gemm", "wide"):
            width = 10 if part == "gemm" else 32
            at, channels = add("Gemm", at, constant(width, channels), constant(width), transB=1), width
        if part in ("conv", "depthwise", "relu", "wide"):
            at = add("Relu", at)
    nodes[-1].output[0] = "y"
    flat = parts[0] == "wide"
    return model_of(nodes, constants, {"x": ["n", 3] if flat else ["n", 3, size, size]},
                    {"y": ["n", 10] if parts[-1] == "gemm" else ["n", channels, None, None]})
