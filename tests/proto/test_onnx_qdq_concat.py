"""Concatenations in models of onnxruntime's tool: each input has a grid of its own there, in MNN all share one."""
import numpy as np
import pytest

pytest.importorskip("onnx", reason="this environment has no ONNX")
quantization = pytest.importorskip("onnxruntime.quantization", reason="this environment has no onnxruntime")

from onnx import helper  # noqa: E402

from offline_models import model_of, normal  # noqa: E402
from qdq_models import SYMMETRIC, data, exact_result, int8_result, network, quantized  # noqa: E402
from slimtrain.core import sqnr_db  # noqa: E402
from slimtrain.proto.onnx_deploy import deploy_onnx  # noqa: E402
from slimtrain.proto.onnx_qdq import import_qdq  # noqa: E402
from slimtrain.proto.runtime import run_model  # noqa: E402

# Seven-bit weights do not saturate onnxruntime's own int8 kernels.
NARROW = {"reduce_range": True}
UNSIGNED = quantization.QuantType.QUInt8
OPTIONS = {
    "unsigned": {**NARROW, "activation_type": UNSIGNED}, "signed": NARROW,
    "per channel": {**NARROW, "per_channel": True}, "symmetric": {**SYMMETRIC, **NARROW},
    "symmetric, unsigned": {**NARROW, "activation_type": UNSIGNED, "extra_options": {"ActivationSymmetric": True}}}
# 28 to 45 dB where all shared the widest grid, -1 dB without the ReLU that the tool leaves to a grid
NETS = {
    "one of them read by others": ("conv", "branch", "conv", "concat", "conv", "mean", "gemm"),
    "one signed": ("conv", "branch", "linear", "concat", "conv"),
    "the other signed": ("linear", "branch", "conv", "concat", "conv"),
    "pool behind": ("conv", "branch", "conv", "concat", "pool", "conv"),
    "output": ("conv", "branch", "conv", "concat"),
    "flattened": ("conv", "pool", "branch", "conv", "concat", "flatten", "gemm"),
    "ReLU behind": ("linear", "branch", "linear", "concat", "relu", "conv")}


def against_the_file(model, folder, batches):
    """What MNN computes against the Q and DQ nodes one by one, and against onnxruntime's int8 kernels, in dB."""
    imported = import_qdq(model)
    result = deploy_onnx(model, imported.rewritten, batches[0], folder / "net")
    assert result.conversion.coverage.fraction == 1.0 and not imported.coverage.missing
    assert result.simulation_sqnr_db >= 100
    expected = exact_result(model, batches[0])
    found = run_model(result.mnn, batches[0])["y"].reshape(expected.shape)
    return sqnr_db(expected, found), sqnr_db(int8_result(model, batches[0]), found), imported.remarks


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", OPTIONS)
def test_inputs_of_concatenations_keep_their_grids(name, options, tmp_path):
    batches = data()
    exact, integer, remarks = against_the_file(
        quantized(network(*NETS[name]), tmp_path, batches, **OPTIONS[options]), tmp_path, batches)
    # equal, but for single ties that are rounded the other way
    assert min(exact, integer) >= 55
    assert len(remarks) == 1 and "which MNN puts on it in float" in remarks[0]


def test_equal_grids_are_left_together(tmp_path):
    """Both halves are one tensor, so that the tool finds the same range for them."""
    rng = np.random.RandomState(0)
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("Concat", ["r", "r"], ["t"], axis=1), helper.make_node("Conv", ["t", "v", "d"], ["y"])]
    net = model_of(nodes, {"w": normal(rng, 8, 3, 3, 3), "b": normal(rng, 8), "v": normal(rng, 4, 16, 3, 3),
                           "d": normal(rng, 4)}, {"x": ["n", 3, 12, 12]}, {"y": ["n", 4, 8, 8]})
    batches = data()
    exact, _, remarks = against_the_file(quantized(net, tmp_path, batches, **NARROW), tmp_path, batches)
    assert exact >= 55 and not remarks


def test_a_concatenation_that_the_tool_left_float(tmp_path):
    net = network("conv", "branch", "linear", "concat", "relu", "conv")
    next(node for node in net.graph.node if node.op_type == "Concat").name = "left"
    model = quantized(net, tmp_path, data(), nodes_to_exclude=["left"], **NARROW)
    assert against_the_file(model, tmp_path, data())[0] >= 55
