"""The command line: what it prints, for people and for programs, and the exit status a script can trust."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cli_runner import run
from proto_layers import layer, save_layers
from sample_models import HAS_ONNX
from slimtrain.proto import (
    VERSION,
    PruneType,
    inspect_model,
    load_simulation,
    params_from_json,
    prune_algorithm,
    read_params,
    run_model,
    save_algorithm,
    save_simulation,
    verify,
)

OK, CHECK_FAILED, USAGE, BAD_FILE = range(4)


@pytest.fixture
def params(tmp_path, chain):
    """Parameters of the first convolution of the chain."""
    conv = chain.convs[0]
    return save_layers(str(tmp_path / "p.bin"), layer("block[group 0].conv", (conv.tensor,), channels=8))


@pytest.fixture
def simulation(tmp_path, deployed):
    path = tmp_path / "sim.npz"
    save_simulation(path, deployed.sample.inputs, deployed.outputs, {"y": deployed.scale})
    return path


@pytest.fixture
def wrong_simulation(tmp_path, deployed):
    """The same with one value 5 steps off."""
    path = tmp_path / "wrong.npz"
    outputs = deployed.outputs["y"].copy()
    outputs.flat[0] += 5 * deployed.scale
    save_simulation(path, deployed.sample.inputs, {"y": outputs}, {"y": deployed.scale})
    return path


def test_version():
    assert run("--version")[:2] == (OK, f"slimtrain, version {VERSION}\n")


@pytest.mark.parametrize("command", [[], ["inspect"], ["convert"], ["verify"]])
def test_help_documents_the_exit_status(command):
    status, output, _ = run(*command, "--help")
    assert status == OK
    assert "1  a check failed" in output and "3  a file is missing or broken" in output


def test_inspect_parameters(params):
    save_algorithm(params, prune_algorithm(PruneType.SIMD_OC, ["w"], [0.25], ["fc"], [4]), append=True)
    status, output, _ = run("inspect", params)
    assert status == OK
    for text in (
        "block[group 0].conv",
        "int8",
        "0.5 in [-127, 127]",
        "8 x 0.125..0.125",
        "prune SIMD_OC",
        "25.0% zeros",
    ):
        assert text in output


def test_inspect_parameters_as_json(params, tmp_path):
    status, output, _ = run("inspect", params, "--json")
    assert status == OK
    assert params_from_json(output) == read_params(params)
    (tmp_path / "p.json").write_text(output)
    assert "block[group 0].conv" in run("inspect", tmp_path / "p.json")[1]


def test_inspect_a_model(float_mnn, chain):
    status, output, _ = run("inspect", float_mnn)
    assert status == OK
    assert "ConvolutionDepthwise" in output and "67.5%" in output
    assert f"{os.path.getsize(float_mnn):,} bytes" in output
    status, output, _ = run("inspect", float_mnn, "--json")
    value = json.loads(output)
    assert (value["path"], value["bytes"]) == (float_mnn, os.path.getsize(float_mnn))
    assert [item["tensor"] for item in value["layers"]] == [conv.tensor for conv in chain.convs]
    assert value["layers"][0]["state"] == "float"


def test_convert(chain, params, tmp_path):
    out = tmp_path / "out.mnn"
    status, output, errors = run("convert", chain.path, "--params", params, "-o", out)
    assert (status, errors) == (OK, "")
    assert "block[group 0].conv" in output and "100.0% of the weights asked for are int8" in output
    assert f"{out.stat().st_size:,} bytes" in output


def test_convert_as_json(chain, params, tmp_path):
    out = tmp_path / "out.mnn"
    status, output, _ = run(
        "convert", chain.path, "--params", params, "-o", out, "--weight-bits", 4, "--json"
    )
    value = json.loads(output)
    assert status == OK
    assert (value["coverage"], value["bytes"], value["path"]) == (1.0, out.stat().st_size, str(out))
    assert [(item["name"], item["state"]) for item in value["layers"]] == [("block[group 0].conv", "int8")]
    assert {item["state"] for item in value["unasked"]} == {"weight only"}


def test_all_storage_options_reach_the_converter(chain, tmp_path):
    out = tmp_path / "out.mnn"
    assert run("convert", chain.path, "-o", out, "--weight-bits", 3, "--asymmetric", "--hqq")[0] == OK
    assert {item.bits for item in inspect_model(out).layers} == {3}
    assert run("convert", chain.path, "-o", out, "--weight-bits", 8, "--block", 16, "--sparse")[0] == OK
    assert run("convert", chain.path, "-o", out, "--fp16")[0] == OK
    assert {item.bits for item in inspect_model(out).layers} == {16}


def test_sparse_alone_says_what_it_can_gain(chain, tmp_path):
    status, _, errors = run("convert", chain.path, "-o", tmp_path / "out.mnn", "--sparse")
    assert status == OK
    assert "only above 60 % zeros" in errors


def test_coverage_decides_the_status(chain, tmp_path):
    params = save_layers(str(tmp_path / "p.bin"), layer("lost", ("nowhere",)))
    out = tmp_path / "out.mnn"
    status, _, errors = run("convert", chain.path, "--params", params, "-o", out)
    assert status == CHECK_FAILED
    assert "lost is float: no convolution writes 'nowhere'" in errors
    assert not out.exists()
    status, output, _ = run("convert", chain.path, "--params", params, "-o", out, "--allow-partial")
    assert status == OK
    assert "0.0% of the weights asked for are int8" in output and out.exists()


def test_verify(deployed, simulation):
    status, output, errors = run("verify", deployed.path, "--reference", simulation, "--min-sqnr", 100)
    assert (status, errors) == (OK, "")
    assert "SQNR" in output and "bytes" in output and "ms" in output


def test_verify_below_the_limit(deployed, wrong_simulation):
    words = ["verify", deployed.path, "--reference", wrong_simulation, "--min-sqnr", 60]
    status, output, errors = run(*words, "--json")
    value = json.loads(output)
    assert status == CHECK_FAILED
    assert "dB is below 60 dB" in errors
    assert value["max_steps"] == pytest.approx(5, rel=1e-3)
    assert value["sqnr_db"] == verify(deployed.path, load_simulation(wrong_simulation), repeats=1).sqnr_db
    assert value["outputs"][0]["name"] == "y"
    assert value["bytes"] == os.path.getsize(deployed.path) and value["milliseconds"] > 0
    assert "5 │" in run(*words)[1]


def test_exactness_fits_into_json(tmp_path, float_mnn, chain):
    path = tmp_path / "sim.npz"
    save_simulation(path, chain.inputs, run_model(float_mnn, chain.inputs))
    status, output, _ = run("verify", float_mnn, "--reference", path, "--json", "--min-sqnr", 1000)
    assert status == OK
    assert json.loads(output)["sqnr_db"] == sys.float_info.max
    assert json.loads(output)["max_steps"] is None


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnxruntime")
def test_verify_against_onnx(float_mnn, chain, tmp_path):
    inputs = tmp_path / "x.npz"
    np.savez(str(inputs), **chain.inputs)
    words = ["verify", float_mnn, "--reference", chain.path, "--inputs", inputs, "--min-sqnr"]
    assert run(*words, 100)[0] == OK
    assert run(*words, 1000)[0] == CHECK_FAILED
    np.savez(str(inputs), x=np.zeros((0, 3, 8, 8), np.float32))
    assert run(*words, 100)[0] == BAD_FILE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paint"], "No such command"),
        (["convert", "m.onnx"], "Missing option '-o'"),
        (["convert", "m.onnx", "-o", "m.mnn", "--weight-bits", "9"], "2..8, got 9"),
        (["convert", "m.onnx", "-o", "m.mnn", "--weight-bits", "four"], "is not a valid integer"),
        (["convert", "m.onnx", "-o", "m.mnn", "--fp16", "--weight-bits", "8"], "exclude each other"),
        (["verify", "m.mnn", "--reference", "m.onnx"], "needs --inputs"),
        (["verify", "m.mnn", "--reference", "sim.npz", "--inputs", "x.npz"], "brings its own"),
    ],
)
def test_wrong_usage(words, message):
    status, _, errors = run(*words)
    assert status == USAGE
    assert message in errors


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "none.bin"],
        ["inspect", "none.json"],
        ["inspect", "none.mnn"],
        ["inspect", "broken.bin"],
        ["inspect", "broken.mnn"],
        ["convert", "none.onnx", "-o", "out.mnn"],
        ["convert", "broken.onnx", "-o", "out.mnn"],
        ["convert", "broken.onnx", "-o", "out.mnn", "--params", "none.bin"],
        ["verify", "broken.mnn", "--reference", "none.npz"],
        ["verify", "broken.mnn", "--reference", "broken.npz"],
        ["report", "broken.json"],
        ["report", "deep.json"],
        ["inspect", "deep.json"],
    ],
)
def test_bad_files(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for suffix in ("bin", "mnn", "onnx", "npz", "json"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"nothing of the kind")
    (tmp_path / "deep.json").write_text("[" * 100000)
    status, output, errors = run(*words)
    assert (status, output) == (BAD_FILE, "")
    assert errors.startswith("Error: ")
    assert not (tmp_path / "out.mnn").exists()


def test_a_model_that_mnn_cannot_read_is_no_traceback(simulation, tmp_path):
    broken = tmp_path / "broken.mnn"
    broken.write_bytes(b"nothing of the kind")
    status, _, errors = run("verify", broken, "--reference", simulation)
    assert status == BAD_FILE
    assert "MNN cannot read the model" in errors and "Traceback" not in errors


def test_a_pipeline_nested_without_end(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100000)
    status, _, errors = run("config", "check", path)
    assert status == CHECK_FAILED and "not YAML" in errors


def test_an_output_that_cannot_be_written(chain, tmp_path):
    status, _, errors = run("convert", chain.path, "-o", tmp_path / "no such folder" / "out.mnn")
    assert status == BAD_FILE
    assert "no such folder" in errors


def command(*words):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(os.path.abspath(part) for part in sys.path))
    program = "from slimtrain.proto.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_real_process(params, float_mnn, deployed, wrong_simulation):
    assert command("inspect", params).returncode == OK
    assert command("inspect", "none.bin").returncode == BAD_FILE
    assert command("inspect").returncode == USAGE
    done = command("verify", deployed.path, "--reference", wrong_simulation, "--min-sqnr", "60")
    assert done.returncode == CHECK_FAILED
    # Without a terminal: no spinner, no colours.
    assert "\x1b" not in done.stdout + done.stderr
    assert command("inspect", float_mnn, "--json").stderr == ""
