"""Winograd-aware quantization in torch: against the numpy core, against MNN, and back to plain int8 where it loses."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, WAQQuantizer, WAQQuantizerCallback
from slimtrain.callbacks.winograd import (
    Geometry,
    WinogradLayerScales,
    geometry,
    possible_forms,
    stable_ratio,
    transform_input,
    transform_output,
    transform_weight,
    winograd_conv,
)
from slimtrain.core import Activation, Grid, IntegerConv, LayerState, WinogradForm, fake_quantize, input_levels, sqnr_db
from slimtrain.core import winograd as core
from slimtrain.proto import read_params

FORMS = [WinogradForm(2, 3), WinogradForm(4, 3), WinogradForm(2, 5)]
INT8 = Grid(8, -127, 127)
ALWAYS, NEVER = -1000.0, 1000.0


def _train(model, steps, rate=0.05, count=64):
    x, y = images(count)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(x)
        F.cross_entropy(result.flatten(2).mean(2) if result.dim() == 4 else result, y).backward()
        optimizer.step()


def _chain():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=(0, 1)), nn.ReLU(),
                         nn.Conv2d(12, 4, 5, padding="same"))


# -- transforms


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transforms_are_those_of_the_core(form):
    rng = np.random.RandomState(0)
    x, weight = rng.randn(2, 3, 7, 9), rng.randn(5, 3, form.kernel, form.kernel)
    where, padding = Geometry((1, 0), (2, 1)), ((1, 0), (2, 1))
    inputs = core.transform_input(x, form, padding)
    weights = core.transform_weight(weight, form)
    found = transform_input(torch.from_numpy(x), form, where)
    np.testing.assert_allclose(found.numpy(), inputs.reshape(found.shape), atol=1e-12)
    np.testing.assert_allclose(transform_weight(torch.from_numpy(weight), form).numpy(), weights, atol=1e-12)
    products = core.multiply(weights, inputs)
    size = (8 - form.kernel + 1, 12 - form.kernel + 1)
    flat = torch.from_numpy(products.reshape(products.shape[:2] + (-1,)))
    np.testing.assert_allclose(transform_output(flat, form, 2, size).numpy(),
                               core.transform_output(products, form, size), atol=1e-12)


def test_ratios_are_those_of_the_core():
    asked = torch.rand(1000) * 4 + 1e-4
    np.testing.assert_array_equal(stable_ratio(asked).numpy(), core.stable_ratio(asked.numpy()).astype(np.float32))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_training_computes_with_fake_quantized_transforms(form):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3).double()
    scales = WinogradLayerScales(layer, LSQQuantizer(nn.Sequential(nn.Linear(2, 2))).bits, False, (form,))
    nn.init.uniform_(scales.positions, 0.01, 0.03)
    scales.double()
    nn.init.constant_(scales.weight, 0.004)
    x, step = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    found = winograd_conv(x, layer.weight, layer.bias, scales, form, step, geometry(1, 3))
    padding = ((1, 1), (1, 1))
    ratios = scales.ratios(form, step, scales.weight_scale()).double().numpy()
    inputs, weights = core.transform_input(x.numpy(), form, padding), core.transform_weight(
        layer.weight.detach().numpy(), form)
    rounded = np.stack([fake_quantize(row, ratio * 0.02, INT8) for row, ratio in zip(inputs, ratios[:, 0])])
    kernels = np.stack([fake_quantize(row, ratio * 0.004, INT8, axis=0) for row, ratio in zip(weights, ratios[:, 1:])])
    expected = core.transform_output(core.multiply(kernels, rounded), form, (7, 8))
    expected = expected + layer.bias.detach().numpy()[:, None, None]
    assert sqnr_db(F.conv2d(x, layer.weight, layer.bias, padding=1).detach().numpy(), expected) < 60
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_every_scale_of_a_tile_is_trained(form):
    torch.manual_seed(0)
    quantizer = WAQQuantizer(_chain(), min_sqnr_db=ALWAYS)
    x, _ = images(16)
    quantizer.convert().train()(x).square().sum().backward()
    scales = quantizer.scales["2"]
    used = scales.positions.grad[:scales.form.positions]
    assert scales.form == WinogradForm(4, 3)
    assert (used != 0).float().mean() > 0.95
    assert torch.isfinite(used).all()


def test_scales_that_follow_the_gradient_lower_the_error():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, padding=1), torch.randn(8, 6, 12, 12)
    quantizer = WAQQuantizer(nn.Sequential(layer), min_sqnr_db=ALWAYS)
    model = quantizer.convert().train()
    with torch.no_grad():
        target = F.conv2d(x, layer.weight, layer.bias, padding=1)
        model(x)
        quantizer.scales["0"].positions.mul_(3)  # far from the best
    optimizer, losses = torch.optim.SGD([quantizer.scales["0"].positions], 0.02), []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert min(losses[-10:]) < 0.8 * losses[0]


# -- evaluation and deployment


def _oracle(quantizer, x):
    """The output of a chain by the numpy core."""
    levels = None
    modules = dict(quantizer.model.named_modules())
    for layer in quantizer.deployed_layers():
        where = geometry(modules[layer.name].padding, layer.levels.shape[-1])
        conv = IntegerConv(layer.levels, layer.weight_scales, layer.bias, layer.input_scale, layer.output_scale,
                           layer.output_grid, padding=tuple(where), activation=Activation(layer.activation or "none"))
        if levels is None:
            levels = input_levels(x.numpy(), layer.input_scale, layer.input_grid)
        levels = core.simulate_winograd(levels, conv, layer.winograd)
    return levels.astype(np.float32) * np.float32(layer.output_scale)


def test_evaluation_is_the_core_bit_for_bit_and_mnn_but_for_ties(tmp_path):
    torch.manual_seed(0)
    quantizer, (x, _) = WAQQuantizer(_chain(), min_sqnr_db=ALWAYS), images(8)
    _train(quantizer.convert(), 5)
    assert set(quantizer.forms) == {"0", "2", "4"}
    np.testing.assert_array_equal(quantizer.simulate(x).numpy(), _oracle(quantizer, x))
    # MNN sums transformed products in float32: an output next to a tie may be one level off
    assert quantizer.deploy(tmp_path / "m", x).sqnr_db >= 60


@pytest.mark.parametrize("threshold, unit", [(25.0, 2), (10.0, 4)])
def test_trained_model_with_batch_norm_and_residual_deploys_as_simulated(threshold, unit, tmp_path):
    torch.manual_seed(0)
    model, (x, _) = Small(24), images(8)
    quantizer = WAQQuantizer(model, min_sqnr_db=threshold)
    _train(quantizer.convert(), 8)
    assert quantizer.forms == dict.fromkeys(["stem", "inner"], WinogradForm(unit, 3))
    deployed = quantizer.deploy(tmp_path / "m", x)
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 60
    entries = read_params(tmp_path / "m.compress_params.bin").algo[0].quant_params.layer
    methods = {entry.weight[0].name: (entry.method, len(entry.wino_params.units_attr) > 0) for entry in entries}
    assert methods == {"stem": (2, True), "inner": (2, True), "depthwise": (0, False), "head": (0, False)}
    expected = quantizer.simulate(x)
    quantizer.strip_qat_ops()
    again = WAQQuantizer.from_state(model, quantizer.state_dict())
    assert again.choices == quantizer.choices
    torch.testing.assert_close(again.simulate(x), expected, rtol=0, atol=0)


# -- the choice


def test_layers_that_lose_too_much_stay_plain_int8_and_say_so():
    torch.manual_seed(0)
    (x, _), results = images(16), {}
    for threshold in (NEVER, 25.0, ALWAYS):
        torch.manual_seed(1)
        quantizer = WAQQuantizer(Small(16), min_sqnr_db=threshold)
        quantizer.convert().train()(x)
        results[threshold] = quantizer
    assert results[NEVER].forms == {}
    assert all("sensitivity" in choice.reason for choice in results[NEVER].choices)
    assert set(results[25.0].forms.values()) == {WinogradForm(2, 3)}
    assert set(results[ALWAYS].forms.values()) == {WinogradForm(4, 3)}
    for choice in results[ALWAYS].choices:
        assert choice.sqnr_db[WinogradForm(4, 3)] + 6 < choice.sqnr_db[WinogradForm(2, 3)]
    assert next(row.state for row in results[NEVER].coverage().layers) is LayerState.INT8


def test_without_forms_it_is_lsq():
    torch.manual_seed(0)
    (x, _), outputs = images(16), []
    for make in (LSQQuantizer, lambda model: WAQQuantizer(model, min_sqnr_db=NEVER)):
        torch.manual_seed(2)
        model = Small(16)
        quantizer = make(model)
        _train(quantizer.convert(), 4)
        outputs.append(quantizer.simulate(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("layer, count", [
    (nn.Conv2d(4, 4, 3), 2), (nn.Conv2d(4, 4, 5), 1), (nn.Conv2d(4, 4, 2), 2), (nn.Conv2d(4, 4, 3, stride=2), 0),
    (nn.Conv2d(4, 4, 3, dilation=2), 0), (nn.Conv2d(4, 4, 3, groups=2), 0), (nn.Conv2d(4, 4, 1), 0),
    (nn.Conv2d(4, 4, (3, 5)), 0), (nn.Conv2d(4, 4, 7), 0), (nn.Conv1d(4, 4, 3), 0), (nn.Linear(4, 4), 0)])
def test_forms_of_layers(layer, count):
    assert len(possible_forms(layer)) == count


def test_a_layer_that_is_called_otherwise_than_its_module_says_stays_plain():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)

    quantizer = WAQQuantizer(Strided(), min_sqnr_db=ALWAYS)
    quantizer.convert().train()(images(4)[0])
    assert quantizer.forms == {}
    assert "stride" in quantizer.choices[0].reason


@pytest.mark.parametrize("value", ["25", None, True, float("nan")])
def test_bad_thresholds_are_refused(value):
    for make in (lambda: WAQQuantizer(Small(), min_sqnr_db=value), lambda: WAQQuantizerCallback(min_sqnr_db=value)):
        with pytest.raises(ValueError, match="min_sqnr_db"):
            make()


def test_callback_resumes_where_it_was(tmp_path):
    def run(folder, epochs, **fit):
        torch.manual_seed(1)
        model, callback = Lit(12), WAQQuantizerCallback(export_to="", min_sqnr_db=ALWAYS)
        session = trainer(folder, callback, max_epochs=epochs)
        session.fit(model, loader(), **fit)
        return session, model, callback

    _, whole, expected = run(tmp_path, 3)
    session, _, _ = run(tmp_path, 2)
    session.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, found = run(tmp_path, 3, ckpt_path=tmp_path / "half.ckpt")
    assert found.quantizer.choices == expected.quantizer.choices
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    for name, scales in expected.quantizer.scales.items():
        if isinstance(scales, WinogradLayerScales):
            torch.testing.assert_close(found.quantizer.scales[name].positions, scales.positions, rtol=0, atol=0)
