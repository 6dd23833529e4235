"""Verification: numbers that can be checked by hand, references of both kinds, and what does not belong together."""

import numpy as np
import pytest

from sample_models import HAS_ONNX
from slimtrain.core import ConversionError
from slimtrain.proto import Simulation, load_inputs, load_simulation, save_simulation, verify
from slimtrain.proto.runtime import Run
from slimtrain.proto.verification import _compare


def recording(deployed, **changes):
    fields = {"inputs": deployed.sample.inputs, "outputs": deployed.outputs, "scales": {"y": deployed.scale}}
    fields.update(changes)
    return Simulation(**fields)


def test_int8_model_against_its_simulation(deployed):
    result = verify(deployed.path, recording(deployed), repeats=2)
    with open(deployed.path, "rb") as file:
        assert result.bytes == len(file.read())
    assert result.sqnr_db > 100
    assert result.max_steps < 1e-3
    assert 0 < result.milliseconds < 1000
    assert [output.name for output in result.outputs] == ["y"]


def test_one_wrong_value_of_three_steps(deployed):
    outputs = {"y": deployed.outputs["y"].copy()}
    outputs["y"].flat[7] += 3 * deployed.scale
    result = verify(deployed.path, recording(deployed, outputs=outputs), repeats=1)
    signal = np.sum(outputs["y"].astype(np.float64) ** 2)
    assert result.max_steps == pytest.approx(3, rel=1e-3)
    assert result.max_error == pytest.approx(3 * deployed.scale, rel=1e-3)
    assert result.sqnr_db == pytest.approx(10 * np.log10(signal / (3 * deployed.scale) ** 2), abs=0.01)


def test_steps_come_from_the_model_when_nobody_says_them(deployed):
    outputs = {"y": deployed.outputs["y"] + np.float32(2 * deployed.scale)}
    result = verify(deployed.path, recording(deployed, outputs=outputs, scales={}), repeats=1)
    assert result.max_steps == pytest.approx(2, rel=1e-3)


def test_a_float_model_has_no_steps(chain, float_mnn):
    result = verify(float_mnn, Simulation(chain.inputs, chain.outputs, {}), repeats=1)
    assert result.max_steps is None
    assert result.sqnr_db > 120


def test_a_model_that_is_not_finite_fails_every_check():
    wanted, got = np.ones((2, 2), np.float32), np.array([[1, np.nan], [1, 1]], np.float32)
    assert _compare("y", wanted, got, 0.5)[1:] == (float("-inf"), float("inf"), float("inf"))
    assert _compare("y", wanted, wanted, None)[1:] == (float("inf"), 0.0, None)


def test_outputs_that_the_model_lacks(deployed):
    two = {"y": deployed.outputs["y"], "z": deployed.outputs["y"]}
    with pytest.raises(ConversionError, match=r"output 'z', the model has \['y'\]"):
        verify(deployed.path, recording(deployed, outputs=two), repeats=1)


def test_single_outputs_need_not_have_the_same_name(deployed):
    outputs = {"module.y": deployed.outputs["y"]}
    assert verify(deployed.path, recording(deployed, outputs=outputs, scales={}), repeats=1).sqnr_db > 100


def test_the_worst_output_counts(deployed, monkeypatch):
    y = deployed.outputs["y"]
    run = Run({"y": y, "z": y + np.float32(2)}, (1.0, 3.0, 2.0))
    monkeypatch.setattr("slimtrain.proto.verification.execute", lambda *args, **kwargs: run)
    twins = recording(deployed, outputs={"y": y, "z": y}, scales={"y": 0.5, "z": 0.5})
    result = verify(deployed.path, twins)
    assert result.sqnr_db == result.outputs[1].sqnr_db < result.outputs[0].sqnr_db
    assert (result.max_error, result.max_steps) == (pytest.approx(2), pytest.approx(4))
    assert result.milliseconds == 2.0


def test_other_shapes_do_not_belong_together(deployed):
    outputs = {"y": deployed.outputs["y"][:1]}
    with pytest.raises(ConversionError, match="do not belong together"):
        verify(deployed.path, recording(deployed, outputs=outputs), repeats=1)


def test_inputs_are_given_once(deployed):
    with pytest.raises(ValueError, match="brings its own"):
        verify(deployed.path, recording(deployed), inputs=deployed.sample.inputs)
    with pytest.raises(ValueError, match="needs inputs"):
        verify(deployed.path, "reference.onnx")
    with pytest.raises(ValueError, match="repeats"):
        verify(deployed.path, recording(deployed), repeats=0)


def test_recordings_survive_the_file(tmp_path, deployed):
    path = tmp_path / "sim.npz"
    outputs = {"/a/b:0": np.arange(3, dtype=np.float32), "file": np.float32([7])}
    save_simulation(path, {"x": np.zeros((1, 2))}, outputs, {"file": 0.1})
    loaded = load_simulation(path)
    np.testing.assert_array_equal(loaded.outputs["/a/b:0"], outputs["/a/b:0"])
    assert (set(loaded.inputs), set(loaded.outputs), loaded.scales) == ({"x"}, set(outputs), {"file": 0.1})


def test_recordings_are_checked(tmp_path):
    x = {"x": np.zeros(1)}
    for inputs, outputs, scales in (({}, x, {}), (x, {}, {}), (x, x, {"y": 1.0})):
        with pytest.raises(ValueError, match="needs inputs and outputs|do not exist"):
            save_simulation(tmp_path / "sim.npz", inputs, outputs, scales)
    assert not list(tmp_path.iterdir())


def test_other_files_are_one_clear_error(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ConversionError, match="a.npz"):
        load_inputs(path)
    for data in (b"", b"no archive", b"PK\x03\x04 broken"):
        path.write_bytes(data)
        with pytest.raises(ConversionError, match="a.npz: cannot read arrays"):
            load_inputs(path)
    np.savez(str(path), x=np.zeros(1))
    with pytest.raises(ConversionError, match="not a recorded simulation, it holds an array 'x'"):
        load_simulation(path)
    np.savez(str(path), **{"input:x": np.zeros(1)})
    with pytest.raises(ConversionError, match="outputs are missing"):
        load_simulation(path)
    np.savez(str(path), x=np.array([{"pickle": 1}], dtype=object))
    with pytest.raises(ConversionError, match="cannot read arrays"):
        load_inputs(path)


def test_inputs_with_and_without_names(tmp_path):
    np.savez(str(tmp_path / "a.npz"), np.arange(3))
    np.testing.assert_array_equal(load_inputs(tmp_path / "a.npz"), np.arange(3))
    np.savez(str(tmp_path / "b.npz"), x=np.arange(3))
    assert list(load_inputs(tmp_path / "b.npz")) == ["x"]


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnxruntime")
def test_against_onnx(chain, float_mnn, tmp_path):
    (x,) = chain.inputs.values()
    assert verify(float_mnn, chain.path, chain.inputs, repeats=1).sqnr_db > 120
    assert verify(float_mnn, chain.path, x, repeats=1).sqnr_db > 120
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ConversionError, match="onnxruntime cannot run .*broken.onnx"):
        verify(float_mnn, tmp_path / "broken.onnx", chain.inputs)


@pytest.mark.skipif(HAS_ONNX, reason="onnxruntime is there")
def test_without_onnxruntime_the_way_to_install_it_is_said(chain, float_mnn):
    with pytest.raises(ConversionError, match="pip install onnxruntime"):
        verify(float_mnn, "reference.onnx", chain.inputs)
