"""The toolbox' own samples for PyTorch run with only the import changed, and MNN runs what they leave behind."""
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

from slimtrain.proto import ConvertOptions, convert, read_params, run_model

pytest.importorskip("MNN")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.bn(self.conv2(x)))
        return F.log_softmax(self.fc(x.mean([2, 3])), dim=1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 1, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator))
            for _ in range(12)]


def train_and_evaluate(model, data):
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for d, t in data:
        optimizer.zero_grad()
        F.nll_loss(model(d), t).backward()
        optimizer.step()
    model.eval()


def in_mnn(model, name, options=None):
    """The exported model's file, and how far MNN's outputs are from the model's."""
    x = torch.randn(1, 1, 8, 8)
    torch.onnx.export(model, (x,), name + ".onnx", dynamo=False)
    done = convert(name + ".onnx", name + ".mnn", "compress_params.bin", options or ConvertOptions())
    found = next(iter(run_model(name + ".mnn", x.numpy()).values())).reshape(1, -1)
    wanted = model(x).detach().numpy()
    return done, float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["SIMDOCPruner", "SNIPLevelPruner", "TaylorFOChannelPruner"])
def test_pruning(name, data):
    import slimtrain.callbacks as mnncompress

    kind = getattr(mnncompress, name)
    model = Net()
    pruner = kind(model, total_pruning_iterations=1, sparsity=0.6, debug_info=False)

    def train(model, data, optimizer, pruner):
        model.train()
        for d, t in data:
            optimizer.zero_grad()
            output = model(d)
            loss = F.nll_loss(output, t)
            loss.backward()
            optimizer.step()
            # step之后调用pruner的剪枝方法
            pruner.do_pruning()
        return pruner.current_prune_ratios()

    ratios = train(model, data, optim.SGD(model.parameters(), lr=0.01, momentum=0.9), pruner)
    model.eval()
    torch.save(model.state_dict(), "pruned_model.pt")
    pruner.save_compress_params("compress_params.bin", append=False)
    zeros = sum(int((value == 0).sum()) for value in pruner.weights().values())
    total = sum(value.numel() for value in pruner.weights().values())
    assert ratios["overall_prune_ratio"] == pytest.approx(zeros / total) == pytest.approx(0.6, abs=0.03)
    assert os.path.getsize("found_prune_ratios.yml") and len(read_params("compress_params.bin").algo) == 1
    _, error = in_mnn(model, "pruned_model", ConvertOptions(weight_bits=8, sparse=True))
    assert error < 0.02


def test_over_parameterization(data):
    from slimtrain.callbacks import LOP

    model = Net()
    lop = LOP(model)
    expand_model = lop.linear_expand_layers(8, "compress_params.bin")
    train_and_evaluate(expand_model, data)
    merged_model = lop.linear_merge_layers()
    merged_model.eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(merged_model(x), expand_model(x), rtol=1e-4, atol=1e-5)
    assert [value.shape for value in merged_model.parameters()] == [value.shape for value in model.parameters()]
    assert in_mnn(merged_model, "merged")[1] < 1e-4


def test_low_rank(data):
    from slimtrain.callbacks import low_rank_decompose

    model = Net()
    torch.save(model.state_dict(), "ori_float_model.pt")
    model.load_state_dict(torch.load("ori_float_model.pt", weights_only=True))
    dense = sum(value.numel() for value in model.parameters())
    model = low_rank_decompose(model, "compress_params.bin", skip_layers=[""])
    train_and_evaluate(model, data)
    assert sum(value.numel() for value in model.parameters()) < 0.5 * dense
    assert in_mnn(model, "low_rank")[1] < 1e-4
