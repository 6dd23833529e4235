"""How far optimizers move scales: not by weight decay, and by their size under optimizers that know no sizes."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nets import Small, images
from slimtrain.callbacks import LSQQuantizer, WAQQuantizer

RATE = 1e-2
NORMALISING = [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad]


def trained(optimizer, steps=1, **options):
    """A quantizer after some steps, and its scales before them."""
    torch.manual_seed(0)
    model, (x, y) = Small(), images(16)
    quantizer = LSQQuantizer(model, bits=8, **options)
    quantizer.calibrate([x])
    before = [scale.detach().clone() for scale in quantizer.scale_parameters()]
    stepper = optimizer(model.parameters())
    groups = [{key: value for key, value in group.items() if key != "params"} for group in stepper.param_groups]
    for _ in range(steps):
        stepper.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        stepper.step()
    assert [{key: value for key, value in group.items() if key != "params"} for group in stepper.param_groups] == groups
    return quantizer, before


@pytest.mark.parametrize("kind", NORMALISING, ids=lambda kind: kind.__name__)
def test_a_step_moves_a_scale_by_the_learning_rate_of_its_size(kind):
    quantizer, before = trained(lambda parameters: kind(parameters, lr=RATE))
    moved = [float(((after - old) / old).abs().max()) for old, after in zip(before, quantizer.scale_parameters())]
    assert max(moved) < 20 * RATE  # by its learning rate each scale would move many times its own size
    assert min(moved) > 0 and min(float(old.min()) for old in before) < RATE / 5


def test_under_sgd_a_scale_moves_by_its_gradient():
    quantizer, before = trained(lambda parameters: torch.optim.SGD(parameters, lr=RATE, weight_decay=0.5))
    for old, after in zip(before, quantizer.scale_parameters()):
        torch.testing.assert_close(after.detach(), old - RATE * after.grad)


def test_weights_move_as_they_would_without_scales():
    quantizer, _ = trained(lambda parameters: torch.optim.Adam(parameters, lr=RATE))
    torch.manual_seed(0)
    start = Small().inner.weight.detach()
    moved = (quantizer.layers["inner"].weight.detach() - start).abs()
    torch.testing.assert_close(moved, torch.full_like(start, RATE), rtol=1e-2, atol=1e-4)


def test_units_travel_with_the_state():
    quantizer, _ = trained(lambda parameters: torch.optim.Adam(parameters, lr=RATE), steps=3)
    again = LSQQuantizer(Small(), bits=8)
    again.load_state_dict(quantizer.state_dict())
    assert [scales.sizes for scales in again.scales.values()] == [scales.sizes for scales in quantizer.scales.values()]
    assert any(scales.sizes.weight < 0.1 for scales in again.scales.values())


def test_a_quantizer_may_be_collected_in_the_middle_of_a_step():
    quantizer = LSQQuantizer(Small(), bits=4)
    quantizer.itself = quantizer  # only the garbage collector ends this
    gone = weakref.ref(quantizer)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    weight.grad = torch.ones(2)
    handle = register_optimizer_step_pre_hook(lambda *_: gc.collect() and None)
    del quantizer
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert gone() is None and torch.equal(weight, torch.full((2,), 0.9))


def test_scales_by_position_move_by_their_size_too():
    torch.manual_seed(0)
    model, (x, y) = Small(), images(16)
    quantizer = WAQQuantizer(model, bits=8, min_sqnr_db=0.0)
    quantizer.calibrate([x])
    layers = {id(quantizer.scales[name].positions): quantizer.scales[name] for name in quantizer.forms}
    before = {key: scales.positions.detach().clone() for key, scales in layers.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()
    assert layers
    for key, scales in layers.items():
        moved = (scales.positions - before[key]).abs().max().item()
        assert 0 < moved <= 1.01 * RATE * scales.sizes.weight < RATE / 5
