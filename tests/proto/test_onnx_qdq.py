"""Models that onnxruntime's own tool has quantized, taken over and run by MNN."""
import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
quantization = pytest.importorskip("onnxruntime.quantization", reason="this environment has no onnxruntime")

from click.testing import CliRunner  # noqa: E402
from onnx import helper  # noqa: E402

from offline_models import everything, model_of, normal  # noqa: E402
from qdq_models import SYMMETRIC, data, exact_result, int8_result, network, quantized  # noqa: E402
from slimtrain.core import ConversionError, Grid, LayerState, sqnr_db  # noqa: E402
from slimtrain.proto import LayerParams, convert, quantize_algorithm, save_algorithm  # noqa: E402
from slimtrain.proto.cli import cli  # noqa: E402
from slimtrain.proto.onnx_deploy import deploy_onnx  # noqa: E402
from slimtrain.proto.onnx_qdq import import_qdq  # noqa: E402
from slimtrain.proto.runtime import run_model  # noqa: E402


def convolutions():
    """Convolutions with ReLU and ReLU6, one depthwise, a residual and a linear head."""
    rng = np.random.RandomState(0)
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"]), helper.make_node("Add", ["c2", "r0"], ["s"]),
        helper.make_node("Conv", ["s", "w3", "b3"], ["c3"], strides=[2, 2]), helper.make_node("Relu", ["c3"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], transB=1)]
    constants = {"w0": normal(rng, 16, 3, 3, 3), "w1": normal(rng, 16, 1, 3, 3), "w2": normal(rng, 16, 16, 1, 1),
                 "w3": normal(rng, 24, 16, 3, 3), "w4": normal(rng, 10, 24)}
    constants.update({"b%d" % index: normal(rng, len(constants["w%d" % index])) for index in range(5)})
    constants.update(zero=np.float32(0), six=np.float32(6))
    return model_of(nodes, constants, {"x": ["n", 3, 12, 12]}, {"y": ["n", 10]})


@pytest.mark.parametrize("options", [SYMMETRIC, {**SYMMETRIC, "reduce_range": True}, {}, {"per_channel": True}],
                         ids=["symmetric", "symmetric, 7-bit weights", "default", "per channel"])
def test_a_model_of_onnxruntimes_tool_deploys_in_mnn(options, tmp_path):
    batches = data()
    model = quantized(convolutions(), tmp_path, batches, **options)
    imported = import_qdq(model)
    result = deploy_onnx(model, imported.rewritten, batches[0], tmp_path / "net")
    assert result.conversion.coverage.fraction == 1.0 and not imported.coverage.missing
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db >= 35
    if options is not SYMMETRIC:
        # on processors without VNNI onnxruntime's own kernels saturate on eight-bit weights and signed activations
        found = run_model(result.mnn, batches[0])["y"]
        assert sqnr_db(int8_result(model, batches[0]), found) >= 35
    assert not imported.remarks


UNSIGNED = {
    "MLP": ("wide", "wide", "gemm"), "flatten": ("conv", "pool", "flatten", "gemm"), "mean": ("conv", "mean", "gemm"),
    "no activation": ("linear", "linear", "conv"), "max pool": ("conv", "pool", "conv", "mean", "gemm"),
    "max pool of signed values": ("linear", "pool", "conv", "mean", "gemm"),
    "residual": ("conv", "branch", "conv", "linear", "add", "conv"),
    "residual with ReLU": ("conv", "branch", "conv", "linear", "add", "relu", "branch", "conv", "linear", "add",
                           "relu", "mean", "gemm")}


@pytest.mark.parametrize("name", UNSIGNED)
def test_unsigned_activations_keep_all_their_levels(name, tmp_path):
    net, shape = network(*UNSIGNED[name]), (8, 3) if name == "MLP" else (8, 3, 12, 12)
    batches = data(shape=shape)
    model = quantized(net, tmp_path, batches, per_channel=True, reduce_range=True)
    imported = import_qdq(model)
    result = deploy_onnx(model, imported.rewritten, batches[0], tmp_path / "net")
    assert result.conversion.coverage.fraction == 1.0 and result.simulation_sqnr_db >= 100
    assert list(imported.remarks) == ["not rounded, since no quantized layer reads or writes them: t11/relu"] * (
        name == "residual with ReLU")
    found = run_model(result.mnn, batches[0])["y"].reshape(exact_result(model, batches[0]).shape)
    # one tie of these few outputs that is rounded the other way leaves 50 dB; the sum before a mean is float in MNN,
    # which leaves 43; a lost bit of the other tensors would leave 33
    assert sqnr_db(exact_result(model, batches[0]), found) >= (40 if name == "residual with ReLU" else 45)
    # seven-bit weights do not saturate onnxruntime's own int8 kernels
    assert sqnr_db(int8_result(model, batches[0]), found) >= 35


def test_zero_points_can_be_left_behind(tmp_path):
    batches = data()
    model = quantized(convolutions(), tmp_path, batches)
    imported = import_qdq(model, keep_zero_points=False)
    assert any("zero point" in remark for remark in imported.remarks)
    grids = [grid for layer in imported.rewritten.layers.values() for grid in (layer.input_grid, layer.output_grid)]
    assert all(grid.lower >= -128 and grid.upper <= 127 for grid in grids)
    result = deploy_onnx(model, imported.rewritten, batches[0], tmp_path / "net")
    assert result.simulation_sqnr_db >= 100 and 25 < result.reference_sqnr_db < deploy_onnx(
        model, import_qdq(model).rewritten, batches[0], tmp_path / "kept").reference_sqnr_db - 5


def test_a_pool_of_unsigned_levels_in_a_foreign_file_is_warned_of(tmp_path, caplog):
    net = network("conv", "pool", "conv")
    onnx.save(net, str(tmp_path / "net.onnx"))
    grid, weights = Grid(8, 0, 255), Grid(8, -127, 127)
    layers = [LayerParams("first", ("t1",), 0.1, 0.1, np.full(16, 0.01), weights, grid, weights),
              LayerParams("second", ("y__before_tr",), 0.1, 0.1, np.full(16, 0.01), grid, grid, weights)]
    save_algorithm(tmp_path / "p.bin", quantize_algorithm(layers), append=False)
    convert(tmp_path / "net.onnx", tmp_path / "net.mnn", tmp_path / "p.bin")
    assert "MNN computes it wrongly: Pooling of t2 (zero point -128)" in caplog.text


def test_symmetric_integers_are_taken_as_they_are(tmp_path):
    model = quantized(convolutions(), tmp_path, data(2), **SYMMETRIC)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layers = list(import_qdq(model).rewritten.layers.values())
    assert len(layers) == 5
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.levels, arrays["w%d_quantized" % index].reshape(layer.levels.shape))
        np.testing.assert_array_equal(layer.weight_scales, arrays["w%d_scale" % index])
        assert layer.input_grid == Grid(8, -128, 127)
    assert layers[0].input_scale == arrays["x_scale"]


def test_weights_with_a_zero_point_are_rounded_anew_and_said_to_be(tmp_path):
    batches = data()
    model = quantized(convolutions(), tmp_path, batches, weight_type=quantization.QuantType.QUInt8,
                      activation_type=quantization.QuantType.QUInt8)
    imported = import_qdq(model)
    assert sum("rounded anew" in remark for remark in imported.remarks) == 5
    result = deploy_onnx(model, imported.rewritten, batches[0], tmp_path / "net")
    assert result.conversion.coverage.fraction == 1.0
    assert result.reference_sqnr_db > 25


def test_layers_that_the_tool_left_float_stay_float(tmp_path):
    model = quantized(everything(), tmp_path, data(2, shape=(2, 3, 9, 9)), nodes_to_exclude=["deep"], **SYMMETRIC)
    imported = import_qdq(model)
    missing = {layer.name: layer.reason for layer in imported.coverage.missing}
    assert missing == {"deep": "its weights are not quantized in the file"}
    assert {layer.name for layer in imported.coverage.layers if layer.state is LayerState.INT8} >= {"grouped"}
    result = deploy_onnx(model, imported.rewritten, data(1, 5, (2, 3, 9, 9))[0], tmp_path / "net")
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db >= 35


def test_the_command_writes_the_files_and_says_what_it_found(tmp_path):
    model = quantized(convolutions(), tmp_path, data(2), **SYMMETRIC)
    np.savez(str(tmp_path / "x.npz"), **data(1, 3)[0])
    runner = CliRunner()
    words = ["import-qdq", str(tmp_path / "net.qdq.onnx"), "-o", str(tmp_path / "out")]
    plain = runner.invoke(cli, words)
    assert plain.exit_code == 0, plain.output
    assert "100.0 % of the weights asked for are int8" in plain.output
    result = json.loads(runner.invoke(cli, [*words, "--data", str(tmp_path / "x.npz"), "--json"]).output)
    assert result["coverage"] == 1.0 and result["reference_sqnr_db"] >= 35
    symmetric = json.loads(runner.invoke(cli, [*words, "--symmetric", "--json"]).output)
    assert symmetric["coverage"] == 1.0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "net.compress_params.bin", "net.mnn", "net.onnx"]
    assert model.graph.name == onnx.load(str(tmp_path / "out" / "net.onnx")).graph.name


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="no DequantizeLinear"):
        import_qdq(convolutions())
    scale, zero = np.float32(0.1), np.int8(0)
    model = model_of([helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                      helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])], {"s": scale, "z": zero},
                     {"x": [1, 2]}, {"y": [1, 2]})
    with pytest.raises(ConversionError, match="no layer that can be quantized"):
        import_qdq(model)
