"""The driver on the real converter: coverage, whole files, crashes explained, nothing over the network."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from proto_layers import layer, save_layers
from sample_models import HAS_ONNX, run_onnx, save_onnx
from slimtrain.core import ConversionError, CoverageError, LayerState, ParameterFileError
from slimtrain.proto import (
    ConvertOptions,
    PruneType,
    WeightOnlyParams,
    convert,
    inspect_model,
    params_to_json,
    prune_algorithm,
    quantize_algorithm,
    read_params,
    run_model,
    save_algorithm,
)
from slimtrain.proto import process as process_module
from slimtrain.proto.mnnfile import CONVERTER_CODE
from slimtrain.proto.runtime import _RUNNER, _START
from wire import FOREIGN_FILE, text

INT8 = LayerState.INT8


def full(conv, name, **changes):
    return layer(name, (conv.tensor,), channels=len(conv.weight), **changes)


@pytest.fixture
def params(tmp_path):
    return str(tmp_path / "compress_params.bin")


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out.mnn")


def test_every_wanted_layer_becomes_int8(chain, params, out):
    layers = [full(conv, f"layer{index}") for index, conv in enumerate(chain.convs)]
    result = convert(chain.path, out, save_layers(params, *layers))
    assert [(item.name, item.parameters, item.state) for item in result.coverage.layers] == [
        (f"layer{index}", conv.weight.size, INT8) for index, conv in enumerate(chain.convs)
    ]
    assert (result.coverage.fraction, result.unasked, result.path) == (1.0, (), out)
    assert result.bytes == os.path.getsize(out)
    assert {item.state for item in inspect_model(out).layers} == {INT8}


def test_a_layer_that_is_not_found_is_an_error_and_nothing_is_written(chain, params, out):
    layers = [full(chain.convs[0], "found"), layer("lost", ("nowhere",), channels=4)]
    with pytest.raises(CoverageError) as caught:
        convert(chain.path, out, save_layers(params, *layers))
    last = chain.convs[2].tensor
    reason = f"lost is float: no convolution writes 'nowhere'; unclaimed with 4 channels: '{last}'"
    assert "1 of 2 layers are compressed less" in str(caught.value)
    assert reason in str(caught.value)
    assert not os.path.exists(out)


def test_partial_coverage_on_request(chain, params, out, caplog):
    layers = [full(chain.convs[0], "found"), layer("lost", ("nowhere",), channels=4)]
    result = convert(chain.path, out, save_layers(params, *layers), allow_partial=True)
    assert result.coverage.fraction == 216 / 220
    assert [item.name for item in result.unasked] == [conv.op_name for conv in chain.convs[1:]]
    assert "lost stays float" in caplog.text
    assert os.path.getsize(out) == result.bytes


def test_full_and_weight_only_layers_in_one_file(chain, params, out):
    first, second, third = chain.convs
    wanted = [full(first, "a"), WeightOnlyParams("c", third.op_name, 4)]
    result = convert(chain.path, out, save_layers(params, *wanted))
    assert [item.state for item in result.coverage.layers] == [INT8]
    assert [(item.name, item.state) for item in result.weight_only.layers] == [("c", LayerState.WEIGHT_ONLY)]
    assert [(item.name, item.state) for item in result.unasked] == [(second.op_name, LayerState.FLOAT)]


def test_half_floats_do_not_pass_for_weight_only(chain, params, out):
    wanted = WeightOnlyParams("c", chain.convs[2].op_name, 4)
    with pytest.raises(CoverageError, match="c is float: the converter left the operator"):
        convert(chain.path, out, save_layers(params, wanted), ConvertOptions(fp16=True))


def test_json_parameters_are_as_good(chain, params, out, tmp_path):
    save_layers(params, full(chain.convs[0], "a"))
    as_json = tmp_path / "params.json"
    as_json.write_text(params_to_json(read_params(params)))
    other = str(tmp_path / "other.mnn")
    convert(chain.path, out, params)
    convert(chain.path, other, as_json)
    with open(out, "rb") as one, open(other, "rb") as two:
        assert one.read() == two.read()


def test_the_converter_itself_reads_our_json(chain, params, tmp_path):
    save_layers(params, full(chain.convs[0], "a"))
    (tmp_path / "p.json").write_text(params_to_json(read_params(params)))
    framework = "ONNX" if HAS_ONNX else "TF"
    words = [
        "-f",
        framework,
        "--modelFile",
        chain.path,
        "--MNNModel",
        "m.mnn",
        "--compressionParamsFile",
        "p.json",
    ]
    subprocess.check_call([sys.executable, "-c", CONVERTER_CODE, "mnnconvert", *words], cwd=str(tmp_path))
    states = [item.state for item in inspect_model(tmp_path / "m.mnn").layers]
    assert states == [INT8, LayerState.FLOAT, LayerState.FLOAT]


def test_symmetric_weights_keep_their_zeros(chain, tmp_path):
    results = {}
    for asymmetric in (False, True):
        path = tmp_path / f"{asymmetric}.mnn"
        convert(chain.path, path, options=ConvertOptions(weight_bits=2, asymmetric=asymmetric))
        results[asymmetric] = {item.state for item in inspect_model(path).layers}, os.path.getsize(path)
    assert results[False][0] == results[True][0] == {LayerState.WEIGHT_ONLY}
    # A minimum beside every scale: the default that the option is there to turn off.
    assert results[False][1] < results[True][1]


def test_mnn_models_convert_again(float_mnn, chain, params, out):
    result = convert(float_mnn, out, save_layers(params, full(chain.convs[0], "a")))
    assert result.coverage.fraction == 1.0


def test_external_weights_are_published_with_the_model(chain, out):
    result = convert(chain.path, out, options=ConvertOptions(extra=("--saveExternalData",)))
    assert result.bytes == os.path.getsize(out) + os.path.getsize(out + ".weight")


@pytest.mark.parametrize(
    ("channels", "message"), [(7, "SIGSEGV|SIGABRT"), (1, "the converted model would crash")]
)
def test_a_wrong_number_of_scales_is_explained(chain, params, out, channels, message):
    save_layers(params, layer("block.conv", (chain.convs[0].tensor,), channels=channels))
    with pytest.raises(ConversionError, match=message) as caught:
        convert(chain.path, out, params)
    assert f"layer 'block.conv': {channels} weight scales for 8 output channels" in str(caught.value)
    assert not os.path.exists(out)


def test_other_writers_files_are_converted_with_a_warning(chain, params, out, caplog):
    with open(params, "wb") as file:
        file.write(FOREIGN_FILE.replace(text(1, "y"), text(1, "q")))
    with pytest.raises(CoverageError, match="w is float: no convolution writes 'q'"):
        convert(chain.path, out, params)
    assert "layer 'w': input bits must be 8, got 4" in caplog.text


@pytest.mark.parametrize("name", ["none.onnx", "model.tflite", "model"])
def test_models_that_cannot_be_converted(tmp_path, out, name):
    if name != "none.onnx":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConversionError, match="no such model|suffix"):
        convert(tmp_path / name, out)


@pytest.mark.parametrize("suffix", [".onnx", ".pb", ".mnn"])
@pytest.mark.parametrize("data", [b"", b"no model at all"])
def test_broken_models_are_one_clear_error(tmp_path, out, suffix, data):
    path = tmp_path / ("broken" + suffix)
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="broken"):
        convert(path, out)
    assert not os.path.exists(out)


def test_missing_parameters_are_an_error_before_the_converter_runs(chain, out, monkeypatch):
    monkeypatch.setattr(process_module.subprocess, "run", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(ParameterFileError, match="No such file"):
        convert(chain.path, out, "no_such_params.bin")


def test_missing_mnn_says_how_to_install_it(chain, out, monkeypatch):
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="python -m pip install 'MNN>=3.6'"):
        convert(chain.path, out)


def test_a_converter_that_hangs_is_stopped(chain, out):
    with pytest.raises(ConversionError, match="stopped, not done after 0.001 s"):
        convert(chain.path, out, timeout=0.001)


def test_the_old_model_stays_when_conversion_fails(chain, params, out):
    with open(out, "wb") as file:
        file.write(b"old")
    with pytest.raises(CoverageError):
        convert(chain.path, out, save_layers(params, layer("lost", ("nowhere",))))
    with open(out, "rb") as file:
        assert file.read() == b"old"


def test_conversions_side_by_side(chain, params, tmp_path):
    save_layers(params, full(chain.convs[0], "a"))
    paths = [str(tmp_path / f"{index}.mnn") for index in range(4)]
    threads = [threading.Thread(target=convert, args=(chain.path, path, params)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = set()
    for path in paths:
        with open(path, "rb") as file:
            files.add(file.read())
    assert len(files) == 1


WATCH = """
import os, sys
log = os.path.join(os.path.dirname(__file__), "log.txt")
def note(what):
    with open(log, "a") as file:
        file.write(what + "\\n")
note("started")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("MNN.tools", "aliyun", "requests", "urllib3", "pip")):
            note(name)
sys.meta_path.insert(0, Finder())
import socket
class Socket(socket.socket):
    def connect(self, *args):
        note("connect")
        raise OSError("no network here")
socket.socket = Socket
os.system = lambda command: note("system")
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Children note here when they start, import a logger or a downloader, connect, or run a command."""
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    monkeypatch.syspath_prepend(str(folder))
    return folder / "log.txt"


def test_children_do_not_phone_home(chain, params, out, watched):
    convert(chain.path, out, save_layers(params, full(chain.convs[0], "a")))
    run_model(out, chain.inputs)
    assert watched.read_text().split() == ["started"] * 3


def test_the_watch_notices_the_wrapper_that_does(watched, tmp_path):
    with pytest.raises(ConversionError):
        process_module.run_child(
            ["-c", "import MNN.tools.mnnconvert, no_such_module"], str(tmp_path), 60, "test"
        )
    assert "MNN.tools" in watched.read_text()


def test_the_runner_is_started_without_its_folder_on_the_path():
    assert os.path.isfile(_RUNNER)
    assert "sys.path" not in _START


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
def test_groups_are_layers_of_their_own(tmp_path, params, out):
    from onnx import helper

    rng = np.random.RandomState(0)
    weight = rng.randn(8, 2, 3, 3).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], group=2),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    path = save_onnx(tmp_path / "g.onnx", nodes, {"w": weight}, {"x": [1, 4, 6, 6]}, {"y": [1, 8, 6, 6]})
    groups = [layer(f"conv[group {k}]", (f"c___output___{k}",), channels=4) for k in range(2)]
    result = convert(path, out, save_layers(params, *groups))
    assert [(item.name, item.parameters, item.state) for item in result.coverage.layers] == [
        ("conv[group 0]", weight.size // 2, INT8),
        ("conv[group 1]", weight.size // 2, INT8),
    ]


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
def test_both_spellings_of_a_graph_output(tmp_path, params, out):
    from onnx import helper

    weight = np.ones((2, 3, 1, 1), np.float32)
    path = save_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        {"w": weight},
        {"x": [1, 3, 4, 4]},
        {"y": [1, 2, 4, 4]},
    )
    result = convert(path, out, save_layers(params, layer("conv", ("y", "y__before_tr"))))
    assert [(item.name, item.state) for item in result.coverage.layers] == [("conv", INT8)]
    x = np.ones((1, 3, 4, 4), np.float32)
    np.testing.assert_allclose(run_model(out, x)["y"], run_onnx(path, {"x": x})["y"])


def test_appending_pruning_changes_nothing_for_quantization(chain, params, out):
    save_algorithm(params, prune_algorithm(PruneType.RANDOM, ["w"], [0.5], ["layer"]), append=False)
    save_algorithm(params, quantize_algorithm([full(chain.convs[0], "a")]), append=True)
    assert convert(chain.path, out, params).coverage.fraction == 1.0


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
@pytest.mark.parametrize("is_first", [False, True])
def test_offsets_that_mnn_adds_before_an_activation_are_warned_of(tmp_path, out, caplog, is_first):
    from onnx import helper

    rng = np.random.RandomState(0)
    arrays = {"w": rng.randn(2, 3, 1, 1).astype(np.float32), "k": np.full((1, 2, 1, 1), -2, np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("Add", ["k", "r"] if is_first else ["r", "k"], ["y"])]
    path = save_onnx(tmp_path / "m.onnx", nodes, arrays, {"x": [1, 3, 4, 4]}, {"y": [1, 2, 4, 4]})
    convert(path, out)
    x = rng.randn(1, 3, 4, 4).astype(np.float32)
    is_right = np.allclose(run_model(out, x)["y"], run_onnx(path, {"x": x})["y"], atol=1e-5)
    assert ("Add of y (its constant is added before the activation r" in caplog.text) == (not is_right)
    assert is_right == is_first
