"""What makes a training step cheap changes no number: activations inside quantization, the input's convolution."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import LSQQuantizer
from slimtrain.callbacks.fake_quant import Bounds, Range, fake_quantize, source_of
from slimtrain.callbacks.input_convolution import Geometry, convolve_input
from slimtrain.callbacks.simulation import Simulation


class Residual(nn.Module):
    """Each way to write an activation, behind a layer and behind a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.in_place = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.in_place(self.norm(self.first(x)))
        y = F.relu6(self.second(x))
        y = torch.relu_(self.third(y) + x)
        return self.head(F.relu(y * 3).mean([2, 3]))


def trained(model, images, steps):
    """Outputs and gradients of some training steps."""
    seen = []
    for _ in range(steps):
        output = model(images)
        output.square().sum().backward()
        seen += [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
    return seen


def quantized_twice():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 9, 9) - 0.2
    model = Residual().train()
    return images, [LSQQuantizer(copy.deepcopy(model)).convert() for _ in range(2)]


def test_activations_inside_quantization_change_nothing(monkeypatch):
    images, (one, other) = quantized_twice()
    fused = trained(one, images, 3)
    monkeypatch.setattr(Simulation, "runs_activations", False)
    plain = trained(other, images, 3)
    assert len(fused) == len(plain) > 30
    assert all(torch.equal(left, right) for left, right in zip(fused, plain))


def nodes_of(output):
    """The names of the operations that autograd knows of."""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [source for source, _ in node.next_functions]
    return [node.name() for node in found]


def test_activations_behind_layers_really_run_inside_quantization(monkeypatch):
    images, (model, plain) = quantized_twice()
    model(images), plain(images)
    names = nodes_of(model(images))
    monkeypatch.setattr(Simulation, "runs_activations", False)
    before = nodes_of(plain(images))
    assert "HardtanhBackward0" in before and "HardtanhBackward0" not in names
    assert before.count("ReluBackward0") == 3  # the other two are behind sums, which this network does not quantize
    assert names.count("ReluBackward0") == 2


@pytest.mark.parametrize("bounds", [Bounds(0.0, float("inf")), Bounds(0.0, 6.0)])
@pytest.mark.parametrize("elements", [100, 10000])
def test_a_bounded_quantization_is_an_activation_and_a_quantization(bounds, elements):
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(elements, generator=generator) * 5 for _ in range(2))
    values[:4] = torch.tensor([0.0, 6.0, -0.0, 5.99])
    found = []
    for inside in (True, False):
        x, scale = values.clone().requires_grad_(), torch.tensor(0.04, requires_grad=True)
        value = x if inside else (F.relu(x) if bounds.high > 6 else F.relu6(x))
        y = fake_quantize(value, scale, Range.of(-127, 127, 1e-6, bounds if inside else Bounds(-float("inf"),
                                                                                                   float("inf"))))
        y.backward(gradient)
        found.append((y.detach(), x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape, weights, geometry", [
    ((2, 3, 9, 11), (8, 3, 3, 3), Geometry(1, 1, 1, 1)),
    ((2, 4, 9, 11), (6, 2, 3, 2), Geometry((2, 1), (0, 2), (1, 2), 2)),
    ((2, 3, 17), (5, 3, 4), Geometry(2, 3, 1, 1)),
])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_input_convolution_has_the_gradients_of_autograd(shape, weights, geometry, has_bias):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    levels = Range.of(-7, 7, 1e-6)
    found = []
    for cheap in (True, False):
        generator.manual_seed(1)
        weight = torch.randn(weights, generator=generator, dtype=torch.float64).requires_grad_()
        bias = torch.randn(weights[0], generator=generator, dtype=torch.float64).requires_grad_() if has_bias else None
        scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        x = fake_quantize(images, scale, levels)
        convolve = F.conv1d if images.dim() == 3 else F.conv2d
        if cheap:
            result = convolve_input(x, source_of(x), scale, weight, bias, geometry)
        else:
            result = convolve(x, weight, bias, *geometry)
        result.sin().sum().backward()
        found.append([result.detach(), scale.grad, weight.grad] + ([bias.grad] if has_bias else []))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_only_an_input_without_gradient_has_a_source():
    scale, levels = torch.tensor(0.1, requires_grad=True), Range.of(-7, 7, 1e-6)
    images = torch.randn(2, 3)
    assert source_of(fake_quantize(images, scale, levels)).x is images
    assert source_of(fake_quantize(images.requires_grad_(), scale, levels)) is None
    assert source_of(fake_quantize(images.detach(), scale.detach(), levels)) is None
    assert source_of(images.detach()) is None


@pytest.mark.parametrize("wanted", [False, True])
def test_the_first_layer_takes_the_cheap_way_unless_the_images_want_a_gradient(wanted):
    images, (model, _) = quantized_twice()
    model(images)
    images.requires_grad_(wanted)
    first = []
    model.norm.register_forward_pre_hook(lambda module, args: first.append(args[0].grad_fn.name()))
    model(images).sum().backward()
    assert ("_InputConvolutionBackward" in first) != wanted
    assert (images.grad is not None) == wanted
