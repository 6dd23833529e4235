"""Models that onnxruntime's own tool has quantized, taken over and run by MNN."""
import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
quantization = pytest.importorskip("onnxruntime.quantization", reason="this environment has no onnxruntime")

from click.testing import CliRunner  # noqa: E402
from onnx import helper  # noqa: E402

from offline_models import everything, model_of, normal  # noqa: E402
from slimtrain.core import ConversionError, Grid, LayerState, sqnr_db  # noqa: E402
from slimtrain.proto.cli import cli  # noqa: E402
from slimtrain.proto.onnx_check import open_session  # noqa: E402
from slimtrain.proto.onnx_deploy import deploy_onnx  # noqa: E402
from slimtrain.proto.onnx_qdq import import_qdq  # noqa: E402
from slimtrain.proto.runtime import run_model  # noqa: E402

SYMMETRIC = {"activation_type": quantization.QuantType.QInt8, "weight_type": quantization.QuantType.QInt8,
             "per_channel": True, "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}}


class Reader(quantization.CalibrationDataReader):
    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(self.batches, None)


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
    assert any("zero point" in remark for remark in imported.remarks) == ("extra_options" not in options)


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
