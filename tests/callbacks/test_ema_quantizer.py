"""Range tracking in PyTorch: scales against numpy, deployment against MNN."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Lit, Small, images, loader, trainer
from slimtrain.callbacks import EMAQuantizer, EMAQuantizerCallback


def _batches(count):
    return [torch.randn(4, 3, 6, 6) * (index + 1) for index in range(count)]


def test_activation_scale_is_a_moving_average_of_the_largest_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    quantizer, batches = EMAQuantizer(model), _batches(5)
    quantizer.convert().train()
    expected = batches[0].abs().max().item()
    for batch in batches:
        model(batch)
        expected = 0.99 * expected + 0.01 * batch.abs().max().item()
    assert quantizer.scales["0"].activation[0].item() == pytest.approx(expected / 127, rel=1e-6)
    model.eval()(batches[-1] * 100)
    assert quantizer.scales["0"].activation[0].item() == pytest.approx(expected / 127, rel=1e-6)


def test_a_tensor_seen_twice_in_a_run_counts_once_with_its_largest_value():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, y):
            return self.conv(x) + self.conv(y)

    model = Twice()
    quantizer = EMAQuantizer(model)
    quantizer.convert().train()
    x, y = torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2) * 5
    largest = max(x.max().item(), y.max().item())
    model(x, y)
    model(3 * x, 3 * y)
    assert quantizer.scales["conv"].activation[0].item() == pytest.approx((0.99 + 0.03) * largest / 127, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_scale_is_that_of_the_present_weights(bits):
    model, (x, y) = Small(), images(8)
    quantizer = EMAQuantizer(model, bits=bits)
    quantizer.convert().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    deployed = {layer.name: layer for layer in quantizer.deployed_layers()}
    largest = np.abs(model.inner.weight.detach().numpy()).max(axis=(1, 2, 3))
    np.testing.assert_allclose(deployed["inner"].weight_scales, largest / (2 ** (bits - 1) - 1), rtol=1e-6)


def test_scales_are_not_trained():
    model, (x, y) = Small(), images(8)
    quantizer = EMAQuantizer(model)
    quantizer.convert().train()
    F.cross_entropy(model(x), y).backward()
    assert all(scale.grad is None for scale in quantizer.scale_parameters())
    assert model.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 4)])
def test_trained_model_deploys_as_simulated(weight_bits, activation_bits, tmp_path):
    model, (x, y) = Small(), images(32)
    quantizer = EMAQuantizer(model, weight_bits=weight_bits, activation_bits=activation_bits)
    quantizer.convert().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    deployed = quantizer.deploy(tmp_path / "m", x[:4])
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 100
    expected = quantizer.simulate(x)
    quantizer.strip_qat_ops()
    again = EMAQuantizer.from_state(model, quantizer.state_dict())
    torch.testing.assert_close(again.simulate(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [1, 9])
def test_bad_bits_are_refused(bits):
    for make in (lambda: EMAQuantizer(Small(), bits=bits), lambda: EMAQuantizerCallback(bits=bits)):
        with pytest.raises(ValueError, match="2 to 8"):
            make()


def test_callback_resumes_where_it_was(tmp_path):
    def run(folder, epochs, **fit):
        torch.manual_seed(1)
        model, callback = Lit(), EMAQuantizerCallback(export_to="")
        session = trainer(folder, callback, max_epochs=epochs)
        session.fit(model, loader(), **fit)
        return session, model, callback

    _, whole, expected = run(tmp_path, 3)
    session, _, _ = run(tmp_path, 2)
    session.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, found = run(tmp_path, 3, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    for name, scales in expected.quantizer.scales.items():
        torch.testing.assert_close(found.quantizer.scales[name].activation, scales.activation, rtol=0, atol=0, msg=name)
