"""Low-bit weights: the torch operation against the core, the trained integers against those inside the .mnn."""
from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mnn_weights import decode
from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import WeightQuantizer, WeightQuantizerCallback
from slimtrain.callbacks.weight_fake_quant import store_weight
from slimtrain.core import LayerState, SlimtrainError, WeightMode, stored_weight
from slimtrain.proto import ConvertOptions, convert, inspect_model, read_params, run_model

MODES = list(WeightMode)


class Varied(nn.Module):
    """Every kind of layer that can be stored, batch norms of either sign, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.twice = nn.Conv2d(32, 32, 1)
        self.grouped = nn.Conv2d(32, 64, 3, groups=2)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(64)
        self.line = nn.Conv1d(64, 16, 3)
        self.token = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5, bias=False)
        for norm in (self.norm, self.depthwise_norm):
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.twice(torch.relu(self.twice(x))))
        x = F.relu(self.depthwise_norm(self.depthwise(self.grouped(x))))
        x = self.line(x.flatten(2))
        return self.head(F.relu(self.token(x.transpose(1, 2))).mean(1))


# -- the operation

SHAPES = st.sampled_from([(3, 32, 3, 3), (5, 1, 3, 3), (2, 48), (4, 16, 5), (1, 1, 1, 1)])


@settings(max_examples=60)
@given(SHAPES, st.integers(2, 8), st.sampled_from(MODES), st.sampled_from([0, 16]), st.integers(0, 2**31),
       st.sampled_from([1e-7, 1e-3, 1.0, 1e4]))
def test_operation_gives_the_values_of_the_core(shape, bits, mode, block, seed, size):
    weight = np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * np.float32(size)
    stored = store_weight(torch.from_numpy(weight), bits, mode, block)
    np.testing.assert_array_equal(stored.numpy(), stored_weight(weight, bits, mode, block).values)


@pytest.mark.parametrize("mode", MODES)
def test_float64_runs_use_the_float32_grid(mode):
    weight = torch.randn(4, 16, 3, 3)
    np.testing.assert_array_equal(store_weight(weight.double(), 3, mode).numpy(),
                                  store_weight(weight, 3, mode).double().numpy())


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_straight_through_and_reaches_the_largest_weight(mode):
    weight = torch.randn(3, 40, requires_grad=True)
    upstream = torch.randn(3, 40)
    store_weight(weight, 3, mode).backward(upstream)
    expected = upstream.double().numpy().copy()
    for row, (values, dy) in enumerate(zip(weight.detach().double().numpy(), upstream.double().numpy())):
        low = 0.0 if mode is WeightMode.SYMMETRIC else values.min()
        top = 3 if mode is WeightMode.SYMMETRIC else 7
        scale = (np.abs(values).max() if mode is WeightMode.SYMMETRIC else values.max() - low) / top
        position = (values - low) / scale
        slope = np.sum(dy * (np.sign(position) * np.floor(np.abs(position) + 0.5) - position)) / top
        if mode is WeightMode.SYMMETRIC:
            largest = np.abs(values).argmax()
            expected[row, largest] += np.sign(values[largest]) * slope
        else:
            expected[row, values.argmax()] += slope
            expected[row, values.argmin()] -= slope
    np.testing.assert_allclose(weight.grad.numpy(), expected, atol=1e-5)


# -- on a model


def test_model_stays_the_users_and_strip_gives_the_float_model_back():
    model, (x, _) = Small().eval(), images(4)
    parameters, keys, before = list(model.parameters()), list(model.state_dict()), model(x)
    quantizer = WeightQuantizer(model, 2)
    assert quantizer.convert() is model
    assert all(now is then for now, then in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == keys
    stored = model(x)
    assert not torch.equal(stored, before)
    quantizer.strip_wq_ops()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    quantizer.resume_wq_graph()
    torch.testing.assert_close(model(x), stored, rtol=0, atol=0)


def test_model_computes_with_the_stored_weights():
    model, (x, _) = Small().eval(), images(4)
    quantizer = WeightQuantizer(model, 3, mode="asymmetric", layer_bits={"*": 4, "head": 8},
                                skip_quant_layers=["inner"])
    result = quantizer.convert()(x)
    quantizer.strip_wq_ops()
    with torch.no_grad():
        for name, stored in quantizer.stored_weights().items():
            model.get_submodule(name).weight.copy_(torch.from_numpy(stored.values))
    torch.testing.assert_close(model(x), result, rtol=0, atol=0)
    bits = {name: storage.bits for name, storage in quantizer.storages.items()}
    assert bits == {"stem": 4, "depthwise": 4, "head": 8}
    states = {layer.name: layer.state for layer in quantizer.coverage().layers}
    assert states.pop("inner") is LayerState.FLOAT
    assert set(states.values()) == {LayerState.WEIGHT_ONLY}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bits": 1}, "2 to 8"), ({"bits": 9}, "2 to 8"), ({"mode": "affine"}, "'symmetric', 'asymmetric'"),
    ({"block_size": 10}, "multiple of 16"), ({"layer_bits": {"nowhere": 4}}, "nowhere"),
    ({"layer_bits": {"head": 0}}, "2 to 8"), ({"skip_quant_layers": ["*"]}, "nothing to quantize")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightQuantizer(Small(), **arguments)


def test_only_a_module_is_a_model():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        WeightQuantizer([Small()])


# -- deployment


def _levels_in_file(found, op_names):
    return np.concatenate([found[name].levels for name in op_names])


def _expected_levels(stored, norm, bits, mode):
    """Signed levels as the file has them: a negative batch norm factor turns the grid around."""
    levels = stored.levels.reshape(len(stored.levels), -1).astype(np.int64)
    turned = np.zeros(len(levels), bool) if norm is None else norm.weight.detach().numpy() < 0
    top = 2 ** bits - 1
    if mode is WeightMode.ASYMMETRIC:
        return np.where(turned[:, None], top - levels, levels) - 2 ** (bits - 1)
    return np.where(turned[:, None], -levels, levels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bits", "block", "dynamo"), [
    (8, 0, False), (4, 0, True), (3, 16, False), (2, 0, False), (2, 32, False)])
def test_file_holds_exactly_the_trained_integers(mode, bits, block, dynamo, tmp_path):
    model = Varied().eval()
    quantizer = WeightQuantizer(model, bits, mode=mode, layer_bits={"head": 8, "line": 6}, block_size=block)
    quantizer.convert()
    x = torch.randn(2, 3, 8, 8)
    deployed = quantizer.deploy(tmp_path / "model", x, dynamo=dynamo)
    assert deployed.sqnr_db >= 100
    assert all(layer.state is LayerState.WEIGHT_ONLY for layer in deployed.coverage.layers)
    found, names = decode(deployed.mnn), {}
    for algorithm in read_params(tmp_path / "model.compress_params.bin").algo:
        for entry in algorithm.quant_params.layer:
            names.setdefault(entry.weight[0].name.partition("[")[0], []).append(entry.op_name)
    assert set(names) == {*quantizer.layers, "twice#2"}
    norms = {"stem": model.norm, "depthwise": model.depthwise_norm}
    for name, op_names in names.items():
        layer = name.partition("#")[0]
        width = quantizer.storages[layer].bits
        expected = _expected_levels(quantizer.stored_weights()[layer], norms.get(layer), width, mode)
        assert found[op_names[0]].bits == width
        np.testing.assert_array_equal(_levels_in_file(found, op_names).ravel(), expected.ravel(), err_msg=name)


def test_users_own_export_is_put_on_the_grid_in_place(tmp_path):
    model, (x, _) = Small().eval(), images(2)
    nn.init.normal_(model.norm.weight)
    quantizer = WeightQuantizer(model, 3)
    expected = quantizer.convert()(x).detach().numpy()
    quantizer.strip_wq_ops()
    path, params = tmp_path / "mine.onnx", tmp_path / "params.bin"
    torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"])
    quantizer.save_compress_params(params, onnx_inference_model_file=path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=1e-5)
    convert(path, tmp_path / "mine.mnn", params)
    np.testing.assert_allclose(run_model(tmp_path / "mine.mnn", {"x": x.numpy()})["y"], expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_option_of_the_converter_does_the_same_for_one_width(mode, tmp_path):
    model, (x, _) = Small(16).eval(), images(2)
    quantizer = WeightQuantizer(model, 4, mode=mode)
    expected = quantizer.convert()(x).detach().numpy()
    quantizer.strip_wq_ops()
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"], output_names=["y"])
    quantizer.save_compress_params(tmp_path / "p.bin")
    options = ConvertOptions(weight_bits=4, asymmetric=mode is WeightMode.ASYMMETRIC)
    convert(tmp_path / "m.onnx", tmp_path / "m.mnn", tmp_path / "p.bin", options)
    np.testing.assert_allclose(run_model(tmp_path / "m.mnn", {"x": x.numpy()})["y"], expected, atol=1e-5)


def test_mixed_widths_need_the_onnx_file(tmp_path):
    with pytest.raises(ValueError, match="4 and 8 bits.*onnx_inference_model_file"):
        WeightQuantizer(Small(), 4, layer_bits={"head": 8}).save_compress_params(tmp_path / "p.bin")
    assert not (tmp_path / "p.bin").exists()


def test_a_file_of_other_weights_is_refused_and_left_alone(tmp_path):
    model, (x, _) = Small(), images(2)
    torch.onnx.export(Small(), (x,), str(tmp_path / "m.onnx"), dynamo=False)
    before = (tmp_path / "m.onnx").read_bytes()
    quantizer = WeightQuantizer(model, 4)
    with pytest.raises(SlimtrainError, match="weights of 'stem', 'inner'"):
        quantizer.save_compress_params(tmp_path / "p.bin", onnx_inference_model_file=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert not (tmp_path / "p.bin").exists()


def test_a_layer_that_forward_does_not_use_is_named_and_left_out(tmp_path, caplog):
    model, (x, _) = Small(), images(2)
    model.spare = nn.Linear(3, 3)
    with caplog.at_level(logging.WARNING):
        deployed = WeightQuantizer(model, 4).deploy(tmp_path / "m", x)
    assert "'spare' is not used" in caplog.text
    assert "spare" not in [layer.name for layer in deployed.coverage.layers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_file_is_as_small_as_the_bits_say(mode, bits, tmp_path):
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.Flatten(), nn.Linear(256, 512))
    quantizer, x = WeightQuantizer(model, bits, mode=mode), torch.randn(1, 64, 5, 5)
    deployed = quantizer.deploy(tmp_path / "m", x)
    convert(tmp_path / "m.onnx", tmp_path / "float.mnn")
    whole = (tmp_path / "float.mnn").stat().st_size
    assert deployed.bytes <= whole * (bits / 32 + 0.05)
    assert {layer.bits for layer in inspect_model(deployed.mnn).layers} == {bits}


# -- training


def test_callback_trains_resumes_and_deploys(tmp_path):
    def run(folder, epochs, **fit):
        torch.manual_seed(1)
        model = Lit()
        callback = WeightQuantizerCallback(3, layer_bits={"net.head": 8}, export_to=str(folder / "out"))
        session = trainer(folder, callback, max_epochs=epochs)
        session.fit(model, loader(), loader(), **fit)
        return session, model, callback

    session, model, callback = run(tmp_path / "whole", 3)
    assert callback.deployed.sqnr_db >= 100
    session, _, _ = run(tmp_path / "half", 2)
    session.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = run(tmp_path / "rest", 3, ckpt_path=tmp_path / "half.ckpt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    plain = Lit.load_from_checkpoint(tmp_path / "half.ckpt")
    assert list(plain.state_dict()) == list(model.state_dict())
    quantizer = WeightQuantizer.from_checkpoint(plain, tmp_path / "half.ckpt")
    assert quantizer.storages["net.head"].bits == 8
    assert quantizer.storages["net.stem"].bits == 3


def test_callback_shows_direct_quantization_without_training(tmp_path):
    model = Lit()
    losses = []
    for callbacks in ([], [WeightQuantizerCallback(2)]):
        (result,) = trainer(tmp_path, *callbacks).test(model, loader(), verbose=False)
        losses.append(result["test_loss"])
    assert losses[0] != losses[1]


def test_callback_refuses_a_checkpoint_of_another_width(tmp_path):
    session = trainer(tmp_path, WeightQuantizerCallback(3, export_to=""), max_epochs=1)
    session.fit(Lit(), loader())
    session.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="trained with"):
        trainer(tmp_path, WeightQuantizerCallback(4, export_to=""), max_epochs=2).fit(
            Lit(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_training_repairs_what_two_bits_break():
    torch.manual_seed(0)
    x, y = images(256)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))

    def train(rate, steps):
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    train(1e-2, 60)
    WeightQuantizer(model, 2).convert()
    untrained = F.cross_entropy(model(x), y).item()
    assert train(1e-2, 100) < untrained / 2


def test_written_model_is_valid_onnx(tmp_path):
    exported = WeightQuantizer(Varied(), 4).export(tmp_path / "m", torch.randn(1, 3, 8, 8))
    onnx.checker.check_model(onnx.load(exported.onnx), full_check=True)
