"""The compiled fake quantization: the numbers of the eager one, and really compiled wherever the model is traced."""
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from slimtrain.callbacks import LSQQuantizer, fake_quant
from slimtrain.callbacks.fake_quant import Range, fake_quantize

LEVELS = Range.of(-7, 7, 1e-6)
COMPILER = shutil.which("g++") and (Path(sysconfig.get_path("include")) / "Python.h").exists()
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs g++ and Python's headers")


def quantized(x, scale, gradient):
    """Result, its strides and both gradients."""
    x, scale = x.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
    y = fake_quantize(x, scale, LEVELS)
    y.backward(gradient)
    return y.detach(), x.grad, scale.grad


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [0, 32])
def test_compiled_numbers_are_the_eager_ones(rows, layout, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(32, 16, 5, 5, generator=generator).contiguous(memory_format=layout) for _ in range(2))
    x[0, 0] = torch.arange(-12, 13).reshape(5, 5) * 0.25  # halves of steps, and both ends
    scale = torch.linspace(0.2, 0.4, rows) if rows else torch.tensor(0.5)
    assert fake_quant._is_fused(x, scale, LEVELS)
    fused = quantized(x, scale, gradient)
    monkeypatch.setattr(fake_quant, "_COMPILE_FROM", x.numel() + 1)
    assert not fake_quant._is_fused(x, scale, LEVELS)
    eager = quantized(x, scale, gradient)
    assert torch.equal(fused[0], eager[0])
    assert torch.equal(fused[1], eager[1])
    torch.testing.assert_close(fused[2], eager[2], rtol=1e-4, atol=1e-4)  # sums in another order


@needs_compiler
@pytest.mark.parametrize("shape", [(16384, 1), (2, 4097), (3, 5, 7, 99), (1, 8192), (1, 3, 101, 67)])
def test_one_kernel_serves_every_size(shape, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    scale = torch.linspace(0.1, 0.4, shape[0])
    scale[0], scale[-1] = 1e-9, -0.3  # an optimizer step went far: the smallest scale, and a magnitude
    fused = quantized(x, scale, gradient)
    monkeypatch.setattr(fake_quant, "_COMPILE_FROM", x.numel() + 1)
    eager = quantized(x, scale, gradient)
    assert torch.equal(fused[0], eager[0])
    assert torch.equal(fused[1], eager[1])
    torch.testing.assert_close(fused[2], eager[2], rtol=1e-4, atol=1e-4)


def test_a_scale_is_used_by_its_magnitude_but_at_least_the_smallest():
    x, gradient = torch.randn(5, 64), torch.randn(5, 64)
    scale = torch.tensor([0.2, -0.2, 1e-9, -1e-9, 0.0])
    y, dx, ds = quantized(x, scale, gradient)
    used = torch.tensor([0.2, 0.2, 1e-6, 1e-6, 1e-6])
    expected_y, expected_dx, expected_ds = quantized(x, used, gradient)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected_dx)
    assert torch.equal(ds, expected_ds * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]))


@needs_compiler
def test_fused_inside_a_model_without_compiling_again():
    """A model's tracker is a function mode, which torch.compile would trace: it must not see it."""
    for _ in range(2):  # the second model brings another tracker
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).train()
        LSQQuantizer(model).convert()
        x = torch.randn(8, 3, 24, 24)
        model(x)
        torch._dynamo.utils.counters.clear()
        model(x).sum().backward()
        assert fake_quant._compiled(fake_quant._forward_kernel, "cpu") is not fake_quant._forward_kernel
        assert fake_quant._compiled(fake_quant._backward_kernel, "cpu") is not fake_quant._backward_kernel
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


def test_function_modes_are_back_after_the_operation():
    with torch.device("cpu"):  # a function mode of torch's own
        before = torch.overrides._get_current_function_mode_stack()
        fake_quantize(torch.randn(1 << 14), torch.tensor(0.1), LEVELS)
        assert torch.overrides._get_current_function_mode_stack() == before != []


@needs_compiler
@pytest.mark.parametrize("rows", [0, 32])
def test_a_gradient_that_others_read_too_is_left_alone(rows):
    """A sum gives all its operands one gradient; a convolution makes its weight one of its own."""
    x = torch.linspace(-9.0, 9.0, 32 * 512).reshape(32, 512).requires_grad_()
    scale = torch.full((rows,), 0.5) if rows else torch.tensor(0.5)
    other, factor = torch.zeros(32, 512, requires_grad=True), torch.full((32, 512), 3.0)
    one = other.exp()  # made first, so that backward comes to it last
    assert fake_quant._is_fused(x, scale, LEVELS)
    ((fake_quantize(x, scale.requires_grad_(), LEVELS) + one) * factor).sum().backward()
    assert x.grad.unique().tolist() == [0.0, 3.0]
    assert torch.equal(other.grad, factor)


@needs_compiler
@pytest.mark.parametrize("owned", [False, True])
def test_gradients_of_gradients_are_those_of_the_eager_operation(owned, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    start, factor = (torch.randn(32, 512, generator=generator) for _ in range(2))

    def penalty():
        x, scale = start.clone().requires_grad_(), torch.full((32,), 0.3, requires_grad=True)
        loss = (fake_quantize(x, scale, LEVELS, owned) ** 2 * factor).sum()
        of_x, of_scale = torch.autograd.grad(loss, (x, scale), create_graph=True)
        return torch.autograd.grad(of_x.square().sum() + of_scale.square().sum(), (x, scale))

    assert fake_quant._is_fused(start, torch.full((32,), 0.3), LEVELS)
    fused = penalty()
    monkeypatch.setattr(fake_quant, "_COMPILE_FROM", start.numel() + 1)
    for value, expected in zip(fused, penalty()):
        assert expected.abs().max() > 1
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_an_activation_with_many_scales_runs_though_no_kernel_knows_it():
    x, scale = torch.linspace(-9.0, 9.0, 32 * 512).reshape(32, 512), torch.full((32,), 0.5)
    levels = Range.of(-7, 7, 1e-6, fake_quant.Bounds(0.0, 2.2))
    assert not fake_quant._is_fused(x, scale, levels)
    expected = fake_quantize(x.clamp(0.0, 2.2), scale, LEVELS)
    assert expected.max() == 2.0
    assert torch.equal(fake_quantize(x, scale, levels), expected)
