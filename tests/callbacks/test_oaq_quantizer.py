"""Sums that fit 16 bits: the torch watch against int64 sums, deployment against MNN."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import LSQQuantizer, OAQQuantizer, OAQQuantizerCallback
from slimtrain.core import Activation, IntegerConv, accumulate, input_levels, simulate_conv
from slimtrain.proto import read_params

FITS = 32767


def _chain():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))


def _train(model, steps, rate=0.05, count=64):
    x, y = images(count)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(x)
        loss = F.cross_entropy(result.flatten(2).mean(2) if result.dim() == 4 else result, y)
        loss.backward()
        optimizer.step()
    return loss.item()


def _sums(quantizer, x):
    """Integer sums of every layer of a chain, by the numpy core."""
    levels, sums = None, {}
    for layer in quantizer.deployed_layers():
        conv = IntegerConv(layer.levels, layer.weight_scales, layer.bias, layer.input_scale, layer.output_scale,
                           layer.output_grid, activation=Activation(layer.activation or "none"))
        if levels is None:
            levels = input_levels(x.numpy(), layer.input_scale, layer.input_grid)
        sums[layer.name] = accumulate(levels, conv)
        levels = simulate_conv(levels, conv)
    return sums


def test_plain_training_overflows_and_this_one_does_not():
    x, _ = images(256, seed=5)
    largest = {}
    for quantizer in (LSQQuantizer(_chain()), OAQQuantizer(_chain())):
        _train(quantizer.convert(), 20, count=512)
        sums = _sums(quantizer, x)
        largest[type(quantizer)] = {name: np.abs(values).max() for name, values in sums.items()}
    assert max(largest[LSQQuantizer].values()) > FITS
    assert max(largest[OAQQuantizer].values()) <= FITS
    # not by giving up: the range is used
    assert min(largest[OAQQuantizer].values()) > FITS / 8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear", "depthwise"])
def test_watch_sees_the_largest_integer_sum(kind, bias):
    layer, shape = {
        "conv": (nn.Conv2d(8, 6, 3, bias=bias), (4, 8, 6, 6)),
        "linear": (nn.Linear(64, 10, bias=bias), (5, 64)),
        "depthwise": (nn.Conv2d(8, 8, 3, groups=8, bias=bias), (4, 8, 6, 6)),
    }[kind]
    if bias:
        nn.init.constant_(layer.bias, 3.0)
    quantizer, x = OAQQuantizer(nn.Sequential(layer)), torch.randn(shape)
    seen = {}
    quantizer.narrow = seen.update
    quantizer.convert().train()(x)
    quantizer._tracker.handler.narrow()
    own = quantizer.scales["0"]
    weight = layer.weight.detach().double().numpy()
    levels = np.clip(np.round(x.double().numpy() / own.activation[0].item()), -127, 127)
    steps = own.weight.detach().double().numpy().reshape((-1,) + (1,) * (weight.ndim - 1))
    integers = torch.from_numpy(np.clip(np.round(weight / steps), -127, 127))
    function = F.linear if kind == "linear" else lambda a, b: F.conv2d(a, b, groups=8 if kind == "depthwise" else 1)
    sums = function(torch.from_numpy(levels), integers).numpy()
    assert seen["0"] == pytest.approx(max(sums.max(), -1 - sums.min()), abs=1)


def test_range_survives_a_narrower_clamp():
    model, (x, _) = Small(16), images(16)
    quantizer = OAQQuantizer(model)
    quantizer.convert().train()(x)
    own = quantizer.scales["inner"]
    owner = next(call.input for call in quantizer.known_plan().calls if call.layer == "inner")
    source = quantizer.scales[owner.layer]
    weight_range = own.weight.detach() * own.weight_grid.upper
    input_range = source.activation_scale(owner.role).item() * source.grid(owner.role).upper
    quantizer.narrow({"inner": 4.0 * FITS})
    assert own.weight_grid.upper == quantizer.clamps["inner"].level < 127
    assert own.weight_grid.lower == -own.weight_grid.upper
    torch.testing.assert_close(own.weight.detach() * own.weight_grid.upper, weight_range)
    after = source.activation_scale(owner.role).item() * source.grid(owner.role).upper
    assert after == pytest.approx(input_range, rel=1e-5)


def test_a_layer_that_would_need_less_than_the_smallest_clamp_keeps_sums_of_32_bits(tmp_path):
    model, (x, _) = Small(16), images(16)
    quantizer = OAQQuantizer(model, min_clamp_value=63)
    quantizer.convert().train()(x)
    quantizer.narrow({"inner": 100.0 * FITS, "head": 1.5 * FITS})
    assert quantizer.clamps["inner"] == (127, False)
    assert 63 <= quantizer.clamps["head"].level < 127
    quantizer.export(tmp_path / "m", x)
    methods = {entry.weight[0].name: entry.method for entry in
               read_params(tmp_path / "m.compress_params.bin").algo[0].quant_params.layer}
    assert methods["inner"] == 0
    assert methods["head"] == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_trained_model_deploys_as_simulated_with_narrow_clamps_in_8_bit_fields(bits, tmp_path):
    model, (x, _) = Small(24), images(8)
    quantizer = OAQQuantizer(model, bits=bits)
    _train(quantizer.convert(), 8)
    deployed = quantizer.deploy(tmp_path / "m", x)
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 100
    entries = read_params(tmp_path / "m.compress_params.bin").algo[0].quant_params.layer
    for entry in entries:
        level = quantizer.clamps[entry.weight[0].name].level
        assert (entry.weight[0].bits, entry.weight[0].clamp_min, entry.weight[0].clamp_max) == (8, -level, level)
    if bits == 8:
        assert any(entry.weight[0].clamp_max < 127 for entry in entries)
    expected = quantizer.simulate(x)
    quantizer.strip_qat_ops()
    again = OAQQuantizer.from_state(model, quantizer.state_dict())
    torch.testing.assert_close(again.simulate(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [-1, 128, 3.5])
def test_bad_clamps_are_refused(clamp):
    for make in (lambda: OAQQuantizer(Small(), min_clamp_value=clamp),
                 lambda: OAQQuantizerCallback(min_clamp_value=clamp)):
        with pytest.raises(ValueError, match="0 to 127"):
            make()


def test_callback_resumes_where_it_was(tmp_path):
    def run(folder, epochs, **fit):
        torch.manual_seed(1)
        model, callback = Lit(24), OAQQuantizerCallback(export_to="")
        session = trainer(folder, callback, max_epochs=epochs)
        session.fit(model, loader(), **fit)
        return session, model, callback

    _, whole, expected = run(tmp_path, 3)
    session, _, _ = run(tmp_path, 2)
    session.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, found = run(tmp_path, 3, ckpt_path=tmp_path / "half.ckpt")
    assert found.quantizer.clamps == expected.quantizer.clamps
    assert min(clamp.level for clamp in found.quantizer.clamps.values()) < 127
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
