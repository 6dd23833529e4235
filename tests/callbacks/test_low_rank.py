"""Decomposed models against the float model and against multiplying the factors out."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import (
    LowRankDecomposition,
    apply_structure,
    low_rank_decompose,
    restore_dense,
    structure_in,
    structure_of,
)
from slimtrain.core import Alignment, BudgetRanks, Cost, EnergyRanks, ExplicitRanks, ParameterFileError
from slimtrain.proto import convert, inspect_model, read_params, run_model
from zoo import MobileNetV2, ResNet, lived_in

LAYERS = {
    "conv": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 9, 10)),
    "no bias, stride, dilation": (lambda: nn.Conv2d(12, 20, (3, 5), (2, 1), (2, 4), (1, 2), bias=False),
                                  (2, 12, 15, 16)),
    "same": (lambda: nn.Conv2d(12, 20, (2, 4), padding="same"), (2, 12, 9, 10)),
    "reflect": (lambda: nn.Conv2d(12, 20, 3, padding=(1, 2), padding_mode="reflect"), (2, 12, 9, 10)),
    "circular": (lambda: nn.Conv2d(12, 20, 5, padding=2, padding_mode="circular"), (2, 12, 9, 10)),
    "1x1": (lambda: nn.Conv2d(20, 12, 1, stride=2, padding=1), (2, 20, 9, 10)),
    "1-D": (lambda: nn.Conv1d(12, 20, 5, 2, 2), (2, 12, 17)),
    "3-D": (lambda: nn.Conv3d(12, 20, (3, 1, 3), padding=(1, 0, 1)), (2, 12, 5, 6, 7)),
    "linear": (lambda: nn.Linear(24, 36), (3, 7, 24)),
}


def net(*layers):
    return nn.Sequential(*layers).eval()


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def full_ranks(layer):
    shape = layer.weight.shape
    matrix = all(extent == 1 for extent in shape[2:])
    return (min(shape[:2]),) if matrix else (shape[0] - 1, shape[1])


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_chains_compute_what_their_product_computes(name):
    make, shape = LAYERS[name]
    model, x = net(make()), torch.randn(shape)
    ranks = (5,) if len(full_ranks(model[0])) == 1 else (6, 4)
    low = low_rank_decompose(model, None, rank_rule=ExplicitRanks({"0": ranks}))
    assert isinstance(low[0], nn.Sequential) and len(low[0]) == len(ranks) + 1
    dense = restore_dense(copy.deepcopy(low))
    assert type(dense[0]) is type(model[0]) and repr(dense[0]) == repr(model[0])
    close(low(x), dense(x))
    with torch.no_grad():
        product = copy.deepcopy(model)
        product[0].weight.copy_(dense[0].weight)
    close(low(x), product(x))


@pytest.mark.parametrize("name", ["conv", "no bias, stride, dilation", "reflect", "same"])
def test_ranks_that_lose_nothing_compute_the_same(name):
    make, shape = LAYERS[name]
    model = net(make())
    with torch.no_grad():  # the last channels are sums of the others: these ranks are full
        model[0].weight[6:] = model[0].weight[:6].sum(0)
    x = torch.randn(shape)
    close(low_rank_decompose(model, None, rank_rule=ExplicitRanks({"0": (7, 12)}))(x), model(x))


@pytest.mark.parametrize("name", ["conv", "no bias, stride, dilation", "same", "circular"])
def test_separable_kernels(name):
    make, shape = LAYERS[name]
    model, x = net(make()), torch.randn(shape)
    with torch.no_grad():
        model[0].weight.copy_(torch.einsum("rih,orw->oihw", torch.randn(5, 12, model[0].weight.shape[2]),
                                           torch.randn(20, 5, model[0].weight.shape[3])))
    low = low_rank_decompose(model, None, separable=["0"], rank_rule=ExplicitRanks({"0": (5,)}))
    assert [tuple(link.kernel_size) for link in low[0]] == [(model[0].kernel_size[0], 1), (1, model[0].kernel_size[1])]
    close(low(x), model(x))
    assert repr(restore_dense(low)[0]) == repr(model[0])


def expected_parameters(model, align=8, ratio=0.25, share=0.5):
    """The toolbox' rank choice written down a second time, without the layers' Bayesian ranks (they are below)."""
    total = 0
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        o, i = module.weight.shape[:2]
        k = module.weight[0, 0].numel()
        options = [o * i * k]
        if k == 1 and min(o, i) > align:
            values = np.linalg.svd(module.weight.detach().reshape(o, i).double().numpy(), compute_uv=False)
            rank = int(np.searchsorted(np.cumsum(values), share * values.sum()) + 1)
            rank = max(rank // align * align, align)
            options.append(rank * (o + i))
        elif min(o, i) > align and getattr(module, "groups", 1) == 1:
            r, s = (max(int(n * ratio) // align * align, align) for n in (o, i))
            options.append(o * r + r * s * k + s * i)
        total += min(options)
    return total


def test_default_ranks_of_a_noisy_net():
    """Random weights have no signal, so that Tucker keeps its minimal ratio and SVD half of the singular values."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 1), nn.Flatten(),
                          nn.Linear(64, 10))
    low = low_rank_decompose(model, None)
    count = sum(p.numel() for p in low.parameters() if p.dim() > 1)
    assert count == expected_parameters(model)
    assert [type(layer).__name__ for layer in low] == [
        "Conv2d", "LowRankChain", "LowRankChain", "Flatten", "LowRankChain"]


@pytest.mark.parametrize("make, x", [(ResNet, torch.randn(1, 3, 32, 32)), (MobileNetV2, torch.randn(1, 3, 32, 32))])
def test_whole_nets(make, x):
    model = lived_in(make())
    decomposition = LowRankDecomposition(model, align_channels=4, rank_rule=EnergyRanks(0.5), example_input=x)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert sum(line.parameters[0] for line in decomposition.report) == sum(p.numel() for p in weights.values())
    low = decomposition.apply(copy.deepcopy(model)).eval()
    after = sum(p.numel() for p in low.parameters() if p.dim() > 1)
    assert after == sum(line.parameters[1] for line in decomposition.report) < sum(p.numel() for p in weights.values())
    for line in decomposition.report:
        assert bool(line.ranks) == (line.reason == "")
        assert line.multiply_adds[1] <= line.multiply_adds[0]
        if line.ranks:
            assert 0 < line.error < 1
    close(restore_dense(copy.deepcopy(low))(x), low(x), 1e-4)


def test_structure_alone_rebuilds_the_model():
    model, x = lived_in(ResNet()).eval(), torch.randn(1, 3, 32, 32)
    decomposition = LowRankDecomposition(model, align_channels=4)
    low = decomposition.apply(copy.deepcopy(model))
    structure = json.loads(json.dumps(decomposition.structure))
    assert structure
    again = apply_structure(ResNet(), structure).eval()
    again.load_state_dict(low.state_dict())
    torch.testing.assert_close(again(x), low(x), rtol=0, atol=0)
    parameters = [id(p) for p in again.parameters()]
    assert [id(p) for p in apply_structure(again, structure).parameters()] == parameters  # nothing left to do
    assert structure_of(again) == structure == structure_in(low.state_dict(), ResNet())
    assert structure_in({"m." + name: value for name, value in low.state_dict().items()}, again, "m.") == structure
    dense = restore_dense(again)
    assert structure_of(dense) == structure_in(model.state_dict(), dense) == {}
    assert list(dense.state_dict()) == list(model.state_dict())
    close(dense(x), low(x), 1e-4)


def test_a_decomposed_model_is_not_decomposed_again():
    low = low_rank_decompose(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False)), None, ["1"])
    report = LowRankDecomposition(low).report
    assert [line.name for line in report] == ["1"] and report[0].ranks


def test_a_copy_by_default_the_model_itself_on_request():
    model = net(nn.Linear(40, 50))
    before = model[0].weight.clone()
    low = low_rank_decompose(model, None)
    assert low is not model and isinstance(model[0], nn.Linear) and torch.equal(model[0].weight, before)
    assert low_rank_decompose(model, None, in_place=True) is model and isinstance(model[0], nn.Sequential)


def test_frozen_layers_dtype_and_mode_are_kept():
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40)).double()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    low = low_rank_decompose(model, None)
    assert [p.requires_grad for p in low[0].parameters()] == [False, False, True]
    assert all(p.dtype == torch.float64 for p in low.parameters())
    assert low[0].training and not low[1].training and not low[1][0].training


def test_a_layer_used_twice_is_replaced_everywhere():
    shared = nn.Linear(40, 40)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    low = low_rank_decompose(model, None)
    assert isinstance(low["a"], nn.Sequential) and low["a"] is low["b"][0]


class Reasons(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.deconvolution = nn.ConvTranspose2d(32, 32, 3)
        self.tied, self.twin = nn.Linear(32, 32), nn.Linear(32, 32)
        self.twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.skipped = nn.Linear(32, 32)
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)
        self.narrow = nn.Linear(32, 8)
        self.fine = nn.Linear(32, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def test_every_layer_left_as_it_is_says_why():
    lines = {line.name: line for line in LowRankDecomposition(Reasons(), skip_layers=["skip*", ""]).report}
    wanted = {"grouped": "grouped (4 groups)", "deconvolution": "ConvTranspose2d", "tied": "also that of twin",
              "twin": "also that of tied", "normed": "parametrization",
              "skipped": "named in skip_layers",
              "hooked": "hooks", "narrow": "align_channels = 8", "encoder.linear1": "reads its weight itself"}
    for name, words in wanted.items():
        assert words in lines[name].reason, name
        assert lines[name].parameters[0] == lines[name].parameters[1]
    assert lines["fine"].reason == "" and lines["fine"].ranks
    assert any("encoder.self_attn" in name for name in lines)


def test_the_encoder_still_runs():
    low = low_rank_decompose(Reasons(), None).eval()
    with torch.no_grad():
        assert torch.isfinite(low.encoder(torch.randn(2, 5, 32))).all()


def test_multiply_adds_of_whole_layers():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32 * 16, 24))
    lines = LowRankDecomposition(model, rank_rule=EnergyRanks(0.5), example_input=torch.randn(1, 16, 8, 8)).report
    assert lines[0].multiply_adds[0] == 16 * 32 * 9 * 16
    r, s = lines[0].ranks
    assert lines[0].multiply_adds[1] == 16 * s * 64 + (9 * r * s + 32 * r) * 16
    assert lines[1].multiply_adds[0] == 32 * 16 * 24


@pytest.mark.parametrize("cost", list(Cost))
def test_a_budget_for_the_model(cost):
    model, x = lived_in(ResNet()), torch.randn(1, 3, 32, 32)
    report = LowRankDecomposition(model, align_channels=4, tucker_minimal_ratio=0.0, example_input=x,
                                  rank_rule=BudgetRanks(0.5, cost)).report
    counts = [line.parameters if cost is Cost.PARAMETERS else line.multiply_adds for line in report
              if "align_channels" not in line.reason]
    assert sum(after for _, after in counts) <= 0.5 * sum(before for before, _ in counts)


def test_a_step_of_training_moves_every_factor():
    low = low_rank_decompose(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1)), None)
    before = [p.clone() for p in low.parameters()]
    optimizer = torch.optim.SGD(low.parameters(), 0.1)
    F.mse_loss(low(torch.randn(4, 16, 8, 8)), torch.randn(4, 32, 6, 6)).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, low.parameters()))


def test_the_parameter_file(tmp_path):
    path = tmp_path / "p.bin"
    low_rank_decompose(net(nn.Linear(40, 50)), path)
    assert len(read_params(path).algo) == 0 and read_params(path).version == "0.0.0"
    data = path.read_bytes()
    low_rank_decompose(net(nn.Linear(40, 50)), str(path), append=True)
    assert path.read_bytes() == data
    model = net(nn.Linear(40, 50))
    with pytest.raises(ParameterFileError):
        low_rank_decompose(model, tmp_path / "missing.bin", in_place=True, append=True)
    assert isinstance(model[0], nn.Linear)


def test_mnn_runs_the_decomposed_model(tmp_path):
    model = lived_in(ResNet()).eval()
    low = low_rank_decompose(model, tmp_path / "p.bin", align_channels=4).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.onnx.export(low, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"])
    plain, small = convert(tmp_path / "m.onnx", tmp_path / "a.mnn"), convert(
        tmp_path / "m.onnx", tmp_path / "b.mnn", tmp_path / "p.bin")
    assert small.bytes == plain.bytes
    found = run_model(small.path, x.numpy())
    found = next(iter(found.values())) if isinstance(found, dict) else found
    np.testing.assert_allclose(np.ravel(found), low(x).detach().numpy().ravel(), rtol=1e-3, atol=1e-4)
    model_file = inspect_model(small.path)
    layers = getattr(model_file, "layers", model_file)
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in low.parameters() if p.dim() > 1)


@pytest.mark.parametrize("call, error", [
    (lambda: LowRankDecomposition(3), TypeError),
    (lambda: LowRankDecomposition(nn.ReLU()), ValueError),
    (lambda: LowRankDecomposition(net(nn.Linear(40, 50)), ["1"]), ValueError),
    (lambda: LowRankDecomposition(net(nn.Linear(40, 50)), align_channels=0), ValueError),
    (lambda: LowRankDecomposition(net(nn.Linear(40, 50)), separable=["0"]), ValueError),
    (lambda: LowRankDecomposition(net(nn.Linear(40, 50)), rank_rule=BudgetRanks(0.5, Cost.MULTIPLY_ADDS)), ValueError),
    (lambda: apply_structure(net(nn.Linear(4, 5)), {"9": [[2, 4], [5, 2]]}), ValueError),
    (lambda: apply_structure(net(nn.Linear(4, 5)), {"0": [[2, 4], [6, 2]]}), ValueError),
    (lambda: apply_structure(net(nn.Linear(4, 5)), {"0": [[2, 4], [5, 3]]}), ValueError),
    (lambda: apply_structure(net(nn.Conv2d(4, 5, 3)), {"0": [[2, 4, 3, 1], [5, 2, 1, 1]]}), ValueError),
    (lambda: apply_structure(net(nn.Linear(4, 5)), {"0": [[2, 4, 1, 1], [5, 2, 1, 1]]}), ValueError),
    (lambda: Alignment(8, -1.0), ValueError)])
def test_bad_calls_are_refused(call, error):
    with pytest.raises(error, match=r"\w+ \w+ \w+"):
        call()
