"""Sensitivity of layers to bits: against quantizing by hand, and from the measurement to a deployed model."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Small, images
from slimtrain.callbacks import (
    LSQQuantizer,
    WeightQuantizer,
    draw_sensitivity,
    int8_sensitivity,
    sensitivity_table,
    weight_sensitivity,
)
from slimtrain.core import LayerState, SlimtrainError, WeightMode, sqnr_db, stored_weight
from slimtrain.core.bit_choice import FLOAT_BITS


def trained(width=12):
    torch.manual_seed(0)
    model, (x, y) = Small(width), images(256)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained()


EXAMPLES = [images(32, seed) for seed in (5, 6)]


def loss_of(model):
    with torch.no_grad():
        return np.mean([F.cross_entropy(model(x), y).item() for x, y in EXAMPLES])


@pytest.mark.parametrize("mode", list(WeightMode))
def test_weights_are_measured_one_layer_at_a_time(model, mode):
    found = weight_sensitivity(model, EXAMPLES, F.cross_entropy, (2, 4), mode=mode)
    assert found.state is LayerState.WEIGHT_ONLY
    assert found.layers == ["stem", "inner", "depthwise", "head"]
    assert found.widths == [32, 4, 2]
    assert found.float_loss == pytest.approx(loss_of(model), rel=1e-6)
    with torch.no_grad():
        plain = np.concatenate([model(x).numpy().ravel() for x, _ in EXAMPLES])
    for result in found.results:
        if result.bits == FLOAT_BITS:
            assert (result.loss, result.sqnr_db) == (0.0, float("inf"))
            continue
        weight = model.get_submodule(result.layer).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(torch.from_numpy(stored_weight(before.numpy(), result.bits, mode).values))
            outputs = np.concatenate([model(x).numpy().ravel() for x, _ in EXAMPLES])
        assert result.loss == pytest.approx(loss_of(model) - found.float_loss, abs=1e-6)
        assert result.sqnr_db == pytest.approx(sqnr_db(plain, outputs), abs=0.01)
        with torch.no_grad():
            weight.copy_(before)


def test_model_is_left_as_it_was(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = len(model._forward_hooks)
    weight_sensitivity(model, EXAMPLES, F.cross_entropy, (3,))
    int8_sensitivity(model, EXAMPLES, F.cross_entropy)
    assert model.training
    assert len(model._forward_hooks) == hooks
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert len(list(model.parameters())) == len(list(Small(12).parameters()))
    model.eval()


def stored_loss(model, **arguments):
    quantizer = WeightQuantizer(model, **arguments)
    loss = loss_of(quantizer.convert())
    quantizer.strip_wq_ops()
    return loss


@pytest.mark.parametrize("bits, more", [(4, 1.0), (2, 1.15)])
def test_plan_beats_one_width_for_all(model, bits, more):
    found = weight_sensitivity(model, EXAMPLES, F.cross_entropy)
    budget = more * sum(result.bytes for result in found.results if result.bits == bits)
    plan = found.choose(largest_bytes=budget)
    assert plan.bytes <= budget
    mixed = stored_loss(model, layer_bits=plan.layer_bits, skip_quant_layers=plan.skip_quant_layers)
    uniform = stored_loss(model, bits=bits)
    assert mixed - found.float_loss < (uniform - found.float_loss) / 2


def test_plan_deploys(model, tmp_path):
    found = weight_sensitivity(model, EXAMPLES, F.cross_entropy, (8, 4))
    plan = found.choose(largest_loss=0.01)
    assert len(set(plan.bits.values())) > 1
    quantizer = WeightQuantizer(model, layer_bits=plan.layer_bits, skip_quant_layers=plan.skip_quant_layers)
    assert {name: storage.bits for name, storage in quantizer.storages.items()} == plan.layer_bits
    assert quantizer.deploy(tmp_path / "m", EXAMPLES[0][0]).sqnr_db > 80


def test_int8_skips_the_layer_that_hurts(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 16, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, 0] *= 300  # beside it the seven other inputs drown in the grid, though it reads zeros
        model[0].weight[0] = 0
        model[0].bias[0] = 0
    examples = [(x, F.softmax(model(x), 1).argmax(1)) for x, _ in EXAMPLES]
    found = int8_sensitivity(model, examples, F.cross_entropy, (8, 3))
    results = {(result.layer, result.bits): result for result in found.results}
    assert results["2", 8].sqnr_db < results["0", 8].sqnr_db - 10
    assert results["0", 8].bytes == results["0", 3].bytes
    limit = (results["2", 8].loss + results["0", 8].loss + results["5", 8].loss) / 2
    assert found.choose(largest_loss=max(limit, 0.0)).skip_quant_layers == ["2"]
    quantizer = LSQQuantizer(model, found.choose(largest_loss=max(limit, 0.0)).skip_quant_layers)
    quantizer.calibrate([x for x, _ in examples])
    assert quantizer.deploy(tmp_path / "m", examples[0][0]).coverage.fraction == 1.0


def test_table_and_picture_show_every_layer_and_width(model, tmp_path):
    found = weight_sensitivity(model, EXAMPLES, F.cross_entropy, (8, 2))
    text = sensitivity_table(found)
    for word in ("stem", "inner", "depthwise", "head", "8 bits", "2 bits", "dB"):
        assert word in text
    assert len([line for line in text.splitlines() if "dB" in line]) == 4
    draw_sensitivity(found, tmp_path / "bits.png", found.choose(largest_bytes=1e6))
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    draw_sensitivity(found, tmp_path / "bits.svg")
    assert "depthwise" in (tmp_path / "bits.svg").read_text() or (tmp_path / "bits.svg").stat().st_size > 5000


def test_picture_says_what_is_missing(model, tmp_path, monkeypatch):
    found = weight_sensitivity(model, EXAMPLES, F.cross_entropy, (8,))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SlimtrainError, match="slimtrain.report"):
        draw_sensitivity(found, tmp_path / "bits.png")
    assert not (tmp_path / "bits.png").exists()


def test_bad_arguments_are_refused(model):
    for arguments in (([], F.cross_entropy), (EXAMPLES, F.cross_entropy, ())):
        with pytest.raises(ValueError, match="examples and widths"):
            weight_sensitivity(model, *arguments)
    with pytest.raises(ValueError, match="2 to 8"):
        weight_sensitivity(model, EXAMPLES, F.cross_entropy, (1,))
    with pytest.raises(ValueError, match="nothing"):
        int8_sensitivity(model, EXAMPLES, F.cross_entropy, skip_quant_layers=["nothing"])


def test_a_quantizer_that_is_on_the_model_is_named():
    model = trained()
    LSQQuantizer(model).convert()
    with pytest.raises(RuntimeError, match="quantized already"):
        int8_sensitivity(model, EXAMPLES, F.cross_entropy)
