"""Equalisation, bias correction and rounding by data of a PyTorch model, against unfolded inputs and against MNN."""
from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Lit, loader, trainer
from slimtrain.callbacks import OfflineQuantizer, OfflineQuantizerCallback
from slimtrain.core import adaptive_levels, output_error, quantize, sqnr_db
from zoo import ZOO, lived_in

ALL = {"equalize": True, "correct_bias": True, "adaptive_rounding": True}


def unfolded(layer, x):
    """Receptive fields of the channels of a layer, float64 [groups, samples, K], by torch's own unfold."""
    if isinstance(layer, nn.Linear):
        return x.double().reshape(1, -1, x.shape[-1])
    image, weight = (x[:, :, None], layer.weight[:, :, None]) if layer.weight.dim() == 3 else (x, layer.weight)
    pairs = [(1, *value) if len(value) == 1 else value for value in (layer.dilation, layer.stride)]
    amount = layer.padding
    if amount == "same":
        amount = tuple(step * (size - 1) // 2 for size, step in zip(layer.kernel_size, layer.dilation))
    amount = (0, *amount) if len(amount) == 1 else amount
    columns = F.unfold(image.double(), weight.shape[2:], pairs[0], amount, pairs[1])
    grouped = columns.reshape(len(x), layer.groups, -1, columns.shape[-1])
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, -1, grouped.shape[2])


torch.manual_seed(11)
LAYERS = {
    "strided": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), bias=False), (3, 4, 7, 6)),
    "dilated, same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 6)),
    "grouped": (nn.Conv2d(8, 8, 3, groups=2, padding=1), (2, 8, 6, 5)),
    "depthwise": (nn.Conv2d(5, 5, 3, groups=5), (3, 5, 6, 6)),
    "one-dimensional": (nn.Conv1d(4, 6, 3, 2, 1), (3, 4, 17)),
    "linear": (nn.Linear(7, 5), (4, 9, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_levels_and_bias_are_those_of_the_unfolded_inputs(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(3)
    mixing = torch.randn(shape[1] if layer.weight.dim() > 2 else shape[-1], 2)
    batches = []
    for _ in range(3):  # channels that depend on each other, and a mean
        noise = torch.randn(*shape) * 0.1 + torch.randn(shape[0], *(1,) * (len(shape) - 1)) + 0.5
        axis = 1 if layer.weight.dim() > 2 else -1
        source = torch.randn(*noise.movedim(axis, -1).shape[:-1], 2)
        batches.append(noise + (source @ mixing.t()).movedim(-1, axis))
    quantizer = OfflineQuantizer(nn.Sequential(copy.deepcopy(layer)), bits=4, weight_method="max_abs",
                                 correct_bias=True, adaptive_rounding=True)
    quantizer.calibrate(batches)
    (deployed,) = quantizer.deployed_layers()
    fields = torch.cat([unfolded(layer, batch) for batch in batches], dim=1)
    mean, second = fields.mean(1), fields.transpose(1, 2) @ fields / fields.shape[1]
    covariance = second - mean[:, :, None] * mean[:, None]
    weight, scales = layer.weight.detach().numpy(), deployed.weight_scales
    columns = scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    expected = adaptive_levels(weight, scales, deployed.weight_grid, covariance.numpy())
    nearest = quantize(weight, scales, deployed.weight_grid, axis=0)
    # where two steps of the descent gain the same but for float rounding, a channel may take another way
    assert (deployed.levels != expected).mean() < 0.1
    found, wanted, plain = (output_error(levels * columns - weight, covariance.numpy()).sum()
                            for levels in (deployed.levels, expected, nearest))
    assert found == pytest.approx(wanted, rel=0.05) and found < plain
    error = deployed.levels * columns - weight
    rows = torch.from_numpy(error).double().reshape(len(mean), -1, mean.shape[1])
    shift = -(rows @ mean[:, :, None]).reshape(-1).numpy()
    unit = deployed.input_scale * scales if name == "depthwise" else np.full(len(shift), 1e-5)  # whole steps there
    bias = np.zeros(len(shift)) if layer.bias is None else layer.bias.detach().numpy()
    assert (np.abs(deployed.bias - bias - shift) <= 0.51 * unit + 1e-5).all()
    assert np.abs(shift).max() > 1e-3


def test_with_a_batch_norm_the_correction_is_that_of_what_leaves_it():
    torch.manual_seed(0)
    net = lived_in(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    with torch.no_grad():
        net[1].weight[::2].neg_()
    x = torch.randn(4, 3, 9, 9) + 1
    quantizer = OfflineQuantizer(net, weight_bits=3, activation_bits=8, weight_method="max_abs", correct_bias=True)
    plain = OfflineQuantizer(copy.deepcopy(net), weight_bits=3, activation_bits=8, weight_method="max_abs")
    quantizer.calibrate([x])
    plain.calibrate([x])
    with torch.no_grad():
        quantizer.strip_qat_ops()
        expected = net(x).mean(dim=(0, 2, 3))
    step = quantizer.deployed_layers()[0].output_scale
    corrected, uncorrected = ((each.simulate(x).mean(dim=(0, 2, 3)) - expected).abs() for each in (quantizer, plain))
    assert corrected.max() < 0.2 * step < uncorrected.max()  # what rounding of the outputs leaves


@pytest.mark.parametrize("name", ["ResNet-18-like", "MobileNetV2-like", "grouped convolutions", "MLP", "Conv1d"])
def test_networks_deploy_as_simulated_with_all_options(name, tmp_path):
    net = ZOO[name]
    quantizer = OfflineQuantizer(lived_in(net.make()), weight_bits=4, activation_bits=8, **ALL)
    quantizer.calibrate([torch.randn(net.shape) for _ in range(3)])
    deployed = quantizer.deploy(tmp_path / "m", torch.randn(net.shape), dynamo=False)
    assert deployed.coverage.fraction == 1.0
    assert deployed.sqnr_db >= 100


def test_options_gain_accuracy_at_four_bits():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 3)).eval()
    mixing = torch.randn(3, 3)
    data = [torch.einsum("ij,njhw->nihw", mixing, torch.randn(8, 3, 9, 9) + 0.5) for _ in range(12)]
    x = torch.cat(data[8:])
    with torch.no_grad():
        expected = net(x).numpy()
    found = {}
    for option in ("", "correct_bias", "adaptive_rounding", "both"):
        options = {"correct_bias": True, "adaptive_rounding": True} if option == "both" else {option: True}
        quantizer = OfflineQuantizer(copy.deepcopy(net), weight_bits=4, activation_bits=8, weight_method="max_abs",
                                     **(options if option else {}))
        quantizer.calibrate(data[:8])
        found[option] = sqnr_db(expected, quantizer.simulate(x).numpy())
    assert found["adaptive_rounding"] > found[""] and found["both"] > max(found[""] + 0.5, found["correct_bias"]), found


# -- equalisation


class Chains(nn.Module):
    """Two chains; what ends them is a sum, a ReLU6, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 8, 1)
        self.d = nn.Conv2d(8, 8, 1)
        self.e = nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        x = self.c(torch.relu(self.b(x)))           # a, b, c
        x = x + F.relu6(self.d(x))                  # a sum, and a ReLU6 behind d
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.e(x))))))
        return self.g(torch.relu(self.f(x.mean([2, 3]))))  # f, g


def unbalanced():
    """Channels of very different sizes, and a negative factor of the batch norm."""
    torch.manual_seed(2)
    net = lived_in(Chains()).eval()
    with torch.no_grad():
        for layer in (net.a, net.norm, net.b, net.f):
            sizes = 10 ** (torch.rand(8) * 3 - 1.5)
            layer.weight.mul_(sizes.reshape((-1,) + (1,) * (layer.weight.dim() - 1)))
        net.norm.weight[2].neg_()
    return net


def test_equalisation_keeps_the_function_and_equalises_the_ranges():
    net, data = unbalanced(), [torch.randn(4, 3, 9, 9) for _ in range(3)]
    before = copy.deepcopy(net)
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        expected = net(data[0])
    plain, quantizer = OfflineQuantizer(copy.deepcopy(net)), OfflineQuantizer(net, equalize=True)
    plain.calibrate(data)
    quantizer.calibrate(data)
    gained = sqnr_db(expected.numpy(), quantizer.simulate(data[0]).numpy())
    assert gained > sqnr_db(expected.numpy(), plain.simulate(data[0]).numpy()) + 3
    quantizer.strip_qat_ops()
    with torch.no_grad():
        torch.testing.assert_close(net(data[0]), expected, rtol=1e-4, atol=1e-4)
    assert all(dict(net.named_parameters())[name] is value for name, value in parameters.items())
    for name in ("c.bias", "d.weight", "d.bias", "e.weight", "twice.weight", "twice.bias", "g.bias"):
        assert torch.equal(net.get_parameter(name), before.get_parameter(name)), name
    first = (net.a.weight * (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt())[:, None, None, None])
    for outputs, inputs in ((first, net.b.weight), (net.b.weight, net.c.weight.transpose(0, 1)),
                            (net.f.weight, net.g.weight.t())):
        torch.testing.assert_close(outputs.abs().flatten(1).amax(1), inputs.abs().flatten(1).amax(1), rtol=2e-2,
                                   atol=1e-3)


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    net = Tied()
    before = copy.deepcopy(net.state_dict())
    OfflineQuantizer(net, equalize=True).calibrate([torch.randn(5, 6)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- state


def test_state_restores_levels_and_corrections(tmp_path):
    net = unbalanced()
    quantizer = OfflineQuantizer(net, bits=4, **ALL)
    x = torch.randn(4, 3, 9, 9)
    quantizer.calibrate([x])
    expected = quantizer.simulate(x)
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    quantizer.strip_qat_ops()
    again = OfflineQuantizer.from_state(net, torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(again.simulate(x), expected, rtol=0, atol=0)
    again.strip_qat_ops()
    nearest = OfflineQuantizer(copy.deepcopy(net), bits=4)
    nearest.calibrate([x])
    assert any((mine.levels != other.levels).any()
               for mine, other in zip(again.deployed_layers(), nearest.deployed_layers()))


def test_a_weight_that_was_trained_since_has_its_nearest_level():
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    quantizer = OfflineQuantizer(nn.Sequential(layer), bits=4, adaptive_rounding=True)
    quantizer.calibrate([torch.randn(50, 3) @ torch.randn(3, 16)])
    before = quantizer.deployed_layers()[0]
    scale = before.weight_scales[0]
    with torch.no_grad():
        layer.weight[0] = (torch.arange(16) % 5 - 1.75) * float(scale)
    after = quantizer.deployed_layers()[0].levels
    far = np.abs(before.levels[0] - (np.arange(16) % 5 - 1.75)) > 1
    assert far.any()
    np.testing.assert_array_equal(after[0], np.where(far, np.arange(16) % 5 - 2, before.levels[0]))
    np.testing.assert_array_equal(after[1:], before.levels[1:])


def test_the_callback_takes_the_options(tmp_path):
    callback = OfflineQuantizerCallback(bits=4, export_to=str(tmp_path / "net"), module="net", **ALL)
    trainer(tmp_path, callback).validate(Lit(), loader(), verbose=False)
    configuration = callback.quantizer.configuration()
    assert {name: configuration[name] for name in ALL} == ALL
    assert callback.deployed.sqnr_db >= 100
    assert any(state for state in callback.quantizer.state_dict()["rounding"].values())


RANKS = """
import sys, torch, torch.distributed as distributed
from slimtrain.callbacks import OfflineQuantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + folder + "/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3))
torch.manual_seed(1 + rank)
quantizer = OfflineQuantizer(net, bits=4, equalize=True, correct_bias=True, adaptive_rounding=True)
quantizer.calibrate([torch.randn(2, 3, 9, 9) + rank for _ in range(3 + rank)])
torch.save(quantizer.state_dict(), folder + "/%d.pt" % rank)
distributed.barrier()
"""


def test_two_ranks_that_see_other_data_deploy_the_same(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", RANKS]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    first, second = (torch.load(tmp_path / ("%d.pt" % rank), weights_only=True) for rank in (0, 1))
    for name, rounding in first["rounding"].items():
        for key, value in rounding.items():
            assert torch.equal(value, second["rounding"][name][key]), (name, key)
    assert len(first["rounding"]["0"]) == 2
