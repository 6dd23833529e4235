"""Expanded layers against the chain written out with torch's own layers, and against what they merge to."""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import LOP
from slimtrain.core import ParameterFileError
from slimtrain.proto import convert, read_params, run_model
from zoo import MobileNetV2, ResNet, lived_in

LAYERS = {
    "1x1": (lambda bias: nn.Conv2d(6, 6, 1, bias=bias), (4, 6, 7, 8)),
    "1x1, padded, stride 2": (lambda bias: nn.Conv2d(6, 9, 1, 2, 1, bias=bias), (4, 6, 7, 8)),
    "3x3": (lambda bias: nn.Conv2d(6, 6, 3, padding=1, bias=bias), (4, 6, 7, 8)),
    "3x3, stride 2": (lambda bias: nn.Conv2d(6, 8, 3, 2, 1, bias=bias), (4, 6, 9, 8)),
    "3x3, no padding": (lambda bias: nn.Conv2d(6, 6, 3, bias=bias), (4, 6, 9, 8)),
    "3x3, dilation 2": (lambda bias: nn.Conv2d(6, 6, 3, padding=2, dilation=2, bias=bias), (4, 6, 9, 8)),
    "5x5": (lambda bias: nn.Conv2d(6, 6, 5, padding=2, bias=bias), (4, 6, 9, 8)),
    "7x7, stride 2": (lambda bias: nn.Conv2d(3, 8, 7, 2, 3, bias=bias), (4, 3, 17, 16)),
    "3x5": (lambda bias: nn.Conv2d(6, 6, (3, 5), (1, 2), (1, 2), bias=bias), (4, 6, 9, 8)),
    "same": (lambda bias: nn.Conv2d(6, 6, (2, 3), padding="same", bias=bias), (4, 6, 9, 8)),
    "valid": (lambda bias: nn.Conv2d(6, 6, 3, padding="valid", bias=bias), (4, 6, 9, 8)),
    "reflect": (lambda bias: nn.Conv2d(6, 6, 3, padding=(1, 2), padding_mode="reflect", bias=bias), (4, 6, 9, 8)),
    "circular": (lambda bias: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", bias=bias), (4, 6, 9, 8)),
    "1-D": (lambda bias: nn.Conv1d(6, 6, 5, padding=2, bias=bias), (4, 6, 11)),
    "3-D": (lambda bias: nn.Conv3d(3, 3, 3, padding=1, bias=bias), (4, 3, 5, 6, 4)),
    "linear": (lambda bias: nn.Linear(6, 6, bias=bias), (5, 3, 6)),
}


class WrittenOut(nn.Module):
    """The chain in torch's own layers: pad, 1x1, norm, k x k, norm, 1x1, plus the input."""

    def __init__(self, layer, original):
        super().__init__()
        self.original, self.bypass = original, layer.tap is not None
        linear = isinstance(original, nn.Linear)
        self.axes = 0 if linear else len(original.kernel_size)
        make = [nn.Linear] if linear else [None, nn.Conv1d, nn.Conv2d, nn.Conv3d][self.axes:]
        one, extents = (() if linear else (1,)), (() if linear else (original.kernel_size,))
        wide, outer = layer.middle.shape[1], layer.middle.shape[0]
        run = {} if linear else {"stride": original.stride, "dilation": original.dilation}
        ins, outs = layer.first.shape[1], layer.last.shape[0]
        self.first = make[0](ins, wide, *one, bias=False)
        self.middle = make[0](wide, outer, *extents, bias=False, **run)
        self.last = make[0](outer, outs, *one, bias=original.bias is not None)
        for mine, weight in ((self.first, layer.first), (self.middle, layer.middle), (self.last, layer.last)):
            mine.weight.data = weight.detach().clone().reshape(mine.weight.shape)
        if original.bias is not None:
            self.last.bias.data = layer.bias.detach().clone()
        self.norms = None
        if layer.first_gain is not None:
            norm = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][self.axes]
            self.norms = nn.ModuleList([norm(wide), norm(outer)])
            for mine, gain, var in zip(self.norms, (layer.first_gain, layer.middle_gain),
                                       (layer.first_var, layer.middle_var)):
                mine.weight.data, mine.running_var = gain.detach().clone(), var.clone()

    def norm(self, index, x, centred):
        if self.norms is None:
            return x
        norm = self.norms[index]
        flat = x.reshape(-1, x.shape[-1]) if self.axes == 0 else x
        y = norm(flat).reshape(x.shape)
        if centred:
            return y
        shape = (-1,) if self.axes == 0 else (-1,) + (1,) * self.axes
        dims = [d for d in range(flat.dim()) if d != 1]
        var, mean = torch.var_mean(flat, dims, correction=0)
        if not self.training:
            var, mean = norm.running_var, norm.running_mean
        return y + (mean * norm.weight * torch.rsqrt(var + norm.eps)).reshape(shape)

    def forward(self, x):
        padded = x
        if self.axes and any(self.original._reversed_padding_repeated_twice):
            mode = self.original.padding_mode
            padded = F.pad(x, self.original._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)
        y = self.norm(0, self.first(padded), centred=False)
        y = self.last(self.norm(1, self.middle(y), centred=self.original.bias is not None))
        return y + x if self.bypass else y


def expanded(name, bias, norm, bypass, rate=3):
    make, shape = LAYERS[name]
    model = nn.Sequential(make(bias))
    lop = LOP(model)
    wide = lop.linear_expand_layers(rate, None, norm, bypass, expand_pointwise=True, expand_linear=True)
    return lop, model, wide, shape


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


CASES = list(itertools.product(sorted(LAYERS), [False, True], [False, True], [False, True]))


@pytest.mark.parametrize("name, bias, norm, bypass", CASES)
def test_trains_like_the_chain_and_merges_to_it(name, bias, norm, bypass):
    lop, model, wide, shape = expanded(name, bias, norm, bypass)
    oracle = WrittenOut(wide[0], model[0])
    for _ in range(3):
        x = torch.randn(shape) + 0.5
        found, expected = wide(x), oracle(x)
        close(found, expected, 2e-5)
        wide.zero_grad()
        oracle.zero_grad()
        target = torch.randn(found.shape)
        F.mse_loss(found, target).backward()
        F.mse_loss(expected, target).backward()
        for part in ("first", "middle", "last"):
            mine = getattr(wide[0], part)
            gradient = getattr(oracle, part).weight.grad.reshape(mine.shape)
            assert (mine.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7
    merged = lop.linear_merge_layers().eval()
    assert type(merged[0]) is type(model[0]) and repr(merged[0]) == repr(model[0])
    assert list(merged.state_dict()) == list(model.state_dict())
    x = torch.randn(shape)
    close(merged(x), wide.eval()(x))
    if norm:
        for mine, theirs in ((wide[0].first_var, oracle.norms[0].running_var),
                             (wide[0].middle_var, oracle.norms[1].running_var)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        if bias:
            torch.testing.assert_close(wide[0].middle_mean, oracle.norms[1].running_mean, rtol=1e-3, atol=1e-4)
        oracle.norms[0].running_mean.zero_()
        oracle.norms[1].running_mean.copy_(wide[0].middle_mean)
    close(wide(x), oracle.eval()(x), 2e-5)


def test_bypass_only_where_the_shape_stays():
    taps = {name: expanded(name, True, True, True)[2][0].tap for name in LAYERS}
    assert {name for name, tap in taps.items() if tap is None} == {
        "1x1, padded, stride 2", "3x3, stride 2", "3x3, no padding", "7x7, stride 2", "3x5", "valid", "reflect"}
    assert taps["3x3, dilation 2"] == (1, 1) and taps["5x5"] == (2, 2) and taps["same"] == (0, 1)
    assert expanded("3x3", True, True, False)[2][0].tap is None


@pytest.mark.parametrize("norm", [False, True])
def test_kept_weights_compute_the_same_at_first(norm):
    model, x = lived_in(ResNet()).eval(), torch.randn(2, 3, 32, 32)
    wide = LOP(model).linear_expand_layers(2, None, norm, keep_weights=True, expand_linear=True, expand_pointwise=True)
    close(wide.eval()(x), model(x), 1e-4)


def trained(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("make", [ResNet, MobileNetV2])
def test_state_dict_is_that_of_the_small_model(make):
    small, x = make(), torch.randn(2, 3, 32, 32)
    lop = LOP(small)
    wide = trained(lop.linear_expand_layers(2, None))
    fresh = make().eval()
    fresh.load_state_dict(wide.state_dict())
    close(fresh(x), wide(x))
    merged = lop.linear_merge_layers().eval()
    torch.testing.assert_close(merged(x), fresh(x), rtol=0, atol=0)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in small.named_parameters()]


def test_small_weights_load_into_the_expanded_model():
    small, x = lived_in(ResNet(), 3).eval(), torch.randn(2, 3, 32, 32)
    wide = trained(LOP(ResNet()).linear_expand_layers(3, None))
    assert (wide(x) - small(x)).norm() > 0.1 * small(x).norm()
    wide.load_state_dict(small.state_dict())
    close(wide(x), small(x), 1e-4)


def test_loading_speaks_of_missing_unknown_and_misshapen_weights():
    wide = LOP(nn.Sequential(nn.Conv2d(3, 4, 3))).linear_expand_layers(2, None)
    state = wide.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        wide.load_state_dict({"0.weight": state["0.weight"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.first"):
        wide.load_state_dict({**state, "0.first": state["0.weight"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        wide.load_state_dict({**state, "0.weight": state["0.weight"][:, :2]})


def test_training_resumes_exactly():
    torch.manual_seed(1)
    lop = LOP(ResNet())
    wide = trained(lop.linear_expand_layers(2, None))
    again = LOP(ResNet())
    copied = again.linear_expand_layers(2, None)
    copied.load_state_dict(wide.state_dict())
    again.load_state_dict(lop.state_dict())
    for model in (wide, copied):
        torch.manual_seed(5)
        trained(model)
    for (name, mine), other in zip(copied.named_parameters(), wide.parameters()):
        assert torch.equal(mine, other), name
    assert all(torch.equal(a, b) for a, b in zip(copied.buffers(), wide.buffers()))


def test_expanding_in_place_keeps_objects_and_merging_brings_the_parameters_back():
    model = ResNet()
    convolution, weight = model.conv1, model.conv1.weight
    lop = LOP(model)
    assert lop.linear_expand_layers(2, None, in_place=True) is model
    assert isinstance(convolution, nn.Conv2d) and not any(p is weight for p in model.parameters())
    expected = convolution.weight.detach().clone()
    assert lop.linear_merge_layers(in_place=True) is model
    assert convolution.weight is weight and type(convolution) is nn.Conv2d
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=0)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in ResNet().named_parameters()]


def test_copies_share_nothing():
    model = ResNet()
    before = copy.deepcopy(model.state_dict())
    lop = LOP(model)
    wide = trained(lop.linear_expand_layers(2, None))
    merged = lop.linear_merge_layers()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (model, wide, merged)]
    assert not pointers[0] & pointers[1] and not pointers[1] & pointers[2] and not pointers[0] & pointers[2]


def test_report_and_reasons():
    model = MobileNetV2()
    lop = LOP(model)
    lop.linear_expand_layers(2, None, skip_layers=[""])
    lines = {line.name: line for line in lop.report}
    assert len(lines) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert any("expand_pointwise" in line.reason for line in lines.values())
    assert any("grouped" in line.reason for line in lines.values())
    assert any("expand_linear" in line.reason for line in lines.values())
    for line in lines.values():
        assert (line.parameters[1] > line.parameters[0]) == (line.reason == "")


def test_eval_gradients_reach_the_input_only_through_the_small_layer():
    wide = LOP(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))).linear_expand_layers(2, None).eval()
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    wide(x).sum().backward()
    merged = nn.Conv2d(3, 3, 3, padding=1)
    merged.weight.data = wide[0].weight.detach()
    y = x.detach().clone().requires_grad_()
    merged(y).sum().backward()
    close(x.grad, y.grad)


def test_autocast_spoils_neither_statistics_nor_the_product():
    wide = LOP(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))).linear_expand_layers(2, None)
    x = torch.randn(8, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(wide(x)).all()
        low = wide[0].weight
    assert wide[0].middle_var.dtype == torch.float32
    torch.testing.assert_close(low, wide[0].weight, rtol=0, atol=0)


def test_the_merged_model_runs_in_mnn(tmp_path):
    lop = LOP(ResNet())
    trained(lop.linear_expand_layers(2, tmp_path / "p.bin"))
    merged, x = lop.linear_merge_layers().eval(), torch.randn(1, 3, 32, 32)
    torch.onnx.export(merged, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"])
    done = convert(tmp_path / "m.onnx", tmp_path / "m.mnn", tmp_path / "p.bin")
    found = run_model(done.path, x.numpy())
    found = next(iter(found.values())) if isinstance(found, dict) else found
    np.testing.assert_allclose(np.ravel(found), merged(x).detach().numpy().ravel(), rtol=1e-3, atol=1e-4)
    assert len(read_params(tmp_path / "p.bin").algo) == 0


@pytest.mark.parametrize("call, error", [
    (lambda: LOP(3), TypeError),
    (lambda: LOP(ResNet()).linear_expand_layers(0, None), ValueError),
    (lambda: LOP(ResNet()).linear_expand_layers(1.5, None), ValueError),
    (lambda: LOP(nn.Sequential(nn.Linear(3, 4))).linear_expand_layers(2, None), ValueError),
    (lambda: LOP(ResNet()).linear_expand_layers(2, None, skip_layers=["nothing*"]), ValueError),
    (lambda: LOP(LOP(ResNet()).linear_expand_layers(2, None)).linear_expand_layers(2, None), ValueError),
    (lambda: LOP(ResNet()).linear_merge_layers(), RuntimeError),
    (lambda: LOP(ResNet()).state_dict(), RuntimeError),
    (lambda: LOP(ResNet()).linear_expand_layers(2, "/nowhere/p.bin", append=True), ParameterFileError)])
def test_bad_calls_are_refused(call, error):
    with pytest.raises(error, match=r"\w+ \w+"):
        call()


def test_state_of_another_rate_is_refused():
    lops = []
    for rate in (2, 3):
        lops.append(LOP(nn.Sequential(nn.Conv2d(3, 4, 3))))
        lops[-1].linear_expand_layers(rate, None)
    with pytest.raises(ValueError, match="same expand_rate"):
        lops[0].load_state_dict(lops[1].state_dict())
    with pytest.raises(ValueError, match="other layers"):
        lops[0].load_state_dict({})


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_layers_of_the_older_weight_norm_stay_as_they_are():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    lop = LOP(model)
    lop.linear_expand_layers(2, None, in_place=True)
    assert [line.reason.partition(";")[0] for line in lop.report] == [
        "its weight is computed from other parameters", ""]
