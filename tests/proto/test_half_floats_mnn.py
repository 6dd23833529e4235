"""Half floats in the files of the real converter, bit by bit against numpy's rounding to the nearest."""

import os

import numpy as np
import pytest

from mnn_weights import decode, decode_halves, operators
from proto_layers import layer, save_layers
from sample_models import HAS_ONNX, pointwise, run_onnx, save_onnx
from slimtrain.core import ConversionError, sqnr_db
from slimtrain.proto import (
    ConvertOptions,
    PruneType,
    WeightOnlyParams,
    convert,
    estimate_sparse,
    inspect_model,
    prune_algorithm,
    run_model,
    save_algorithm,
)
from slimtrain.proto.half_floats import round_halves

HALF = ConvertOptions(fp16=True)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")


def assert_halves(found, weight):
    expected = np.asarray(weight).astype(np.float16).ravel()
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "half.mnn")


def test_every_weight_is_the_nearest_half(chain, out):
    convert(chain.path, out, options=HALF)
    halves = decode_halves(out)
    for conv in chain.convs:
        assert_halves(halves[conv.op_name], conv.weight)
    assert len(halves) == len(chain.convs)
    for name, expected in chain.outputs.items():
        # 62 dB where the last bits are cut off
        assert sqnr_db(expected, run_model(out, chain.inputs)[name].reshape(expected.shape)) > 68


def test_mnn_models_are_rounded_too_and_stay_as_they_are(float_mnn, chain, out):
    with open(float_mnn, "rb") as file:
        before = file.read()
    convert(float_mnn, out, options=HALF)
    for conv in chain.convs:
        assert_halves(decode_halves(out)[conv.op_name], conv.weight)
    with open(float_mnn, "rb") as file:
        assert file.read() == before
    again = out + ".again.mnn"
    convert(out, again, options=HALF)
    assert {name: values.tobytes() for name, values in decode_halves(again).items()} == {
        name: values.tobytes() for name, values in decode_halves(out).items()}


def test_integers_of_quantized_layers_do_not_change(chain, out, tmp_path):
    first, second, third = chain.convs
    params = save_layers(tmp_path / "p.bin", layer("a", (first.tensor,), channels=8, weight_scales=np.full(8, 0.0137)))
    whole = str(tmp_path / "whole.mnn")
    convert(chain.path, whole, params)
    result = convert(chain.path, out, params, HALF)
    assert result.coverage.fraction == 1.0
    levels, expected = decode(out), decode(whole)
    assert set(levels) == set(expected) == {first.op_name}
    np.testing.assert_array_equal(levels[first.op_name].levels, expected[first.op_name].levels)
    halves = decode_halves(out)
    assert set(halves) == {second.op_name, third.op_name}
    assert_halves(halves[second.op_name], second.weight)
    assert_halves(halves[third.op_name], third.weight)


def test_layers_that_mnn_stores_as_halves_instead_of_integers_are_rounded_too(chain, out, tmp_path, caplog):
    conv = chain.convs[2]
    params = save_layers(tmp_path / "p.bin", WeightOnlyParams("c", conv.op_name, 4))
    convert(chain.path, out, params, HALF, allow_partial=True)
    assert_halves(decode_halves(out)[conv.op_name], conv.weight)
    assert "as MNN cuts them" not in caplog.text


def test_halves_in_a_file_of_their_own(chain, out):
    result = convert(chain.path, out, options=ConvertOptions(fp16=True, extra=("--saveExternalData",)))
    with open(out + ".weight", "rb") as file:
        stored = file.read()
    assert result.bytes == os.path.getsize(out) + len(stored)
    for conv in chain.convs:
        assert conv.weight.astype(np.float16).tobytes() in stored


def test_asked_to_leave_zeros_out_halves_are_dense_all_the_same(tmp_path, out):
    weight = np.random.RandomState(0).randn(32, 32, 1, 1).astype(np.float32)
    weight[np.abs(weight) < 1.5] = 0
    sample = pointwise(tmp_path, weight, np.zeros(32, np.float32), np.ones((1, 32, 3, 3), np.float32))
    options = ConvertOptions(fp16=True, sparse=True)
    result = convert(sample.path, out, options=options)
    assert_halves(decode_halves(out)[sample.convs[0].op_name], weight)
    assert estimate_sparse(sample.path, None, options).expected == result.bytes


def convolution(folder, weight, *behind, **constants):
    """A convolution of [O, I, h, w] on 8x8 pixels and what stands behind it; the path, an input, what it computes."""
    from onnx import helper

    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), *behind]
    nodes[-1].output[0] = "y"
    size = 9 - weight.shape[2]
    path = save_onnx(folder / "net.onnx", nodes, {"w": weight, **constants}, {"x": [1, weight.shape[1], 8, 8]},
                     {"y": [1, len(weight), size, size]})
    x = np.random.RandomState(1).randn(1, weight.shape[1], 8, 8).astype(np.float32)
    return path, x, run_onnx(path, {"x": x})["y"]


@needs_onnx
def test_batch_norms_are_folded_before_rounding(tmp_path, out):
    from onnx import helper

    rng = np.random.RandomState(0)
    weight = rng.randn(8, 3, 3, 3).astype(np.float32)
    # powers of two, so that the product is exact in whatever order it is computed
    gamma, deviation = 2.0 ** rng.randint(-3, 3, 8), 2.0 ** rng.randint(-2, 2, 8)
    norm = {"gamma": gamma, "beta": rng.randn(8), "mean": rng.randn(8), "variance": deviation**2}
    path, x, expected = convolution(tmp_path, weight, helper.make_node(
        "BatchNormalization", ["c", *norm], ["n"], epsilon=0.0), **{
            name: values.astype(np.float32) for name, values in norm.items()})
    convert(path, out, options=HALF)
    (halves,) = decode_halves(out).values()
    assert_halves(halves, weight * (gamma / deviation).astype(np.float32).reshape(-1, 1, 1, 1))
    assert sqnr_db(expected, run_model(out, x)["y"]) > 68


@needs_onnx
@pytest.mark.parametrize("outputs", [96, 600])
def test_matrices_and_constants_are_rounded_and_integers_are_not(tmp_path, out, outputs):
    from onnx import helper

    rng = np.random.RandomState(0)
    arrays = {"w": rng.randn(128, outputs), "b": rng.randn(outputs), "factor": rng.randn(1, outputs)}
    arrays = {name: (values * 0.1).astype(np.float32) for name, values in arrays.items()}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["a"]),
             helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["s", "factor"], ["y"])]
    path = save_onnx(tmp_path / "net.onnx", nodes, arrays, {"x": [2, 128]}, {"y": [2, outputs]})
    convert(path, out, options=HALF)
    convert(path, tmp_path / "float.mnn")
    halves = decode_halves(out)
    assert_halves(halves["a__matmul_converted"], arrays["w"].T)
    assert_halves(halves["factor"], arrays["factor"])
    integers = [[(item["name"], item["main"]["int32s"]) for item in operators(str(file)) if item["type"] == "Const"
                 and "int32s" in item["main"]] for file in (out, tmp_path / "float.mnn")]
    assert integers[0] == integers[1] and integers[0]
    x = rng.randn(2, 128).astype(np.float32)
    assert sqnr_db(run_onnx(path, {"x": x})["y"], run_model(out, x)["y"]) > 68


@needs_onnx
def test_the_ends_of_the_half_floats(tmp_path, out, caplog):
    tie = np.float32(1 + 2**-11)
    values = [65504, 65519, 65520, 1e6, -1e6, np.inf, -np.inf, 6e-8, 2.9e-8, 3.1e-8, -3.1e-8, 1e-10, -1e-10, 0,
              6.1e-5, 6.1035e-5, tie, np.nextafter(tie, np.float32(2)), -tie, 1 + 3 * 2**-11, 1e-45, 2049, 2051]
    weight = np.array(values, np.float32).reshape(-1, 1, 1, 1)
    convert(convolution(tmp_path, weight)[0], out, options=HALF)
    (halves,) = decode_halves(out).values()
    with np.errstate(over="ignore"):
        assert_halves(halves, np.clip(weight, -65504, 65504))
    assert "beyond the largest half float" in caplog.text


@needs_onnx
def test_transposed_convolutions_and_branches(tmp_path, out):
    from onnx import TensorProto, helper

    rng = np.random.RandomState(0)
    weights = {name: rng.randn(4, 3, 3, 3).astype(np.float32) for name in ("w", "v")}
    weights["t"] = rng.randn(3, 4, 3, 3).astype(np.float32)
    shape = helper.make_tensor_value_info
    branches = [helper.make_graph([helper.make_node("Conv", ["u", name], [name + "_out"], pads=[1] * 4)], name, [],
                                  [shape(name + "_out", TensorProto.FLOAT, None)]) for name in ("w", "v")]
    nodes = [helper.make_node("ConvTranspose", ["x", "t"], ["up"]), helper.make_node("Relu", ["up"], ["r"]),
             helper.make_node("Conv", ["r", "k"], ["u"]), helper.make_node("ReduceSum", ["u"], ["sum"], keepdims=0),
             helper.make_node("Greater", ["sum", "zero"], ["condition"]),
             helper.make_node("If", ["condition"], ["y"], then_branch=branches[0], else_branch=branches[1])]
    weights.update(k=rng.randn(3, 4, 1, 1).astype(np.float32), zero=np.float32(0))
    path = save_onnx(tmp_path / "net.onnx", nodes, weights, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 10, 10]})
    convert(path, out, options=HALF)
    halves = decode_halves(out)
    assert_halves(halves["up"], weights["t"])
    for name in ("w", "v"):
        assert_halves(halves[name + "_out"], weights[name])


@needs_onnx
def test_channels_that_the_converter_removes(tmp_path, out):
    from onnx import helper

    rng = np.random.RandomState(0)
    weight, second = rng.randn(8, 3, 3, 3).astype(np.float32), rng.randn(4, 8, 3, 3).astype(np.float32)
    weight[[1, 4]] = 0
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("Conv", ["r", "v"], ["y"])]
    path = save_onnx(tmp_path / "net.onnx", nodes, {"w": weight, "v": second}, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 4, 4]})
    params = str(tmp_path / "p.bin")
    save_algorithm(params, prune_algorithm(PruneType.FILTER, ["w"], [0.25], ["c"]), append=False)
    convert(path, out, params, HALF)
    keep = [0, 2, 3, 5, 6, 7]
    assert [item.channels for item in inspect_model(out).layers] == [6, 4]
    assert_halves(decode_halves(out)["c"], weight[keep])
    assert_halves(decode_halves(out)["y"], second[:, keep])


@needs_onnx
def test_halves_of_another_model_are_left_alone(tmp_path, out):
    rng = np.random.RandomState(0)
    paths = []
    for index in range(2):
        path = convolution(tmp_path, rng.randn(4, 3, 3, 3).astype(np.float32))[0]
        paths.append(str(tmp_path / ("%d.mnn" % index)))
        convert(path, paths[-1])
    convert(path, out, options=HALF)
    before = decode_halves(out)["y"].tobytes()
    assert round_halves(out, paths[0]) == ((), ("y",))
    assert decode_halves(out)["y"].tobytes() == before
    assert round_halves(out, paths[1]) == ((), ())


@pytest.mark.parametrize("data", [b"x", b"\xff" * 64])
def test_what_is_no_model_is_one_clear_error(tmp_path, data):
    path = tmp_path / "broken.mnn"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="cannot make sense of the converted model"):
        round_halves(str(path), str(path))
