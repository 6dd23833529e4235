"""What MNN reads otherwise than ONNX means it, in files that are quantized offline."""
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
pytest.importorskip("onnxruntime", reason="this environment has no onnxruntime")

from onnx import helper  # noqa: E402

from offline_models import model_of, normal  # noqa: E402
from slimtrain.proto import convert  # noqa: E402
from slimtrain.proto.onnx_deploy import deploy_onnx  # noqa: E402
from slimtrain.proto.onnx_offline import OfflineSettings, quantize_onnx  # noqa: E402


def deployed(nodes, constants, folder):
    """A net of [n, 3, 9, 9] to [n, 4, 9, 9] quantized and run."""
    rng = np.random.RandomState(1)
    constants = {**constants, "w": normal(rng, 8, 3, 3, 3), "b": normal(rng, 8), "v": normal(rng, 4, 8, 3, 3)}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4), *nodes,
             helper.make_node("Conv", ["t", "v"], ["y"], pads=[1] * 4)]
    model = model_of(nodes, constants, {"x": ["n", 3, 9, 9]}, {"y": ["n", 4, 9, 9]})
    data = [{"x": rng.normal(size=(2, 3, 9, 9)).astype(np.float32)} for _ in range(4)]
    quantized = quantize_onnx(model, data, OfflineSettings())
    return deploy_onnx(model, quantized.rewritten, quantized.example, folder / "net")


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_offsets_behind_an_activation_are_added_behind_it(activation, is_first, tmp_path):
    """MNN takes such a constant for the convolution's bias where it is the second operand."""
    offset = normal(np.random.RandomState(0), 1, 8, 1, 1) - 0.5
    bounds = {} if activation == "Relu" else {"zero": np.float32(0), "six": np.float32(6)}
    nodes = [helper.make_node(activation, ["c", *bounds], ["r"]),
             helper.make_node("Add", ["k", "r"] if is_first else ["r", "k"], ["t"])]
    result = deployed(nodes, {"k": offset, **bounds}, tmp_path)
    assert result.conversion.coverage.fraction == 1.0
    assert result.simulation_sqnr_db >= 100 and result.reference_sqnr_db >= 30


def test_what_leads_nowhere_is_left_out(tmp_path):
    nodes = [helper.make_node("Relu", ["c"], ["t"]), helper.make_node("Conv", ["t", "v"], ["nowhere"])]
    assert deployed(nodes, {}, tmp_path).simulation_sqnr_db >= 100


@pytest.mark.parametrize("kind", ["Max", "Min"])
def test_the_larger_of_a_tensor_and_a_constant(kind, tmp_path):
    constants = {"k": normal(np.random.RandomState(0), 1, 8, 1, 1)}
    assert deployed([helper.make_node(kind, ["c", "k"], ["t"])], constants, tmp_path).simulation_sqnr_db >= 100


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_pools_that_do_not_say_their_strides(kind, tmp_path):
    nodes = [helper.make_node("Relu", ["c"], ["r"]), helper.make_node(kind, ["r"], ["p"], kernel_shape=[3, 3]),
             helper.make_node("Pad", ["p", "pads"], ["t"])]
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    assert deployed(nodes, {"pads": pads}, tmp_path).simulation_sqnr_db >= 100


MISREAD = {
    "it reduces all axes": ("ReduceL2", ["x", "axes"], {"keepdims": 1}),
    "it leaves out the dilation": ("MaxPool", ["x"], {"kernel_shape": [2, 2], "dilations": [2, 2], "strides": [1, 1]}),
    "it leaves out the antialiasing": ("Resize", ["x", "", "half"], {"mode": "linear", "antialias": 1}),
    "it interpolates between other points": ("Resize", ["x", "", "half"], {"mode": "cubic"}),
}


@pytest.mark.parametrize("reason", MISREAD)
def test_operations_that_are_read_otherwise_are_named(reason, tmp_path, caplog):
    pytest.importorskip("MNN")
    kind, inputs, attributes = MISREAD[reason]
    constants = {"axes": np.array([1], np.int64), "half": np.array([1, 1, 0.5, 0.5], np.float32)}
    node = helper.make_node(kind, inputs, ["y"], **attributes)
    used = {name: constants[name] for name in inputs[1:] if name}
    model = model_of([node], used, {"x": ["n", 3, 8, 8]}, {"y": ["n", "c", "h", "w"]}, opset=18)
    onnx.save(model, str(tmp_path / "m.onnx"))
    convert(tmp_path / "m.onnx", tmp_path / "m.mnn")
    assert "MNN computes it wrongly: %s of y (%s)" % (kind, reason) in caplog.text


@pytest.mark.parametrize("kind", ["AveragePool", "Resize"])
@pytest.mark.parametrize("before", ["Sigmoid", "Tanh"])
def test_pools_of_what_is_made_in_float_are_made_in_float(kind, before, tmp_path):
    """The layer behind them describes their output; MNN hands this on to their input, and takes both for integers."""
    nodes = [helper.make_node(before, ["c"], ["s"]), helper.make_node(
        "AveragePool", ["s"], ["p"], kernel_shape=[3, 3], strides=[3, 3])]
    mode = "linear" if kind == "Resize" else "nearest"
    nodes += [helper.make_node("Resize", ["p", "", "factors"], ["t"], mode=mode,
                               coordinate_transformation_mode="half_pixel" if kind == "Resize" else "asymmetric")]
    result = deployed(nodes, {"factors": np.array([1, 1, 3, 3], np.float32)}, tmp_path)
    assert result.simulation_sqnr_db >= 100
