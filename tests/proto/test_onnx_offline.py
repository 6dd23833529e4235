"""Offline quantization of ONNX files made by hand: structure, exactness in MNN, options, bad input."""
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
pytest.importorskip("onnxruntime", reason="this environment has no onnxruntime")

from onnx import helper  # noqa: E402

from offline_models import everything, model_of, normal  # noqa: E402
from slimtrain.core import (  # noqa: E402
    ActivationMethod,
    ConversionError,
    Grid,
    IntegerConv,
    LayerState,
    WeightMethod,
    accumulate,
    sqnr_db,
)
from slimtrain.proto.onnx_check import run_onnx  # noqa: E402
from slimtrain.proto.onnx_deploy import deploy_onnx  # noqa: E402
from slimtrain.proto.onnx_equalization import equalize  # noqa: E402
from slimtrain.proto.onnx_geometry import conv_geometry  # noqa: E402
from slimtrain.proto.onnx_graph import OnnxGraph  # noqa: E402
from slimtrain.proto.onnx_normal import normal_form  # noqa: E402
from slimtrain.proto.onnx_offline import OfflineSettings, quantize_onnx  # noqa: E402
from slimtrain.proto.onnx_simulation import simulate_onnx  # noqa: E402


def batches(count=4, shape=(2, 3, 9, 9), seed=1, name="x"):
    rng = np.random.RandomState(seed)
    return [{name: rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def deployed(model, settings, folder, data=None):
    data = data or batches()
    quantized = quantize_onnx(model, data, settings)
    return quantized, deploy_onnx(model, quantized.rewritten, quantized.example, folder / "net")


@pytest.mark.parametrize("opset, listed", [(9, True), (13, False), (18, False)])
def test_normal_form_computes_the_same(opset, listed):
    model, x = everything(opset, listed), batches(1)[0]
    result = normal_form(model)
    assert sqnr_db(run_onnx(model, x)[0], run_onnx(result, x)[0]) > 100
    kinds = [node.op_type for node in result.graph.node]
    assert "BatchNormalization" not in kinds
    assert [value.name for value in result.graph.input] == ["x"]
    # the residual and the bias of the MatMul, which rewriting folds
    assert kinds.count("Add") == 2


@pytest.mark.parametrize("method", list(ActivationMethod), ids=lambda method: method.value)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_method_deploys_as_simulated(method, bits, tmp_path):
    quantized, result = deployed(everything(), OfflineSettings(method, bits=bits), tmp_path)
    assert result.simulation_sqnr_db >= 100
    assert result.conversion.coverage.fraction == 1.0
    assert result.reference_sqnr_db > (25 if bits == 8 else 5)
    assert [layer.name for layer in quantized.coverage.layers] == ["stem", "deep", "grouped", "gemm", "matmul"]
    assert {row.batches for row in quantized.tensors} == {4}


@pytest.mark.parametrize("opset, listed", [(9, True), (18, False)])
def test_old_and_new_files_deploy_as_simulated(opset, listed, tmp_path):
    _, result = deployed(everything(opset, listed), OfflineSettings(), tmp_path)
    assert result.simulation_sqnr_db >= 100
    assert result.conversion.coverage.fraction == 1.0


def test_few_samples_are_compared_and_all_where_the_model_fixes_the_batch():
    assert len(quantize_onnx(everything(), batches(1, (9, 3, 9, 9))).example["x"]) == 4
    model = everything()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 9
    assert len(quantize_onnx(model, batches(1, (9, 3, 9, 9))).example["x"]) == 9


def test_the_given_model_is_not_touched():
    model = everything()
    before = model.SerializeToString()
    quantize_onnx(model, batches(1))
    assert model.SerializeToString() == before


def test_simulation_of_a_lone_layer_is_that_of_numbers_on_their_grids():
    rng = np.random.RandomState(3)
    weight, bias = normal(rng, 4, 6), normal(rng, 4)
    model = model_of([helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)], {"w": weight, "b": bias},
                     {"x": ["n", 6]}, {"y": ["n", 4]})
    data = batches(1, (50, 6))
    quantized = quantize_onnx(model, data, OfflineSettings(ActivationMethod.MAX_ABS, WeightMethod.MAX_ABS))
    (layer,) = quantized.rewritten.layers.values()
    x = data[0]["x"].astype(np.float64)
    step = np.abs(x).max() / 127
    w_step = np.abs(weight).max(axis=1, keepdims=True) / 127.0
    real = (np.round(x / step) * step).dot((np.round(weight / w_step) * w_step).T) + bias
    y_step = np.abs(run_onnx(model, data[0])[0]).max() / 127
    expected = np.clip(np.round(real / y_step), -127, 127) * y_step
    found = simulate_onnx(quantized.rewritten, data[0])["y"]
    assert layer.input_scale == pytest.approx(step)
    assert np.abs(found - expected).max() < 1.01 * y_step  # a tie may fall to the other side
    assert (np.abs(found - expected) < 1e-4 * y_step).mean() > 0.99


def test_skipped_and_unsupported_layers_stay_float_with_their_reason(tmp_path):
    rng = np.random.RandomState(4)
    nodes = [helper.make_node("Conv", ["x", "w0"], ["c0"], name="a"),
             helper.make_node("ConvTranspose", ["c0", "w1"], ["t"], name="up"),
             helper.make_node("Conv", ["t", "w2"], ["c2"], name="b"),
             helper.make_node("Conv", ["c2", "w3"], ["y"], name="c")]
    constants = {"w0": normal(rng, 4, 3, 1, 1), "w1": normal(rng, 4, 4, 2, 2), "w2": normal(rng, 4, 4, 1, 1),
                 "w3": normal(rng, 2, 4, 1, 1)}
    model = model_of(nodes, constants, {"x": ["n", 3, 6, 6]}, {"y": ["n", 2, 7, 7]})
    # by the name of a node, and by that of an output, which MNN takes for the operator's
    for skip in ("b", "c2"):
        quantized, result = deployed(model, OfflineSettings(skip=(skip,)), tmp_path, batches(2, (1, 3, 6, 6)))
        states = {layer.name: (layer.state, layer.reason) for layer in quantized.coverage.layers}
        assert states["b"] == (LayerState.FLOAT, "skipped by name")
        assert states["up"][0] is LayerState.FLOAT and "transposed" in states["up"][1]
        assert states["a"][0] is states["c"][0] is LayerState.INT8
        assert result.simulation_sqnr_db >= 100
    with pytest.raises(ValueError, match="no layer matches 'nothing'"):
        quantize_onnx(model, batches(1, (1, 3, 6, 6)), OfflineSettings(skip=("nothing",)))


def test_a_matmul_that_is_added_to_another_tensor_keeps_that_addition(tmp_path):
    rng = np.random.RandomState(5)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "x"], ["s"]),
             helper.make_node("Add", ["s", "position"], ["y"])]
    constants = {"w": normal(rng, 6, 6), "position": normal(rng, 1, 5, 6)}
    model = model_of(nodes, constants, {"x": ["n", 5, 6]}, {"y": ["n", 5, 6]})
    _, result = deployed(model, OfflineSettings(), tmp_path, batches(2, (2, 5, 6)))
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db > 35


def test_a_constant_that_is_no_bias_stays_an_addition(tmp_path):
    rng = np.random.RandomState(10)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "position"], ["y"])]
    constants = {"w": normal(rng, 6, 6), "position": normal(rng, 1, 5, 6)}
    model = model_of(nodes, constants, {"x": ["n", 5, 6]}, {"y": ["n", 5, 6]})
    _, result = deployed(model, OfflineSettings(), tmp_path, batches(2, (2, 5, 6)))
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db > 35


def test_a_sum_is_on_its_grid_for_all_that_read_it(tmp_path):
    rng = np.random.RandomState(11)
    nodes = [helper.make_node("Conv", ["x", "w0"], ["a"]), helper.make_node("Conv", ["a", "w1"], ["b"]),
             helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Conv", ["s", "w2"], ["c"]),
             helper.make_node("Add", ["s", "c"], ["t"]), helper.make_node("Sigmoid", ["t"], ["y"])]
    constants = {name: normal(rng, 4, 4, 1, 1, gain=0.6) for name in ("w0", "w1", "w2")}
    model = model_of(nodes, constants, {"x": ["n", 4, 6, 6]}, {"y": ["n", 4, 6, 6]})
    _, result = deployed(model, OfflineSettings(bits=4), tmp_path, batches(2, (2, 4, 6, 6)))
    assert result.simulation_sqnr_db >= 100


def test_means_halfway_between_two_levels_round_as_the_device_rounds_them(tmp_path):
    """Both layers see 6 and so share a scale: of 16 levels, the mean of one in sixteen lies halfway between two."""
    rng = np.random.RandomState(12)
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
             helper.make_node("Clip", ["a", "zero", "six"], ["b"]),
             helper.make_node("GlobalAveragePool", ["b"], ["c"]),
             helper.make_node("Conv", ["c", "v"], ["y"], name="head")]
    constants = {"w": normal(rng, 64, 4, 1, 1), "v": normal(rng, 10, 64, 1, 1), "zero": np.float32(0),
                 "six": np.float32(6)}
    images = normal(rng, 8, 4, 4, 4, gain=3)
    images[0] = 40
    model = model_of(nodes, constants, {"x": [8, 4, 4, 4]}, {"y": [8, 10, 1, 1]})
    _, result = deployed(model, OfflineSettings(ActivationMethod.EMA), tmp_path, [{"x": images}])
    assert result.simulation_sqnr_db >= 100


@pytest.mark.parametrize("attributes", [
    {"auto_pad": "SAME_UPPER", "strides": [2, 1]}, {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    {"pads": [1, 0, 2, 3], "dilations": [1, 2]}, {"auto_pad": "VALID"}], ids=lambda value: str(sorted(value)))
def test_geometry_is_that_of_onnxruntime(attributes):
    rng = np.random.RandomState(12)
    x, weight = (rng.randint(-9, 10, size=shape) for shape in ((2, 4, 9, 8), (6, 2, 2, 3)))
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, **attributes)
    model = model_of([node], {"w": weight.astype(np.float32)}, {"x": ["n", 4, 9, 8]}, {"y": ["n", 6, "h", "w"]})
    (expected,) = run_onnx(model, {"x": x.astype(np.float32)})
    geometry = conv_geometry(node, weight.shape, x.shape[2:])
    assert geometry.kernel == (2, 3)
    conv = IntegerConv(weight, np.ones(6, np.float32), None, 1.0, 1.0, Grid(8, -127, 127), geometry.strides,
                       geometry.padding, geometry.dilation, 2)
    np.testing.assert_array_equal(accumulate(x, conv), expected)


@pytest.mark.parametrize("mode", ["SAME_LOWER", "SAME_UPPER"])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_padding_is_on_the_side_that_the_file_says(mode, stride, tmp_path):
    rng = np.random.RandomState(13)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride, stride])]
    outputs = {"y": ["n", 4, 8 // stride, 8 // stride]}
    model = model_of(nodes, {"w": normal(rng, 4, 3, 2, 3)}, {"x": ["n", 3, 8, 8]}, outputs)
    _, result = deployed(model, OfflineSettings(), tmp_path, batches(1, (1, 3, 8, 8)))
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db > 35


@pytest.mark.parametrize("mode", ["SAME_LOWER", "SAME_UPPER"])
@pytest.mark.parametrize("kernel, stride, size", [((1, 1), 3, (12, 12)), ((1, 3), 3, (12, 10)), ((3, 3), 5, (13, 10))])
def test_a_kernel_that_skips_values_begins_at_the_first(mode, kernel, stride, size, tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride, stride])]
    outputs = {"y": ["n", 4, *(-(-each // stride) for each in size)]}
    model = model_of(nodes, {"w": normal(np.random.RandomState(13), 4, 3, *kernel)}, {"x": ["n", 3, *size]}, outputs)
    _, result = deployed(model, OfflineSettings(), tmp_path, batches(1, (1, 3, *size)))
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db > 35


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_poolings_are_padded_on_the_side_that_the_file_says(kind, tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]),
             helper.make_node(kind, ["a"], ["b"], kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER"),
             helper.make_node("Conv", ["b", "v"], ["y"])]
    constants = {name: normal(np.random.RandomState(13), 4, inputs, 1, 1) for name, inputs in (("w", 3), ("v", 4))}
    model = model_of(nodes, constants, {"x": ["n", 3, 8, 7]}, {"y": ["n", 4, 4, 4]})
    _, result = deployed(model, OfflineSettings(), tmp_path, batches(1, (1, 3, 8, 7)))
    assert result.simulation_sqnr_db >= 100
    assert result.reference_sqnr_db > 25


def test_a_depthwise_bias_is_the_nearest_whole_number_of_accumulator_steps():
    quantized = quantize_onnx(everything(), batches(2))
    (layer,) = [layer for layer in quantized.rewritten.layers.values() if layer.name == "deep"]
    unit = np.float32(layer.input_scale) * layer.weight_scales
    steps = np.trunc(layer.bias / unit)  # as MNN stores it
    np.testing.assert_array_equal(steps, np.round(layer.float_bias.astype(np.float64) / unit))
    assert np.abs(steps).max() > 1


def test_clamps_narrow_the_levels(tmp_path):
    quantized, result = deployed(everything(), OfflineSettings(largest_level=100, largest_weight_level=63), tmp_path)
    layers = quantized.rewritten.layers.values()
    assert {layer.input_grid for layer in layers} == {Grid(8, -100, 100)}
    assert max(np.abs(layer.levels).max() for layer in layers) == 63
    assert result.simulation_sqnr_db >= 100


def unbalanced():
    """A net that per-tensor activations and depthwise weights suit badly: channels of very different range."""
    rng = np.random.RandomState(6)
    gain = (10.0 ** rng.uniform(-1.5, 1.5, size=(16, 1, 1, 1))).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c0"], ["r0"]),
             helper.make_node("Conv", ["r0", "w1"], ["c1"], group=16),
             helper.make_node("Relu", ["c1"], ["r1"]),
             helper.make_node("Conv", ["r1", "w2"], ["y"])]
    constants = {"w0": normal(rng, 16, 3, 3, 3) * gain, "b0": normal(rng, 16) * gain[:, 0, 0, 0],
                 "w1": np.abs(normal(rng, 16, 1, 1, 1)) + 0.2, "w2": normal(rng, 6, 16, 1, 1) / gain[:, 0][None]}
    return model_of(nodes, constants, {"x": ["n", 3, 9, 9]}, {"y": ["n", 6, 9, 9]})


def test_equalisation_keeps_the_function_and_gains_accuracy(tmp_path):
    model, x = unbalanced(), batches(1)[0]
    assert sqnr_db(run_onnx(model, x)[0], run_onnx(equalize(normal_form(model)), x)[0]) > 100
    _, plain = deployed(model, OfflineSettings(), tmp_path)
    _, equalized = deployed(model, OfflineSettings(equalize=True), tmp_path)
    assert equalized.reference_sqnr_db > plain.reference_sqnr_db + 6
    assert equalized.simulation_sqnr_db >= 100


def test_equalisation_stops_at_branches_and_at_relu6():
    graph = OnnxGraph(normal_form(everything()))
    before = {node.output[0]: graph.constant(node.input[1]) for node in graph.nodes if node.op_type == "Conv"}
    after = OnnxGraph(equalize(normal_form(everything())))
    for node in after.nodes:
        if node.op_type == "Conv":
            np.testing.assert_array_equal(after.constant(node.input[1]), before[node.output[0]])


def test_rounding_and_bias_by_data_gain_accuracy_at_four_bits(tmp_path):
    rng = np.random.RandomState(7)
    mixing = rng.normal(size=(3, 3))
    data = [{"x": np.einsum("ij,njhw->nihw", mixing, batch["x"] + 0.5).astype(np.float32)} for batch in batches(8)]
    results = {}
    for name, options in (("plain", {}), ("bias", {"correct_bias": True}), ("rounding", {"adaptive_rounding": True}),
                          ("both", {"correct_bias": True, "adaptive_rounding": True})):
        settings = OfflineSettings(weight_method=WeightMethod.MAX_ABS, bits=4, **options)
        _, results[name] = deployed(unbalanced_by_nothing(), settings, tmp_path, data)
        assert results[name].simulation_sqnr_db >= 100
    decibels = {name: result.reference_sqnr_db for name, result in results.items()}
    assert decibels["rounding"] > decibels["plain"] and decibels["both"] > decibels["plain"] + 0.5, decibels


def unbalanced_by_nothing():
    rng = np.random.RandomState(8)
    nodes = [helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c0"], ["r0"]), helper.make_node("Conv", ["r0", "w1"], ["y"])]
    constants = {"w0": normal(rng, 16, 3, 3, 3), "b0": normal(rng, 16), "w1": normal(rng, 6, 16, 3, 3)}
    return model_of(nodes, constants, {"x": ["n", 3, 9, 9]}, {"y": ["n", 6, 7, 7]})


def test_outliers_cost_two_decibels_less_than_with_the_largest_value(tmp_path):
    rng = np.random.RandomState(9)
    data = batches(8)
    # a few pixels of one batch are far out, as those of a broken sensor; quality is measured on another batch
    data[-1]["x"][rng.uniform(size=data[-1]["x"].shape) < 1 / 50] *= 12
    model = unbalanced_by_nothing()
    quality = {method: deployed(model, OfflineSettings(method), tmp_path, data)[1].reference_sqnr_db
               for method in ActivationMethod}
    assert max(quality.values()) >= quality[ActivationMethod.MAX_ABS] + 2, quality


@pytest.mark.parametrize("data, message", [
    ([], "at least one batch"),
    ([{"x": np.full((1, 3, 9, 9), np.nan, np.float32)}], "not finite"),
    ([{"z": np.zeros((1, 3, 9, 9), np.float32)}], "x"),
])
def test_bad_data_is_refused(data, message):
    with pytest.raises((ValueError, ConversionError), match=message):
        quantize_onnx(everything(), data)


def test_a_model_without_layers_is_refused():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [1, 2]}, {"y": [1, 2]})
    with pytest.raises(ConversionError, match="no layer that can be quantized"):
        quantize_onnx(model, [{"x": np.ones((1, 2), np.float32)}])


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 1}, {"largest_level": 0}, {"largest_weight_level": 128}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        OfflineSettings(**options)


def test_the_data_tells_the_sizes_that_the_model_leaves_open(tmp_path):
    """Two channels, taken where nothing is said, do not fit the weight."""
    rng = np.random.RandomState(0)
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": normal(rng, 4, 3, 3, 3)},
                     {"x": [None, None, None, None]}, {"y": [None, 4, None, None]})
    assert deployed(model, OfflineSettings(), tmp_path)[1].simulation_sqnr_db >= 100


def test_data_that_does_not_fit_the_layers_is_one_clear_error():
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": normal(np.random.RandomState(0), 4, 3, 3, 3)},
                     {"x": [None, None, None, None]}, {"y": [None, 4, None, None]})
    with pytest.raises(ConversionError, match=r"onnxruntime cannot run the model on x \(2, 5, 9, 9\)"):
        quantize_onnx(model, batches(shape=(2, 5, 9, 9)), OfflineSettings())
