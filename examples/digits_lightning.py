"""Quantization-aware training of a digits classifier in a Lightning ``Trainer``, down to int8 in MNN.

A small residual network is trained in float, then for a few epochs with ``LSQQuantizerCallback``, which leaves an ONNX
file, its ``compress_params.bin`` and the int8 ``.mnn`` behind. MNN runs that; the table at the end says what changed.

    python examples/digits_lightning.py [--out out/demo] [--epochs 20] [--qat-epochs 8]
"""
import argparse
import json
import logging
import os
import time
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimtrain.callbacks import CompressionReportCallback, LSQQuantizerCallback
from slimtrain.core import sqnr_db
from slimtrain.proto import convert, measure_latency, run_model

BATCH, SEED, EQUAL_DB = 64, 7, 300.0


def load_images():
    """Digits as float32 [N, 1, 8, 8] in 0..1: training images and labels, test images and labels."""
    digits = load_digits()
    order = np.random.RandomState(SEED).permutation(len(digits.images))
    images = torch.from_numpy(digits.images[order, None] / 16).float()
    labels = torch.from_numpy(digits.target[order])
    return images[360:], labels[360:], images[:360], labels[:360]


def conv_norm(inputs, outputs, size=3, stride=1, groups=1):
    """A convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs))


class Digits(pl.LightningModule):
    """A residual block, a depthwise-separable block with ReLU6, and two linear layers."""

    def __init__(self, steps, rate):
        super().__init__()
        self.steps, self.rate = steps, rate
        self.stem, self.left, self.right = conv_norm(1, 16), conv_norm(16, 16), conv_norm(16, 16)
        self.expand = conv_norm(16, 32, size=1)
        self.separate = conv_norm(32, 32, stride=2, groups=32)
        self.project = conv_norm(32, 32, size=1)
        self.hidden, self.logits = nn.Linear(4 * 4 * 32, 128), nn.Linear(128, 10)

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = F.relu(self.right(F.relu(self.left(y))) + y)
        y = F.relu6(self.separate(F.relu6(self.expand(y))))
        y = F.relu(self.project(y)).flatten(1)
        return self.logits(F.relu(self.hidden(y)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(model, data, epochs, *callbacks):
    """The user's training: nothing in it knows of quantization."""
    pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
               enable_model_summary=False, callbacks=[RichProgressBar(), *callbacks]).fit(model, data)


def accuracy(scores, labels):
    """Share of the images whose highest score is that of their label."""
    return float((np.asarray(scores).argmax(1) == np.asarray(labels)).mean())


def decibels(wanted, found):
    """SQNR of two results; equal ones count as 300 dB, because JSON has no infinity."""
    return min(sqnr_db(np.asarray(wanted), np.asarray(found)), EQUAL_DB)


def layer_outputs(model, images):
    """What each convolution and linear layer computes, by name."""
    outputs = {}
    hooks = [module.register_forward_hook(lambda _, given, output, name=name: outputs.update({name: output}))
             for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return {name: output.detach() for name, output in outputs.items()}


def run_torch(function, images, labels):
    """Run a model in PyTorch: its scores and figures."""
    times = []
    with torch.no_grad():
        scores = function(images)
        for _ in range(20):
            begin = time.perf_counter()
            function(images[:1])
            times.append(1e3 * (time.perf_counter() - begin))
    return scores, {"accuracy": accuracy(scores, labels), "ms": float(np.median(times))}


def run_mnn(path, images, labels):
    """Run a model in MNN: its scores and figures."""
    inputs = {"x": images.numpy()}
    (scores,) = run_model(path, inputs).values()
    return scores, {"accuracy": accuracy(scores, labels), "bytes": os.path.getsize(path),
                    "ms": measure_latency(path, {"x": images[:1].numpy()})}


def draw(path, quantizer, layer_sqnr):
    """A picture: what quantization costs each layer, and the steps of its weights and of its output."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    layers = quantizer.deployed_layers()
    places = range(len(layers))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.bar(places, [layer_sqnr[layer.name] for layer in layers])
    left.set_title("SQNR of each layer's output, int8 against float, dB")
    right.boxplot([layer.weight_scales for layer in layers], positions=places)
    right.plot(places, [layer.output_scale for layer in layers], "o", label="output")
    right.set_yscale("log")
    right.set_title("scales: weights (one per channel) and output")
    right.legend()
    for axes in (left, right):
        axes.set_xticks(places, [layer.name for layer in layers], rotation=45, ha="right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def show(report, out):
    """Print the table."""
    table = Table(title="digits: {coverage:.0%} of the weights in int8, MNN against its simulation {sqnr_db:.0f} dB, "
                        "{seconds:.0f} s".format(**report))
    for title in ("", "accuracy", "bytes", "ms", "SQNR dB", "of", "coverage"):
        table.add_column(title, justify="left" if title in ("", "of") else "right")
    for name, row in report["models"].items():
        table.add_row(name, "{accuracy:.4f}".format(**row), str(row.get("bytes", "")), "{ms:.3f}".format(**row),
                      "{:.1f}".format(row["sqnr_db"]) if "sqnr_db" in row else "", row.get("of", ""),
                      "{:.0%}".format(row["coverage"]) if "coverage" in row else "")
    Console().print(table)
    Console().print("written: {0}/report.json, {0}/report.png, {0}/compression_report.html, {0}/int8.mnn".format(out))


def main():
    """Train, fine-tune in int8, convert, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.join("out", "demo"))
    parser.add_argument("--epochs", type=int, default=20, help="of training in float")
    parser.add_argument("--qat-epochs", type=int, default=8, help="of fine-tuning in int8")
    options = parser.parse_args()
    out = options.out
    os.makedirs(out, exist_ok=True)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "torch.onnx"):  # tips, and that torchvision is missing
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # more of them only wait for each other in a network this small
    started = time.time()
    pl.seed_everything(SEED, verbose=False)
    images, labels, test_images, test_labels = load_images()
    data = DataLoader(TensorDataset(images, labels), BATCH, shuffle=True, drop_last=True)

    model = Digits(len(data) * options.epochs, rate=3e-3)
    train(model, data, options.epochs)
    float_scores, float_row = run_torch(model.eval(), test_images, test_labels)
    float_onnx, float_mnn = os.path.join(out, "float.onnx"), os.path.join(out, "float.mnn")
    torch.onnx.export(model, (test_images[:1],), float_onnx, input_names=["x"], dynamo=False)
    convert(float_onnx, float_mnn)
    mnn_float_scores, mnn_float_row = run_mnn(float_mnn, test_images, test_labels)

    model.train()
    model.steps, model.rate = len(data) * options.qat_epochs, 5e-4
    callback = LSQQuantizerCallback(export_to=os.path.join(out, "int8"))
    train(model, data, options.qat_epochs, callback, CompressionReportCallback())
    quantizer, deployed = callback.quantizer, callback.deployed
    fake_scores, fake_row = run_torch(quantizer.simulate, test_images, test_labels)
    int8_scores, int8_row = run_mnn(deployed.mnn, test_images, test_labels)

    simulated = layer_outputs(model, test_images)
    quantizer.strip_qat_ops()  # the same weights in float
    layer_sqnr = {name: decibels(wanted, simulated[name]) for name, wanted in layer_outputs(model, test_images).items()}
    report = {
        "coverage": min(deployed.coverage.fraction, quantizer.coverage().fraction),
        "sqnr_db": decibels(fake_scores, int8_scores),
        "models": {
            "float": {**float_row, "bytes": sum(value.nbytes for value in model.state_dict().values())},
            "fake-quant": {**fake_row, "sqnr_db": decibels(model(test_images).detach(), fake_scores),
                           "of": "its weights in float", "coverage": quantizer.coverage().fraction},
            "MNN float": {**mnn_float_row, "sqnr_db": decibels(float_scores, mnn_float_scores), "of": "float"},
            "MNN int8": {**int8_row, "sqnr_db": decibels(fake_scores, int8_scores), "of": "fake-quant",
                         "coverage": deployed.coverage.fraction}},
        "bytes_ratio": int8_row["bytes"] / mnn_float_row["bytes"], "layer_sqnr_db": layer_sqnr,
        "seconds": time.time() - started}
    with open(os.path.join(out, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    draw(os.path.join(out, "report.png"), quantizer, layer_sqnr)
    show(report, out)


if __name__ == "__main__":
    main()
