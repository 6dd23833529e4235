"""Running models in MNN: the framework's own numbers, layouts, shapes; crashes stay in the child."""

import numpy as np
import pytest

from proto_layers import layer, save_layers
from sample_models import HAS_ONNX, run_onnx, save_onnx
from slimtrain.core import ConversionError, sqnr_db
from slimtrain.proto import convert, measure_latency, run_model
from slimtrain.proto import process as process_module
from slimtrain.proto.mnnfile import CONVERTER_CODE
from slimtrain.proto.runtime import execute


def test_float_model_computes_what_its_framework_computes(chain, float_mnn):
    outputs = run_model(float_mnn, chain.inputs)
    assert list(outputs) == list(chain.outputs) == ["y"]
    assert outputs["y"].dtype == np.float32
    assert sqnr_db(chain.outputs["y"], outputs["y"]) > 120


def test_int8_model_computes_what_was_simulated(deployed):
    outputs = run_model(deployed.path, deployed.sample.inputs)
    assert sqnr_db(deployed.outputs["y"], outputs["y"]) > 100


def test_one_input_needs_no_name_and_float64_is_converted(chain, float_mnn):
    (x,) = chain.inputs.values()
    expected = run_model(float_mnn, chain.inputs)["y"]
    np.testing.assert_array_equal(run_model(float_mnn, x.astype(np.float64))["y"], expected)
    np.testing.assert_array_equal(run_model(float_mnn, np.asfortranarray(x))["y"], expected)


def test_another_batch_size(chain, float_mnn):
    (x,) = chain.inputs.values()
    many = run_model(float_mnn, np.concatenate([x, 2 * x, x]))["y"]
    one = run_model(float_mnn, x)["y"]
    assert many.shape == (3, *one.shape[1:])
    np.testing.assert_allclose(many[2:], one, rtol=1e-6, atol=1e-6)


def test_shapes_may_differ_in_axes_of_size_one(chain, float_mnn):
    shape = chain.outputs["y"].shape
    output = run_model(float_mnn, chain.inputs, shapes={"y": (*shape, 1)})["y"]
    assert output.shape == (*shape, 1)
    with pytest.raises(ValueError, match="output 'y' has shape"):
        run_model(float_mnn, chain.inputs, shapes={"y": (4, -1)})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (
            {"nobody": np.zeros((1, 3, 8, 8), np.float32)},
            ConversionError,
            r"inputs are \['x'\], given .*nobody",
        ),
        ({}, ConversionError, "given were"),
        (np.zeros((0, 3, 8, 8), np.float32), ValueError, "is empty"),
        (np.zeros((1, 3, 8, 8), np.complex64), TypeError, "got complex64"),
        (np.array(["a"]), TypeError, "must hold"),
        (np.zeros((1, 5, 5, 5), np.float32), ConversionError, "running .*failed"),
    ],
)
def test_inputs_that_do_not_fit(float_mnn, inputs, error, message):
    with pytest.raises(error, match=message):
        run_model(float_mnn, inputs)


def test_broken_models_do_not_break_the_caller(tmp_path, chain):
    path = tmp_path / "broken.mnn"
    path.write_bytes(b"\x10" * 500)
    with pytest.raises(ConversionError, match="broken.mnn"):
        run_model(path, chain.inputs)
    with pytest.raises(ConversionError, match="no such model"):
        run_model(tmp_path / "none.mnn", chain.inputs)


def test_a_crash_of_the_runtime_is_an_error_of_ours(tmp_path, chain):
    """One weight scale for eight channels, converted behind the driver's back: MNN divides by zero."""
    conv = chain.convs[0]
    params = save_layers(str(tmp_path / "p.bin"), layer("conv", (conv.tensor,), channels=1))
    path = str(tmp_path / "m.mnn")
    words = ["mnnconvert", "-f", "ONNX" if HAS_ONNX else "TF", "--modelFile", chain.path, "--MNNModel", path]
    words += ["--compressionParamsFile", params]
    process_module.run_child(["-c", CONVERTER_CODE, *words], str(tmp_path), 60, "converting")
    with pytest.raises(ConversionError, match="native code crashed with SIG"):
        run_model(path, chain.inputs)


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
def test_two_float_operations_that_read_integers_in_another_size(tmp_path):
    """MNN crashes here if its session is sized for the model first and then for the inputs."""
    from onnx import helper

    rng = np.random.RandomState(0)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), helper.make_node("Sigmoid", ["c"], ["s"]),
             helper.make_node("Tanh", ["c"], ["t"]), helper.make_node("Add", ["s", "t"], ["a"]),
             helper.make_node("Conv", ["a", "v"], ["y"], pads=[1] * 4)]
    arrays = {"w": rng.randn(8, 3, 3, 3), "v": rng.randn(8, 8, 3, 3)}
    path = save_onnx(tmp_path / "m.onnx", nodes, {name: (value * 0.3).astype(np.float32) for name, value in
                                                  arrays.items()}, {"x": [2, 3, 12, 12]}, {"y": [2, 8, 12, 12]})
    params = save_layers(tmp_path / "p.bin", layer("a", ("c",), channels=8),
                         layer("b", ("y__before_tr",), channels=8))
    convert(path, tmp_path / "m.mnn", params)
    assert run_model(tmp_path / "m.mnn", rng.randn(1, 3, 12, 12).astype(np.float32))["y"].shape == (1, 8, 12, 12)


def test_latency(chain, float_mnn):
    assert len(execute(float_mnn, chain.inputs, repeats=3, warm_up=2).milliseconds) == 3
    assert 0 < measure_latency(float_mnn, chain.inputs, repeats=3, warm_up=0) < 1000
    with pytest.raises(ValueError, match="repeats"):
        measure_latency(float_mnn, chain.inputs, repeats=0)


def test_missing_mnn(float_mnn, chain, monkeypatch):
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install"):
        run_model(float_mnn, chain.inputs)


def test_children_work_in_the_folder_they_are_given(tmp_path):
    program = "import os; print(os.getcwd())"
    assert process_module.run_child(["-c", program], str(tmp_path), 60, "asking").strip() == str(tmp_path)


def test_relative_search_paths_reach_the_child(monkeypatch, tmp_path):
    (tmp_path / "helper_of_this_test.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")
    other = tmp_path / "other"
    other.mkdir()
    process_module.run_child(["-c", "import helper_of_this_test"], str(other), 60, "importing")


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
def test_names_of_any_kind_several_outputs_and_one_dimension(tmp_path):
    from onnx import helper

    rng = np.random.RandomState(0)
    arrays = {"w": rng.randn(4, 3, 3).astype(np.float32), "v": rng.randn(2, 3, 1).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["in/put:0", "w"], ["/a/b.c"], pads=[1, 1]),
        helper.make_node("Conv", ["in/put:0", "v"], ["file"]),
    ]
    shapes = {"/a/b.c": [2, 4, 7], "file": [2, 2, 7]}
    path = save_onnx(tmp_path / "m.onnx", nodes, arrays, {"in/put:0": [2, 3, 7]}, shapes)
    convert(path, tmp_path / "m.mnn")
    x = {"in/put:0": rng.randn(2, 3, 7).astype(np.float32)}
    outputs = run_model(tmp_path / "m.mnn", x, shapes)
    for name, expected in run_onnx(path, x).items():
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-5, atol=1e-5)
