"""Float ONNX models made by hand, for offline quantization."""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model_of(nodes, constants, inputs, outputs, opset=13, listed=False):
    """A model; with ``listed`` its constants are inputs too, as in old files."""
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    if listed:
        infos += [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                  for name, value in arrays.items()]
    graph = helper.make_graph(
        nodes, "net", infos,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if listed else 8)
    onnx.checker.check_model(model)
    return model


def normal(rng, *shape, gain=0.3):
    return (rng.normal(size=shape) * gain).astype(np.float32)


def everything(opset=13, listed=False):
    """Convolutions with batch norm, offset, depthwise and groups; a residual; Gemm with factors; MatMul with bias."""
    rng = np.random.RandomState(0)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c0", "gamma", "beta", "mean", "var"], ["n0"], epsilon=1e-3),
        helper.make_node("Relu", ["n0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="deep", auto_pad="SAME_LOWER", group=8),
        helper.make_node("Add", ["offset", "c1"], ["o1"]),
        helper.make_node("Add", ["o1", "r0"], ["sum"]),
        helper.make_node("Conv", ["sum", "w2", "b2"], ["c2"], name="grouped", group=2, strides=[2, 2],
                         auto_pad="SAME_UPPER"),
        helper.make_node("Clip", ["c2"], ["r2"], min=0.0, max=6.0) if opset < 11 else
        helper.make_node("Clip", ["c2", "zero", "six"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["g3"], name="gemm", alpha=0.5, beta=2.0),
        helper.make_node("Relu", ["g3"], ["r3"]),
        helper.make_node("MatMul", ["r3", "w4"], ["m4"], name="matmul"),
        helper.make_node("Add", ["m4", "b4"], ["y"]),
    ]
    constants = {
        "w0": normal(rng, 8, 3, 3, 3), "gamma": normal(rng, 8) + 1, "beta": normal(rng, 8), "mean": normal(rng, 8),
        "var": np.abs(normal(rng, 8)) + 0.5, "w1": normal(rng, 8, 1, 3, 3), "offset": normal(rng, 1, 8, 1, 1),
        "w2": normal(rng, 8, 4, 3, 3), "b2": normal(rng, 8), "w3": normal(rng, 8, 12), "b3": normal(rng, 12),
        "w4": normal(rng, 12, 5), "b4": normal(rng, 5)}
    if opset >= 11:
        constants.update(zero=np.float32(0), six=np.float32(6))
    return model_of(nodes, constants, {"x": ["n", 3, 9, 9]}, {"y": ["n", 5]}, opset, listed)
