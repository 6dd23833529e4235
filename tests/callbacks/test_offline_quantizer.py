"""Offline quantization in PyTorch: observers against the tensors themselves, accuracy on digits, deployment in MNN."""
from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from sklearn.datasets import load_digits
from torch import nn

from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, OfflineQuantizer, OfflineQuantizerCallback
from slimtrain.callbacks.onnx_export import export_float
from slimtrain.core import ActivationMethod, Observation, Role, WeightMethod, calibrated_scale, observe, weight_scales
from slimtrain.proto import run_model
from slimtrain.proto.cli import cli
from zoo import ZOO, lived_in

METHODS = [method.value for method in ActivationMethod]


class Digits(nn.Module):
    """A small convolutional network for the 8x8 digits of scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
            nn.Conv2d(32, 32, 1), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.features(x).mean([2, 3]))


@pytest.fixture(scope="module")
def digits():
    """A trained network, its training images and its test images with their classes; pixels 0..1."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.from_numpy(data.images[:, None] / 16).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(x))
    train, test = order[:1200], order[1200:]
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(12):
        for part in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[train[part]]), y[train[part]]).backward()
            optimizer.step()
    return model.eval(), x[train], x[test], y[test]


def accuracy(outputs, classes):
    return (torch.as_tensor(outputs).argmax(1) == classes).float().mean().item()


# -- observers


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_those_of_the_tensors_of_the_float_model(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    batches = [torch.randn(2, 3, 7, 7) * (index + 1) for index in range(3)]
    quantizer = OfflineQuantizer(model, method=method, weight_method="admm")
    assert quantizer.calibrate(batches) == 3
    seen = {"input": Observation(), "middle": Observation(), "output": Observation()}
    with torch.no_grad():
        for batch in batches:
            tensors = {"input": batch, "middle": F.relu(F.conv2d(batch, model[0].weight, model[0].bias))}
            tensors["output"] = F.conv2d(tensors["middle"], model[2].weight, model[2].bias)
            seen = {name: observe(seen[name], value.numpy()) for name, value in tensors.items()}
    for layer, role, name in (("0", Role.INPUT, "input"), ("0", Role.OUTPUT, "middle"), ("2", Role.OUTPUT, "output")):
        scales = quantizer.scales[layer]
        expected = calibrated_scale(seen[name], scales.grid(role), ActivationMethod(method))
        assert scales.activation_scale(role).item() == pytest.approx(expected, rel=1e-5)
    expected = weight_scales(model[0].weight.detach().numpy(), quantizer.scales["0"].weight_grid, WeightMethod.ADMM)
    np.testing.assert_array_equal(quantizer.scales["0"].weight.detach().numpy(), expected)
    assert quantizer.batches_seen() == {("0", "input"): 3, ("0", "output"): 3, ("2", "output"): 3}


def test_the_model_is_left_as_it_was():
    model = lived_in(Small()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    quantizer = OfflineQuantizer(model)
    quantizer.calibrate(iter([images(8)[0], images(8, 1)[0]]))
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    quantizer.strip_qat_ops()
    assert not any("slimtrain" in name for name, _ in model.named_parameters())


def test_calibrating_again_starts_from_nothing():
    model = Small()
    quantizer = OfflineQuantizer(model, method="max_abs")
    quantizer.calibrate([images(8)[0] * 10])
    quantizer.calibrate([images(8)[0]])
    once = OfflineQuantizer(Small(), method="max_abs")
    once.model.load_state_dict(model.state_dict())
    once.calibrate([images(8)[0]])
    for name, scales in once.scales.items():
        assert torch.equal(scales.activation, quantizer.scales[name].activation)


def test_no_batches_or_broken_ones_are_refused_and_leave_a_float_model():
    model, (x, _) = Small().eval(), images(8)
    expected = model(x)
    quantizer = OfflineQuantizer(model)
    with pytest.raises(ValueError, match="at least one batch"):
        quantizer.calibrate([])
    with pytest.raises(ValueError, match="not finite"):
        quantizer.calibrate([x, torch.full_like(x, float("nan"))])
    assert torch.equal(model(x), expected)


def test_layers_that_no_batch_reaches_are_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) if x.sum() > 0 else self.second(x)

    quantizer = OfflineQuantizer(Branching())
    quantizer.calibrate([torch.ones(2, 4)])
    assert [layer.name for layer in quantizer.coverage().missing] == ["second"]


@pytest.mark.parametrize("options, message", [({"method": "best"}, "'ema', 'kl'"), ({"bits": 9}, "2 to 8"),
                                              ({"weight_method": "kl"}, "'max_abs', 'admm', 'mse'")])
def test_bad_arguments_are_refused(options, message):
    for make in (lambda: OfflineQuantizer(Small(), **options), lambda: OfflineQuantizerCallback(**options)):
        with pytest.raises(ValueError, match=message):
            make()


def test_state_restores_scales_and_what_was_seen():
    model, (x, _) = lived_in(Small()).eval(), images(16)
    quantizer = OfflineQuantizer(model, method="kl", bits=6)
    quantizer.calibrate([x])
    state = quantizer.state_dict()
    quantizer.strip_qat_ops()
    again = OfflineQuantizer.from_state(model, state)
    assert (again.method, again.batches_seen()) == (ActivationMethod.KL, quantizer.batches_seen())
    expected = again.simulate(x)
    again.strip_qat_ops()
    torch.testing.assert_close(quantizer.simulate(x), expected, rtol=0, atol=0)


def test_memory_does_not_grow_with_the_batches():
    model, (x, _) = Small(), images(2)
    quantizer = OfflineQuantizer(model)

    def stored(count):
        quantizer.calibrate(x for _ in range(count))
        # what is kept of the data: a histogram per tensor, whatever the number of batches
        return sum(entry["counts"].numel() for entry in quantizer.state_dict()["seen"]), len(quantizer.batches_seen())

    assert stored(2) == stored(60)
    assert set(quantizer.batches_seen().values()) == {60}


def test_offline_mode_of_lsq_uses_the_same_observers():
    model, batches = lived_in(Small()), [images(8, seed)[0] for seed in range(4)]
    quantizer = LSQQuantizer(model, mode="offline")
    quantizer.calibrate(batches)
    assert {(entry["batches"], entry["counts"].sum().item() > 0) for entry in quantizer.state_dict()["seen"]} == {
        (4, True)}
    owner = quantizer.plan.calls[0].input
    seen = Observation()
    for batch in batches:
        seen = observe(seen, batch.numpy())
    expected = calibrated_scale(seen, quantizer.scales[owner.layer].grid(owner.role), ActivationMethod.MSE)
    assert quantizer.scales[owner.layer].activation_scale(owner.role).item() == pytest.approx(expected, rel=1e-5)


# -- what it is for


@pytest.mark.parametrize("name", ["ResNet-18-like", "MobileNetV2-like", "concat and channel shuffle", "MLP", "Conv1d"])
def test_networks_deploy_as_simulated(name, tmp_path):
    net = ZOO[name]
    model = lived_in(net.make())
    quantizer = OfflineQuantizer(model)
    quantizer.calibrate([torch.randn(net.shape) for _ in range(3)])
    deployed = quantizer.deploy(tmp_path / "m", torch.randn(net.shape), dynamo=False)
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 100


def test_means_halfway_between_two_levels_round_as_the_device_rounds_them(tmp_path):
    """The pool and the layer behind it share a scale, because both see 6: one mean in eight is a tie."""
    net = ZOO["MobileNetV2-like"]
    model = lived_in(net.make())
    generator = torch.Generator().manual_seed(0)
    quantizer = OfflineQuantizer(model, method="ema")
    quantizer.calibrate([torch.randn(net.shape, generator=generator) for _ in range(3)])
    deployed = quantizer.deploy(tmp_path / "m", torch.randn(net.shape, generator=generator), dynamo=False)
    assert deployed.sqnr_db >= 100


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(ZOO))
def test_all_networks_deploy_as_simulated_with_every_method(name, method, tmp_path):
    net = ZOO[name]
    model = lived_in(net.make())
    quantizer = OfflineQuantizer(model, method=method)
    quantizer.calibrate([torch.randn(net.shape) for _ in range(3)])
    deployed = quantizer.deploy(tmp_path / "m", torch.randn(net.shape))
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 100


@pytest.mark.parametrize("method", METHODS)
def test_digits_keep_their_accuracy_within_half_a_point(digits, method):
    model, train, x, y = digits
    before = accuracy(model(x).detach(), y)
    quantizer = OfflineQuantizer(model, method=method)
    quantizer.calibrate(train[:640].split(64))
    after = accuracy(quantizer.simulate(x), y)
    quantizer.strip_qat_ops()
    assert before > 0.97
    assert after >= before - 0.005


@pytest.fixture(scope="module")
def png_digits(digits, tmp_path_factory):
    """The digits network as an ONNX file that reads pixels 0..255 less a mean, and images of digits as PNG files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("digits")
    model, train, _, _ = digits
    exported = export_float(model, (train[:2],), {}, dynamo=False)
    exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    exported.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.save(exported, str(folder / "digits.onnx"))
    (folder / "images").mkdir()
    for index, image in enumerate(train[:96]):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(str(folder / "images" / ("%03d.png" % index)))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="MNN is not installed")
@pytest.mark.parametrize("method", ["KL", "ADMM", "EMA"])
def test_a_configuration_of_mnnquant_runs_unchanged_on_a_folder_of_images(digits, png_digits, method, tmp_path):
    _, _, x, y = digits
    (tmp_path / "mnnquant.json").write_text(json.dumps({
        "format": "GRAY", "mean": [0.0], "normal": [1 / 255], "width": 8, "height": 8,
        "path": str(png_digits / "images") + "/", "used_image_num": 64, "feature_quantize_method": method,
        "weight_quantize_method": "MAX_ABS", "feature_clamp_value": 127, "weight_clamp_value": 127, "batch_size": 16,
        "quant_bits": 8, "skip_quant_op_names": [], "input_type": "image", "debug": True}))
    result = CliRunner().invoke(cli, ["quantize", str(png_digits / "digits.onnx"), "--config",
                                      str(tmp_path / "mnnquant.json"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "scales from 4 batches" in result.output and "100.0 % of the weights asked for are int8" in result.output
    assert "saturated" in result.output
    (found,) = run_model(tmp_path / "out" / "digits.mnn", x.numpy()).values()
    assert accuracy(found.reshape(len(x), 10), y) >= 0.97


@pytest.mark.skipif(importlib.util.find_spec("MNN") is None, reason="MNN is not installed")
def test_the_command_says_what_it_measured(png_digits, tmp_path):
    words = ["quantize", str(png_digits / "digits.onnx"), "--data", str(png_digits / "images"), "--normal", "0.0039216",
             "--count", "40", "--batch-size", "8", "--method", "kl", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["coverage"] == 1.0 and report["simulation_sqnr_db"] >= 100 and report["reference_sqnr_db"] > 25
    assert {row["batches"] for row in report["tensors"]} == {5}
    assert len(report["layers"]) == 5
    failing = CliRunner().invoke(cli, [*words[:-1], "--min-sqnr", "90"])
    assert failing.exit_code == 1 and "is below 90 dB" in failing.output


@pytest.mark.parametrize("words, status, message", [
    (["quantize", "MODEL", "-o", "OUT"], 2, "--data or --config"),
    (["quantize", "MODEL", "--data", "missing.npz", "-o", "OUT"], 3, "cannot read arrays"),
    (["quantize", "MODEL", "--data", "IMAGES", "--skip", "nothing", "-o", "OUT"], 3, "no layer matches 'nothing'"),
    (["quantize", "missing.onnx", "--data", "IMAGES", "-o", "OUT"], 3, "cannot read the ONNX model"),
    (["quantize", "MODEL", "--data", "IMAGES", "--mean", "a", "-o", "OUT"], 2, "separated by commas"),
    (["quantize", "MODEL", "--config", "missing.json", "-o", "OUT"], 3, "cannot read the configuration"),
])
def test_wrong_usage_is_said_in_one_line(png_digits, words, status, message, tmp_path):
    places = {"MODEL": str(png_digits / "digits.onnx"), "IMAGES": str(png_digits / "images"), "OUT": str(tmp_path)}
    result = CliRunner().invoke(cli, [places.get(word, word) for word in words])
    assert (result.exit_code, message in result.output) == (status, True), result.output


# -- Lightning


def test_validating_once_calibrates_and_writes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model, callback = Lit(), OfflineQuantizerCallback(method="ema", export_to=str(tmp_path / "m"))
    session = trainer(tmp_path, callback, max_epochs=1)
    with torch.no_grad():
        float_loss = np.mean([F.cross_entropy(model.net.eval()(x), y).item() for x, y in loader()])
    (before,) = session.validate(model, loader(), verbose=False)
    assert before["val_loss"] == pytest.approx(float_loss, rel=1e-5)
    assert set(callback.quantizer.batches_seen().values()) == {len(loader())}
    assert (tmp_path / "m.onnx").exists() and (tmp_path / "m.compress_params.bin").exists()
    if callback.deployed is not None:
        assert callback.deployed.coverage.fraction == 1.0 and callback.deployed.sqnr_db >= 100
    (after,) = session.validate(model, loader(), verbose=False)
    assert set(callback.quantizer.batches_seen().values()) == {len(loader())}
    assert after["val_loss"] != before["val_loss"]
    assert after["val_loss"] == pytest.approx(float_loss, rel=0.05)
    other = OfflineQuantizer(model, method="ema")
    callback.quantizer.detach()
    other.calibrate(x for x, _ in loader())
    for name, scales in other.scales.items():
        torch.testing.assert_close(scales.activation, callback.quantizer.scales[name].activation)


def test_training_stays_float_until_it_is_validated(tmp_path, caplog):
    model, callback = Lit(), OfflineQuantizerCallback(export_to=str(tmp_path / "m"))
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader(), loader())
    assert not (tmp_path / "m.onnx").exists()
    assert "call trainer.validate" in caplog.text
