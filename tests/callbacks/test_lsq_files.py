"""Files of a quantized model: written by the user's own export or by ours, run by MNN and by onnxruntime."""
from __future__ import annotations

import json
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from deployments import trained
from nets import Small, images
from slimtrain.callbacks import LSQQuantizer
from slimtrain.callbacks.exporting import named_inputs
from slimtrain.core import LayerState, SlimtrainError, sqnr_db
from slimtrain.proto import convert, inspect_model, read_params, run_model
from slimtrain.proto.cli import cli
from zoo import ZOO, Net, lived_in

X, Y = images(16, seed=5)


def quantized(model, bits=8, steps=4, **options):
    quantizer = LSQQuantizer(lived_in(model), bits=bits, **options)
    trained(quantizer, Net(type(model), tuple(X.shape)), steps)
    return quantizer


def run(path, *tensors):
    """Outputs of a converted model, in order, for the inputs of the ONNX file beside it."""
    feeds = named_inputs(str(path)[:-4] + ".onnx", tensors, {})
    return list(run_model(path, feeds).values())


# -- the user's own export


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_seed_sample_runs_with_only_its_import_changed(dynamo, tmp_path):
    # the sample of the guide, with slimtrain.callbacks for mnncompress.pytorch and data made here
    Quantizer = LSQQuantizer  # noqa: N806
    net, device, wanted = ZOO["MobileNetV2-like"], "cpu", {}
    model = lived_in(net.make())
    quantizer = Quantizer(model, retain_sparsity=False)
    quant_model = quantizer.convert()
    quant_model.to(device)
    optimizer = torch.optim.SGD(quant_model.parameters(), 1e-3, momentum=0.9)
    epochs = 1 if dynamo else 2  # the newer exporter takes its time
    for epoch in range(1, epochs + 1):
        quantizer.resume_qat_graph()
        quant_model.train()
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(quant_model(torch.randn(net.shape)), torch.randint(0, 1000, (2,))).backward()
            optimizer.step()
        quant_model.eval()
        with torch.no_grad():
            x = torch.randn(net.shape)
            wanted[epoch] = x, quant_model(x).double().numpy()
        quantizer.strip_qat_ops()
        torch.save(quant_model.state_dict(), tmp_path / ("model_%d.pt" % epoch))
        path = str(tmp_path / ("model_%d.onnx" % epoch))
        torch.onnx.export(quant_model, torch.randn(net.shape).to(device), path, dynamo=dynamo)
        quantizer.save_compress_params(path, str(tmp_path / ("params_%d.bin" % epoch)), append=False)
    for epoch, (x, expected) in wanted.items():
        target = tmp_path / ("model_%d.mnn" % epoch)
        conversion = convert(tmp_path / ("model_%d.onnx" % epoch), target, tmp_path / ("params_%d.bin" % epoch))
        assert conversion.coverage.fraction == 1.0
        (found,) = run(target, x)
        assert sqnr_db(expected, found.astype(np.float64)) >= 100
        net.make().load_state_dict(torch.load(tmp_path / ("model_%d.pt" % epoch), weights_only=True))


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_own_export_of_each_opset(opset, tmp_path):
    quantizer = quantized(Small(), 4)
    expected = quantizer.simulate(X).double().numpy()
    quantizer.strip_qat_ops()
    path = tmp_path / "mine.onnx"
    torch.onnx.export(quantizer.model.eval(), (X,), str(path), dynamo=False, opset_version=opset)
    quantizer.save_compress_params(path, tmp_path / "p.bin")
    assert onnx.load(path).opset_import[0].version == opset
    convert(path, tmp_path / "mine.mnn", tmp_path / "p.bin")
    assert sqnr_db(expected, run(tmp_path / "mine.mnn", X)[0].astype(np.float64)) >= 100


def test_a_file_can_be_rewritten_twice(tmp_path):
    quantizer = quantized(Small())
    quantizer.strip_qat_ops()
    path = tmp_path / "mine.onnx"
    torch.onnx.export(quantizer.model.eval(), (X,), str(path), dynamo=False)
    quantizer.save_compress_params(path, tmp_path / "p.bin")
    first = path.read_bytes()
    quantizer.save_compress_params(path, tmp_path / "p.bin")
    convert(path, tmp_path / "mine.mnn", tmp_path / "p.bin")
    found = run(tmp_path / "mine.mnn", X)[0].astype(np.float64)
    assert len(first) and sqnr_db(quantizer.simulate(X).double().numpy(), found) >= 100


def test_without_rewriting_the_file_stays_and_what_stays_float_is_reported(tmp_path, caplog):
    quantizer = quantized(Small())
    quantizer.strip_qat_ops()
    path = tmp_path / "mine.onnx"
    torch.onnx.export(quantizer.model.eval(), (X,), str(path), dynamo=False)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING, "slimtrain"):
        quantizer.save_compress_params(path, tmp_path / "p.bin", rewrite=False)
    assert path.read_bytes() == before
    assert "layer 'head' stays float" in caplog.text
    assert not any(name in caplog.text for name in ("'stem'", "'inner'", "'depthwise'"))
    convert(path, tmp_path / "mine.mnn", tmp_path / "p.bin")
    states = sorted(layer.state.value for layer in inspect_model(tmp_path / "mine.mnn").layers)
    assert states == sorted([LayerState.INT8.value] * 3 + [LayerState.FLOAT.value])


def test_a_file_of_other_weights_is_refused_and_left_alone(tmp_path):
    quantizer = quantized(Small())
    quantizer.strip_qat_ops()
    path = tmp_path / "other.onnx"
    torch.onnx.export(Small().eval(), (X,), str(path), dynamo=False)
    before = path.read_bytes()
    with pytest.raises(SlimtrainError, match="weights of layer 'stem'"):
        quantizer.save_compress_params(path, tmp_path / "p.bin")
    assert path.read_bytes() == before and not (tmp_path / "p.bin").exists()


def test_saving_before_training_says_what_to_do(tmp_path):
    quantizer = LSQQuantizer(Small())
    quantizer.convert()
    with pytest.raises(RuntimeError, match="train, or call calibrate"):
        quantizer.export(tmp_path / "m", X)
    assert not list(tmp_path.iterdir())


# -- our export


def snapshot(model):
    """Everything of a model that an export could disturb."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = {name: (list(module._forward_pre_hooks), list(module._forward_hooks))
             for name, module in model.named_modules()}
    return ({name: (id(value), value.detach().clone(), value.grad if value.grad is None else value.grad.clone())
             for name, value in tensors.items()},
            {name: module.training for name, module in model.named_modules()}, hooks, torch.get_rng_state())


def equal(first, second):
    same = first[0].keys() == second[0].keys() and first[1:3] == second[1:3] and torch.equal(first[3], second[3])
    for name, (key, value, grad) in first[0].items():
        other = second[0][name]
        same = same and key == other[0] and torch.equal(value, other[1])
        same = same and (grad is None) == (other[2] is None) and (grad is None or torch.equal(grad, other[2]))
    return same


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_export_leaves_the_training_model_untouched_and_training_goes_on(dynamo, tmp_path):
    def run(export):
        torch.manual_seed(3)
        quantizer = LSQQuantizer(lived_in(Small()), bits=4)
        model = quantizer.convert().train()
        model.norm.eval()  # a user who freezes batch norm finds it frozen afterwards
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(4):
            optimizer.zero_grad()
            F.cross_entropy(F.dropout(model(X)), Y).backward()
            optimizer.step()
            if export and step == 1:
                before = snapshot(model)
                quantizer.export(tmp_path / "m", X, dynamo=dynamo)
                assert equal(before, snapshot(model))
        return snapshot(model)

    first, second = run(True), run(False)
    assert all(torch.equal(value, second[0][name][1]) for name, (_, value, _) in first[0].items())


def test_exported_file_is_whole_and_valid(tmp_path):
    quantizer = quantized(Small())
    exported = quantizer.export(tmp_path / "deep" / "folder" / "m", X)
    onnx.checker.check_model(onnx.load(exported.onnx), full_check=True)
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == ["m.compress_params.bin", "m.onnx"]
    assert len(read_params(exported.params).algo) == 1
    session = onnxruntime.InferenceSession(exported.onnx, providers=["CPUExecutionProvider"])
    quantizer.strip_qat_ops()
    with torch.no_grad():
        wanted = quantizer.model.eval()(X).numpy()
    assert sqnr_db(wanted, session.run(None, {"x": X.numpy()})[0]) >= 30


@pytest.mark.parametrize("dynamo, opset", [(True, 18), (True, 20), (False, 11), (False, 17)])
def test_export_of_each_opset(dynamo, opset, tmp_path):
    quantizer = quantized(Small())
    deployed = quantizer.deploy(tmp_path / "m", X, dynamo=dynamo, opset=opset)
    versions = [entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import if not entry.domain]
    assert versions == [opset] and deployed.sqnr_db >= 100 and deployed.coverage.fraction == 1.0


def test_standard_quantized_file_runs_in_int8_in_onnxruntime(tmp_path):
    quantizer = quantized(Small(8), steps=8)
    quantizer.export(tmp_path / "m", X, qdq=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.qdq.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 4, kinds
    found = session.run(None, {"x": X.numpy()})[0].astype(np.float64)
    assert sqnr_db(quantizer.simulate(X).double().numpy(), found) >= 100


def test_recorded_simulation_is_what_verify_finds_in_the_converted_file(tmp_path):
    quantizer = quantized(Small())
    stem = str(tmp_path / "m")
    quantizer.export(stem, X, dynamo=False, simulation=True)
    runner = CliRunner()
    command = ["convert", stem + ".onnx", "--params", stem + ".compress_params.bin", "-o", stem + ".mnn"]
    assert runner.invoke(cli, command).exit_code == 0
    check = ["verify", stem + ".mnn", "--reference", stem + ".simulation.npz", "--min-sqnr", "100", "--json"]
    done = runner.invoke(cli, check)
    assert done.exit_code == 0 and json.loads(done.stdout)["max_error"] == pytest.approx(0.0, abs=1e-6)
    quantizer.scales["inner"].weight.data[0] *= 1.5  # a simulation of other scales is told apart
    quantizer.export(tmp_path / "other", X, dynamo=False, simulation=True)
    check[3] = str(tmp_path / "other.simulation.npz")
    assert runner.invoke(cli, check).exit_code == 1


# -- what stays float, and what branches


class Mixed(nn.Module):
    """Layers that MNN has in int8 and layers that it has not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.small_groups = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.embedding = nn.Embedding(5, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.small_groups(F.relu(self.stem(x))))
        x = self.normed(F.relu(self.up(x))).mean([2, 3])
        return self.head(x + self.embedding(torch.zeros(1, dtype=torch.long)))


def test_layers_that_stay_float_are_listed_with_their_reason(tmp_path):
    quantizer = quantized(Mixed())
    rows = {layer.name: layer for layer in quantizer.coverage().layers}
    assert [name for name, layer in rows.items() if layer.state is LayerState.INT8] == ["stem", "head"]
    for name, reason in (("small_groups", "small groups"), ("up", "no int8 ConvTranspose2d"),
                         ("embedding", "no int8 Embedding"), ("normed", "parametrization")):
        found = [layer.reason for key, layer in rows.items() if key.startswith(name)]
        assert found and reason in found[0], (name, found)
    deployed = quantizer.deploy(tmp_path / "m", X)
    assert deployed.coverage.fraction == 1.0 and deployed.sqnr_db >= 100


class Branching(Small):
    """Which layers run depends on the data."""

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        if x.mean() > 0:
            x = F.relu(self.inner(x) + x)
        return self.head(F.relu6(self.depthwise(x)).mean([2, 3]))


def test_a_branch_on_data_deploys_as_the_example_takes_it_and_says_so(tmp_path, caplog):
    quantizer = quantized(Branching())
    with caplog.at_level(logging.WARNING, "slimtrain"):
        deployed = quantizer.deploy(tmp_path / "m", X)
    assert "keeps the branches that the example input takes" in caplog.text
    assert deployed.sqnr_db >= 100 and deployed.coverage.fraction == 1.0
