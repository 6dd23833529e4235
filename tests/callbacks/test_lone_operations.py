"""Operations that no layer takes in: what MNN does to them on integers is kept out, on any number of samples."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimtrain.callbacks import LSQQuantizer
from slimtrain.callbacks.exporting import named_outputs
from slimtrain.callbacks.operations import tensors_in
from slimtrain.core import sqnr_db
from slimtrain.proto import run_model


class Net(nn.Module):
    """Two convolutions, a linear layer over channels, and what a function makes of them."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.plain, self.linear = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.slope, self.norm = nn.PReLU(), nn.BatchNorm2d(8)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.function(self, self.a(x))

    def twice(self, y):
        return self.c(y), torch.tanh(y)


def last(y):
    return y.permute(0, 2, 3, 1)


CASES = {
    "clip at the end": lambda m, y: y.clamp(-0.2, 0.3),
    "leaky ReLU at the end": lambda m, y: F.leaky_relu(y, 0.1),
    "leaky ReLU of what is read elsewhere": lambda m, y: (m.c(y), F.leaky_relu(y, 0.1)),
    "leaky ReLU behind a sum": lambda m, y: m.c(F.leaky_relu(y + m.b(F.relu(y)), 0.1)),
    "learned slope": lambda m, y: m.slope(y),
    "absolute": lambda m, y: m.c(y.abs()),
    "negative": lambda m, y: m.c(F.relu(-y)),
    "ReLU of a concatenation": lambda m, y: m.c(F.relu(torch.cat([y[:, 4:], m.b(y)[:, :4]], 1))),
    "ReLU of a mean": lambda m, y: m.c(F.relu(F.adaptive_avg_pool2d(y, 1))),
    "ReLU of a ReLU": lambda m, y: m.c(F.relu6(F.relu(y))),
    "batch norm behind ReLU": lambda m, y: m.c(m.norm(F.relu(y))),
    "ReLU for a batch norm only": lambda m, y: (m.c(y), m.norm(F.relu(y))),
    "square read twice": lambda m, y: m.twice(y * y),
    "sum of slices read twice": lambda m, y: m.twice(y[:, :, ::2] + m.b(y)[:, :, ::2]),
    "sum in a concatenation": lambda m, y: torch.cat([y, y + m.b(y)], 1)[:, 4:12],
    "maximum of an axis read twice": lambda m, y: m.twice(y.max(3, keepdim=True)[0]),
    "constant added": lambda m, y: m.c(y + m.offset),
    "added to a constant": lambda m, y: m.c(m.offset + F.relu(y)),
    "taken from a constant": lambda m, y: m.c(m.offset - y),
    "constant behind a linear layer": lambda m, y: m.linear(last(y)) + m.offset.flatten(),
    "constant behind its ReLU": lambda m, y: F.relu(m.linear(last(y))) + m.offset.flatten(),
    "constant behind one without a bias": lambda m, y: m.plain(y.mean((2, 3))) + m.offset.flatten(),
}


@pytest.mark.parametrize("case", CASES)
def test_lone_operations_are_exact(case, tmp_path):
    pytest.importorskip("MNN")
    torch.manual_seed(0)
    quantizer = LSQQuantizer(Net(CASES[case]))
    model = quantizer.convert().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sum(output.pow(2).mean() for output in tensors_in(model(torch.randn(4, 3, 5, 5)))).backward()
    optimizer.step()
    deployed = quantizer.deploy(tmp_path / "m", torch.randn(2, 3, 5, 5), dynamo=False)
    assert deployed.sqnr_db >= 100
    for samples in (1, 5):
        x = torch.randn(samples, 3, 5, 5)
        found = run_model(deployed.mnn, x.numpy())
        for name, wanted in named_outputs(tmp_path / "m.onnx", quantizer.simulate(x)).items():
            assert sqnr_db(wanted.astype(np.float64), found[name].reshape(wanted.shape)) >= 100
