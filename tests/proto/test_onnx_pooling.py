"""Average pools as they are simulated against MNN, bit for bit."""
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
pytest.importorskip("onnxruntime", reason="this environment has no onnxruntime")

from onnx import helper  # noqa: E402

from offline_models import model_of  # noqa: E402
from slimtrain.core import sqnr_db  # noqa: E402
from slimtrain.proto import convert, run_model  # noqa: E402
from slimtrain.proto.onnx_check import run_onnx  # noqa: E402
from slimtrain.proto.onnx_pooling import simulate_average_pool  # noqa: E402

POOLS = [
    dict(kernel_shape=[2, 2], strides=[2, 2]), dict(kernel_shape=[3, 3], strides=[2, 2]),
    dict(kernel_shape=[3, 3], strides=[1, 1]), dict(kernel_shape=[5, 5], strides=[5, 5]),
    dict(kernel_shape=[2, 3], strides=[1, 2]), dict(kernel_shape=[7, 7], strides=[1, 1])]


@pytest.mark.parametrize("attributes", POOLS, ids=str)
def test_average_pools_are_summed_up_in_the_order_of_mnn(attributes, tmp_path):
    node = helper.make_node("AveragePool", ["x"], ["y"], **attributes)
    model = model_of([node], {}, {"x": [2, 6, 15, 15]}, {"y": [2, 6, None, None]})
    onnx.save(model, str(tmp_path / "pool.onnx"))
    convert(tmp_path / "pool.onnx", tmp_path / "pool.mnn")
    x = np.random.RandomState(0).randint(-127, 128, (2, 6, 15, 15)).astype(np.float32) * np.float32(0.0371)
    found = simulate_average_pool(node, x)
    np.testing.assert_array_equal(found, run_model(tmp_path / "pool.mnn", x)["y"])
    assert sqnr_db(run_onnx(model, {"x": x})[0], found) > 120


@pytest.mark.parametrize("attributes", [
    dict(ceil_mode=1), dict(auto_pad="SAME_UPPER"), dict(dilations=[2, 2]), dict(pads=[0, 0, 1, 1])], ids=str)
def test_what_is_left_to_onnxruntime(attributes):
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], **attributes)
    assert simulate_average_pool(node, np.zeros((1, 1, 5, 5), np.float32)) is None
