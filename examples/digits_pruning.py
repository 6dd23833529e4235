"""Pruning of a digits classifier in a Lightning ``Trainer``, down to a smaller file for MNN.

A small network is trained in float, then for a few epochs with a pruner callback, which leaves an ONNX file, its
``compress_params.bin`` and a ``.mnn`` without the zeros behind. A picture shows what each layer lost, and how much the
loss would notice if one of its weights were gone.

    python examples/digits_pruning.py [--pruner SIMDOC] [--sparsity 0.7] [--out out/pruning] [--epochs 20 8]
"""
import argparse
import json
import logging
import os
import warnings

import matplotlib
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimtrain.callbacks import SIMDOCPrunerCallback, SNIPLevelPrunerCallback, TaylorFOChannelPrunerCallback
from slimtrain.callbacks.plain_export import deploy_plain
from slimtrain.proto import run_model

matplotlib.use("agg")
from matplotlib import pyplot

PRUNERS = {"SNIP": SNIPLevelPrunerCallback, "SIMDOC": SIMDOCPrunerCallback, "TaylorFO": TaylorFOChannelPrunerCallback}
SEED = 7


def load_images():
    """Digits as float32 [N, 1, 8, 8] in 0..1: training images and labels, test images and labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
    images = torch.from_numpy(digits.images[:, None] / 16).float()[order]
    labels = torch.from_numpy(digits.target)[order]
    return images[360:], labels[360:], images[:360], labels[:360]


class Digits(pl.LightningModule):
    """Four convolutions with batch norm, and a linear layer."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        layers = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}}


def train(model, data, epochs, *callbacks):
    """The user's training: nothing in it knows of compression."""
    pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
               enable_model_summary=False, callbacks=[RichProgressBar(), *callbacks]).fit(model, data)


def accuracy_in_mnn(path, images, labels):
    """Share of the images that a .mnn file classifies right."""
    scores = [next(iter(run_model(path, images[start:start + 60].numpy()).values())).reshape(60, -1)
              for start in range(0, len(images), 60)]
    return float((torch.cat([torch.from_numpy(each) for each in scores]).argmax(1) == labels).float().mean())


def draw(path, rows):
    """Sparsity and sensitivity of each layer."""
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    names = [row["name"] for row in rows]
    above.bar(names, [row["sparsity"] for row in rows], color="tab:blue")
    above.set(ylabel="sparsity", ylim=(0, 1), title="What each layer lost, and what a weight of it means to the loss")
    below.bar(names, [row["sensitivity"] for row in rows], color="tab:orange")
    below.set(ylabel="mean |w dL/dw|", yscale="log", xlabel="layer")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def layer_rows(pruner):
    """Each layer's weights before and after, sparsity, sensitivity, and why it was left if it was."""
    scores = pruner.state_dict()["scores"]
    rows = []
    for line in pruner.report():
        score = scores.get(line.name + ".weight")
        rows.append({"name": line.name, "weights": line.parameters, "left": round(line.parameters * (1 - line.ratio)),
                     "sparsity": line.ratio, "sensitivity": 0.0 if score is None else float(score.mean()),
                     "reason": line.reason})
    return rows


def main():
    """Train, prune, compare both files in MNN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruner", choices=sorted(PRUNERS), default="SIMDOC")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--out", default="out/pruning")
    parser.add_argument("--epochs", type=int, nargs=2, default=(20, 8), help="of float training and of pruning")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.makedirs(options.out, exist_ok=True)
    pl.seed_everything(SEED, verbose=False)
    images, labels, test_images, test_labels = load_images()
    data = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)

    model = Digits(0.05)
    train(model, data, options.epochs[0])
    dense = deploy_plain(model, os.path.join(options.out, "dense"), test_images[:60])
    model.rate = 0.01
    callback = PRUNERS[options.pruner](options.sparsity, export_to=os.path.join(options.out, "pruned"))
    model.example_input_array = test_images[:60]
    train(model, data, options.epochs[1], callback)

    rows = layer_rows(callback.pruner)
    draw(os.path.join(options.out, "layers.png"), rows)
    files = {"dense": dense, "pruned": callback.deployed}
    results = {name: {"bytes": file.bytes, "accuracy": accuracy_in_mnn(file.mnn, test_images, test_labels)}
               for name, file in files.items()}
    with open(os.path.join(options.out, "report.json"), "w", encoding="utf-8") as file:
        json.dump({"sparsity": callback.deployed.sparsity, "files": results, "layers": rows}, file, indent=2)
    table = Table("in MNN", "accuracy", "bytes")
    for name, result in results.items():
        table.add_row(name, "%.3f" % result["accuracy"], "%d" % result["bytes"])
    layers = Table("layer", "weights", "left", "sparsity", "sensitivity")
    for row in rows:
        layers.add_row(row["name"], "%d" % row["weights"], "%d" % row["left"], "%.3f" % row["sparsity"],
                       "%.2e" % row["sensitivity"])
    Console().print(layers, table, "report, picture and models: " + options.out)


if __name__ == "__main__":
    main()
