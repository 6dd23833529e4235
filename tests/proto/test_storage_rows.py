"""Every way to store a float model smaller: what the coverage says, how large it is, how far from the float model."""
import json

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="this environment has no ONNX")
pytest.importorskip("onnxruntime", reason="this environment has no onnxruntime")

from onnx import helper  # noqa: E402

from cli_runner import run  # noqa: E402
from offline_models import model_of, normal  # noqa: E402
from slimtrain.core import WeightMode, sqnr_db, stored_weight  # noqa: E402
from slimtrain.proto import run_model  # noqa: E402
from slimtrain.proto.onnx_check import run_onnx  # noqa: E402

WEIGHTS = {"w0": (32, 16, 3, 3), "w1": (64, 32, 1, 1), "w2": (48, 64)}
# options, bits in the file, how the weights are stored (None: not for us to know), and their block size
ROWS = {
    "fp16": (["--fp16"], 16, None, 0),
    "8 bits": (["--weight-bits", "8"], 8, WeightMode.SYMMETRIC, 0),
    "4 bits": (["--weight-bits", "4"], 4, WeightMode.SYMMETRIC, 0),
    "4 bits, asymmetric": (["--weight-bits", "4", "--asymmetric"], 4, WeightMode.ASYMMETRIC, 0),
    "4 bits, blocks": (["--weight-bits", "4", "--block", "16"], 4, WeightMode.SYMMETRIC, 16),
    "4 bits, hqq": (["--weight-bits", "4", "--asymmetric", "--hqq"], 4, None, 0),
}


def network(weights):
    nodes = [helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c0"], ["r0"]),
             helper.make_node("Conv", ["r0", "w1"], ["c1"]), helper.make_node("Relu", ["c1"], ["r1"]),
             helper.make_node("ReduceMean", ["r1"], ["p"], axes=[2, 3], keepdims=0),
             helper.make_node("Gemm", ["p", "w2"], ["y"], transB=1)]
    return model_of(nodes, weights, {"x": ["n", 16, 8, 8]}, {"y": ["n", 48]})


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder of a float model and an input for it, and its weights."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.RandomState(0)
    weights = {name: normal(rng, *shape) for name, shape in WEIGHTS.items()}
    onnx.save(network(weights), str(folder / "net.onnx"))
    np.savez(str(folder / "x.npz"), x=rng.normal(size=(4, 16, 8, 8)).astype(np.float32))
    return folder, weights


@pytest.fixture(scope="module")
def converted(sample):
    """What ``convert`` and ``verify`` say of each row."""
    folder, _ = sample
    found = {}
    for name, (options, *_) in ROWS.items():
        status, output, _ = run("convert", folder / "net.onnx", "-o", folder / (name + ".mnn"), *options, "--json")
        assert status == 0
        checked, verified, _ = run("verify", folder / (name + ".mnn"), "--reference", folder / "net.onnx", "--inputs",
                                   folder / "x.npz", "--json")
        assert checked == 0
        found[name] = json.loads(output), json.loads(verified)
    return found


@pytest.mark.parametrize("name", list(ROWS))
def test_every_layer_is_stored_as_asked(converted, name):
    conversion, _ = converted[name]
    layers = conversion["layers"] + conversion["unasked"]
    assert sum(layer["parameters"] for layer in layers) == sum(np.prod(shape) for shape in WEIGHTS.values())
    assert len(layers) == 3
    if name != "fp16":
        assert {layer["state"] for layer in layers} == {"weight only"}
    bits = ROWS[name][1]
    count = sum(layer["parameters"] for layer in layers)
    channels = sum(shape[0] for shape in WEIGHTS.values())
    scales = channels if ROWS[name][3] == 0 else sum(shape[0] * shape[1] // 16 for shape in WEIGHTS.values())
    # per scale a float for it and one for a minimum; a few kilobytes of graph
    assert conversion["bytes"] <= count * bits / 8 + 8 * scales + 4096


@pytest.mark.parametrize("name", [name for name in ROWS if name != "4 bits, hqq"])
def test_results_are_those_of_the_stored_weights(sample, name):
    folder, weights = sample
    _, bits, mode, block = ROWS[name]
    stored = {key: stored_weight(value, bits, mode, block).values if mode else np.float32(np.float16(value))
              for key, value in weights.items()}
    x = dict(np.load(str(folder / "x.npz")))
    (expected,) = run_onnx(network(stored), x)
    found = run_model(folder / (name + ".mnn"), x)["y"].reshape(expected.shape)
    assert sqnr_db(expected, found) > 100


def test_more_bits_finer_blocks_and_better_grids_are_closer_to_the_float_model(converted):
    quality = {name: verified["sqnr_db"] for name, (_, verified) in converted.items()}
    assert quality["fp16"] > quality["8 bits"] + 10 and quality["8 bits"] > 38
    assert quality["8 bits"] > quality["4 bits"] + 18
    for better in ("4 bits, asymmetric", "4 bits, blocks", "4 bits, hqq"):
        assert quality[better] > quality["4 bits"], quality
