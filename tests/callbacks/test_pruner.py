"""The pruning objects in a plain loop, against numpy on the same gradients."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Small, images
from slimtrain.callbacks import SIMDOCPruner, SNIPLevelPruner, TaylorFOChannelPruner
from slimtrain.core import OVERALL, Ramp, global_keep, read_prune_ratios
from slimtrain.proto import read_params, schema

LEVEL = [SNIPLevelPruner, SIMDOCPruner]
ALL = [*LEVEL, TaylorFOChannelPruner]
DATA = images(64)


def batch(index):
    start = index * 8 % 64
    return DATA[0][start:start + 8], DATA[1][start:start + 8]


def train(model, pruner, steps, optimizer=None, start=0, result_file=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    model.train()
    for index in range(start, start + steps):
        x, y = batch(index)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.do_pruning(result_file)
    return optimizer


def zeros(model, pruner):
    """The share of zeros in the prunable weights, counted in the model itself."""
    weights = [dict(model.named_parameters())[name] for name in pruner.weights()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_sparsity_asked_for_is_the_sparsity_of_the_model(sparsity):
    for kind, tolerance in ((SNIPLevelPruner, 1e-3), (SIMDOCPruner, 5e-3)):
        model = Small(16)
        pruner = kind(model, sparsity, sensitivity_steps=2)
        train(model, pruner, 2)
        assert zeros(model, pruner) == pytest.approx(sparsity, abs=tolerance)
        assert pruner.sparsity == pytest.approx(zeros(model, pruner))


@pytest.mark.parametrize("kind", LEVEL)
def test_the_weights_pruned_are_those_of_the_numpy_core(kind):
    model = Small(9)
    pruner = kind(model, 0.6, sensitivity_steps=3)
    names, sums = list(pruner.weights()), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in range(3):
        x, y = batch(index)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, weight in pruner.weights().items():
            sums[name] = sums.get(name, 0) + (weight.detach() * weight.grad).abs().double().numpy() / 3
        pruner.do_pruning(None)
    keeps = global_keep({name: sums[name] for name in names}, 0.6, kind.block, 0.99)
    for name, weight in pruner.weights().items():
        np.testing.assert_array_equal(weight.detach().numpy() != 0, keeps[name])


def test_blocks_of_four_output_channels_vanish_together():
    model = Small(10)
    pruner = SIMDOCPruner(model, 0.5, sensitivity_steps=1)
    train(model, pruner, 1)
    dead = (model.inner.weight == 0).detach().numpy()
    for start in (0, 4, 8):
        assert (dead[start:start + 4] == dead[start]).all()
    assert dead[:4].any() and not dead.all()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01)])
def test_pruned_weights_stay_exactly_zero(kind, make):
    model = Small(12)
    pruner = kind(model, 0.5, sensitivity_steps=4)
    optimizer = train(model, pruner, 5, make(model.parameters()))
    dead = {name: (weight == 0).clone() for name, weight in pruner.weights().items()}
    before = zeros(model, pruner)
    assert before > 0.3
    train(model, pruner, 6, optimizer, start=5)
    for name, weight in pruner.weights().items():
        assert torch.all(weight[dead[name]] == 0)
    assert zeros(model, pruner) == before


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pruned_weights_are_zero_after_a_step_that_overflowed(kind, dtype):
    model = Small(12)
    pruner = kind(model, 0.5, sensitivity_steps=4)
    model.to(dtype)
    for index in range(5):
        x, y = batch(index)
        model.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        pruner.do_pruning(None)
    dead = {name: (weight == 0).clone() for name, weight in pruner.weights().items()}
    assert sum(int(each.sum()) for each in dead.values()) > 100
    with torch.no_grad():
        for index, weight in enumerate(pruner.weights().values()):
            weight.fill_([float("nan"), float("inf"), -1.0][index % 3])
    pruner.apply()
    for name, weight in pruner.weights().items():
        assert torch.equal(weight == 0, dead[name])
        assert not torch.signbit(weight[dead[name]]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pruned_weights_stay_zero_in_a_model_that_was_converted(dtype):
    model = Small(12)
    pruner = SNIPLevelPruner(model, 0.5, sensitivity_steps=4)
    train(model, pruner, 5)
    dead = {name: weight == 0 for name, weight in pruner.weights().items()}
    model.to(dtype)
    with torch.no_grad():
        for weight in pruner.weights().values():
            weight.fill_(1.5)
    pruner.apply()
    for name, weight in pruner.weights().items():
        assert torch.equal(weight, torch.where(dead[name], 0.0, 1.5).to(dtype))


@pytest.mark.parametrize("ramp, wanted", [
    (Ramp.LINEAR, [0.2, 0.4, 0.6]), (Ramp.CUBIC, [0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])])
def test_iterations_are_apart_and_grow(ramp, wanted):
    model = Small(16)
    pruner = SNIPLevelPruner(model, 0.6, 3, prune_finetune_iterations=2, sensitivity_steps=2, ramp=ramp)
    optimizer, found = None, []
    for index in range(12):
        optimizer = train(model, pruner, 1, optimizer, start=index)
        found.append(zeros(model, pruner))
    steps = [0.0] + [wanted[0]] * 3 + [wanted[1]] * 3 + [wanted[2]] * 5
    assert found == pytest.approx(steps, abs=1e-3)


def test_the_ratios_found_can_be_edited_and_given_back(tmp_path):
    path, model = tmp_path / "found.yml", Small(16)
    pruner = SNIPLevelPruner(model, 0.5, 4, sensitivity_steps=1)
    train(model, pruner, 1, result_file=path)
    foreseen = read_prune_ratios(path, list(pruner.weights()))
    assert pruner.sparsity < 0.4
    total = sum(weight.numel() for weight in pruner.weights().values())
    assert sum(foreseen[n] * w.numel() for n, w in pruner.weights().items()) / total == pytest.approx(0.5, abs=1e-3)
    train(model, pruner, 3, start=1, result_file=path)
    ratios = pruner.current_prune_ratios()
    assert ratios.pop(OVERALL) == pytest.approx(0.5, abs=1e-3)
    assert read_prune_ratios(path, list(pruner.weights())) == pytest.approx(ratios, abs=1e-5)

    path.write_text("inner.weight: 0.75\nhead.weight: 0.0\n")
    other = Small(16)
    second = SNIPLevelPruner(other, 0.25, config_file=path, sensitivity_steps=1)
    train(other, second, 1)
    ratios = second.current_prune_ratios()
    assert (ratios["inner.weight"], ratios["head.weight"]) == (0.75, 0.0)
    assert ratios["stem.weight"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("kind", ALL)
def test_resuming_equals_never_having_stopped(kind):
    models = [Small(12), Small(12)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"total_pruning_iterations": 3, "prune_finetune_iterations": 1, "sensitivity_steps": 3}
    whole = kind(models[0], 0.5, **options)
    train(models[0], whole, 12)
    first = kind(models[1], 0.5, **options)
    optimizer = train(models[1], first, 4)
    saved = [copy.deepcopy(value) for value in (models[1].state_dict(), optimizer.state_dict(), first.state_dict())]
    resumed = Small(12)
    resumed.load_state_dict(saved[0])
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    optimizer.load_state_dict(saved[1])
    second = kind(resumed, 0.5, **options)
    second.load_state_dict(saved[2])
    train(resumed, second, 8, optimizer, start=4)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert second.current_prune_ratios() == whole.current_prune_ratios()


def test_the_state_of_another_model_is_refused():
    model = Small(12)
    pruner = SNIPLevelPruner(model, 0.5, sensitivity_steps=1)
    train(model, pruner, 1)
    with pytest.raises(ValueError, match="another model"):
        SNIPLevelPruner(Small(10), 0.5).load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("kind, prune_type", [
    (SNIPLevelPruner, "RANDOM"), (SIMDOCPruner, "SIMD_OC"), (TaylorFOChannelPruner, "RANDOM")])
def test_compress_params_hold_the_ratios(tmp_path, kind, prune_type):
    path, model = tmp_path / "compress_params.bin", Small(12)
    pruner = kind(model, 0.5, sensitivity_steps=1)
    with pytest.raises(RuntimeError, match="first pruning event"):
        pruner.save_compress_params(path)
    train(model, pruner, 1)
    pruner.save_compress_params(path)
    pruner.save_compress_params(path, append=True)
    algo, = read_params(path).algo
    assert algo.type == schema.CompressionAlgo.PRUNE
    assert algo.prune_params.type == getattr(schema.PruneParams, prune_type)
    blocks = prune_type == "SIMD_OC"
    params = algo.prune_params.simd_oc_pruner_params if blocks else algo.prune_params.level_pruner_params
    ratios = pruner.current_prune_ratios()
    assert list(params.weight_tensor_names) == list(pruner.weights())
    assert list(params.prune_ratios) == pytest.approx([ratios[name] for name in pruner.weights()])
    assert list(params.layer_names) == list(pruner.layers)
    assert not blocks or list(params.oc_blocks) == [4] * len(pruner.layers)


def test_layers_that_are_left_alone_are_listed_with_the_reason():
    model = Small(12)
    pruner = SNIPLevelPruner(model, 0.5, skip_layers=["he*"], skip_first=True, sensitivity_steps=1)
    train(model, pruner, 1)
    rows = {row.name: row for row in pruner.report()}
    assert list(rows) == ["stem", "inner", "depthwise", "head"]
    assert rows["stem"].reason == "the first layer" and rows["head"].reason == "named in skip_layers"
    assert "grouped" in rows["depthwise"].reason
    assert rows["inner"].ratio == 0.5 and rows["inner"].parameters == 12 * 12 * 9
    assert not (model.head.weight == 0).any()


def test_everything_is_skipped_says_so():
    with pytest.raises(ValueError, match="nothing to prune.*named in skip_layers"):
        SNIPLevelPruner(Small(), 0.5, skip_layers=["*"])
    with pytest.raises(ValueError, match="nothing to prune.*ConvTranspose2d"):
        SIMDOCPruner(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("change, error", [
    ({"sparsity": 1.0}, ValueError), ({"sparsity": 0.95, "max_prune_ratio": 0.9}, ValueError),
    ({"total_pruning_iterations": 0}, ValueError), ({"prune_finetune_iterations": -1}, ValueError),
    ({"max_prune_ratio": 0}, ValueError), ({"sensitivity_steps": 0}, ValueError), ({"ramp": "linear"}, TypeError)])
def test_bad_arguments_are_refused_at_once(kind, change, error):
    with pytest.raises(error):
        kind(Small(), **change)


@pytest.mark.parametrize("kind", ALL)
def test_what_is_no_model_is_refused(kind):
    with pytest.raises(TypeError, match="Module"):
        kind("model")


@pytest.mark.parametrize("kind", ALL)
def test_missing_gradients_are_named(kind):
    model = Small()
    with pytest.raises(RuntimeError, match="stem.weight.*zero_grad"):
        kind(model, 0.5).do_pruning(None)


def test_a_gradient_that_overflowed_does_not_poison_the_scores():
    model = Small(12)
    pruner = SNIPLevelPruner(model, 0.5, sensitivity_steps=2)
    for factor in (float("inf"), 1.0):
        x, y = batch(0)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model.inner.weight.grad *= factor
        pruner.do_pruning(None)
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)


def test_the_sample_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Small(12)
    pruner = SIMDOCPruner(model, total_pruning_iterations=1, sparsity=0.6, debug_info=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for index in range(12):
        d, t = batch(index)
        optimizer.zero_grad()
        F.nll_loss(F.log_softmax(model(d), 1), t).backward()
        optimizer.step()
        pruner.do_pruning()
    assert pruner.current_prune_ratios()[OVERALL] == pytest.approx(0.6, abs=5e-3)
    model.eval()
    torch.save(model.state_dict(), "pruned_model.pt")
    pruner.save_compress_params("compress_params.bin", append=False)
    assert (tmp_path / "found_prune_ratios.yml").exists() and (tmp_path / "compress_params.bin").exists()
    assert list(torch.load("pruned_model.pt", weights_only=True)) == list(Small(12).state_dict())


@pytest.mark.parametrize("make", LEVEL)
def test_a_shared_weight_is_pruned_once(make):
    table = nn.Embedding(8, 8)
    model = nn.Sequential(table, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight, model[4].weight = model[1].weight, table.weight
    pruner = make(model, 0.5, sensitivity_steps=1)
    model(torch.arange(8)).square().mean().backward()
    pruner.do_pruning(None)
    assert list(pruner.weights()) == ["1.weight", "4.weight"] and pruner.sparsity >= 0.5
    assert "that of 1" in {line.name: line.reason for line in pruner.report()}["3"]


@pytest.mark.parametrize("change, message", [
    (lambda model: setattr(model[2], "weight", model[0].weight), "'0' and '2' cannot be removed: they share"),
    (lambda model: nn.utils.parametrizations.weight_norm(model[2]), "around layer '2' .* computed from other"),
])
def test_channels_that_cannot_be_taken_out_are_refused_at_once(change, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    change(model)
    with pytest.raises(ValueError, match=message):
        TaylorFOChannelPruner(model)
