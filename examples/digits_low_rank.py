"""Over-parameterized training and low-rank decomposition of a digits classifier, in two Lightning runs and int8 MNN.

The network is trained expanded and merged back (``LOPCallback``), then decomposed and fine-tuned while it learns to be
quantized (``LowRankDecompositionCallback`` and ``LSQQuantizerCallback`` in one Trainer). A picture shows the singular
spectra of every layer and the ranks that were chosen.

    python examples/digits_low_rank.py [--out out/low_rank] [--epochs 20 8]
"""
import argparse
import copy
import json
import logging
import os
import sys
import warnings

import matplotlib
import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from digits_pruning import SEED, Digits, accuracy_in_mnn, load_images, train

from slimtrain.callbacks import (
    LOPCallback,
    LowRankDecomposition,
    LowRankDecompositionCallback,
    LSQQuantizerCallback,
)
from slimtrain.callbacks.plain_export import deploy_plain

matplotlib.use("agg")
from matplotlib import pyplot


def draw(path, decomposition):
    """The singular values of each layer's unfoldings, largest 1, with the chosen ranks."""
    lines = [line for line in decomposition.report if line.name in decomposition.spectra]
    figure, axes = pyplot.subplots(1, len(lines), figsize=(3 * len(lines), 3), squeeze=False, layout="constrained")
    for axis, line in zip(axes[0], lines):
        for index, spectrum in enumerate(decomposition.spectra[line.name]):
            color = "C%d" % index
            axis.plot(range(1, spectrum.values.size + 1), spectrum.values / spectrum.values.max(), color=color)
            if line.ranks:
                axis.axvline(line.ranks[index], color=color, linestyle=":")
        axis.set(title="%s, %s" % (line.name, line.ranks or "dense"), xlabel="component", ylim=(0, 1.02))
    axes[0][0].set_ylabel("singular value")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    """Train expanded, merge, decompose, quantize; compare both files in MNN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/low_rank")
    parser.add_argument("--epochs", type=int, nargs=2, default=(20, 8), help="of expanded and of low-rank training")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.makedirs(options.out, exist_ok=True)
    pl.seed_everything(SEED, verbose=False)
    images, labels, test_images, test_labels = load_images()
    data = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)

    model = Digits(0.05)
    expanding = LOPCallback(4, export_to="")
    train(model, data, options.epochs[0], expanding)
    expanding.merge()
    dense = deploy_plain(model, os.path.join(options.out, "dense"), test_images[:60])

    example = test_images[:1]
    decomposition = LowRankDecomposition(copy.deepcopy(model), example_input=example)
    draw(os.path.join(options.out, "spectra.png"), decomposition)
    model.rate = 0.01
    model.example_input_array = test_images[:60]
    quantizing = LSQQuantizerCallback(export_to=os.path.join(options.out, "low_rank"))
    train(model, data, options.epochs[1], LowRankDecompositionCallback(), quantizing)

    rows = [dict(line._asdict()) for line in decomposition.report]
    results = {name: {"bytes": file.bytes, "sqnr_db": file.sqnr_db,
                      "accuracy": accuracy_in_mnn(file.mnn, test_images, test_labels)}
               for name, file in (("dense", dense), ("low rank, int8", quantizing.deployed))}
    with open(os.path.join(options.out, "report.json"), "w", encoding="utf-8") as file:
        json.dump({"files": results, "layers": rows}, file, indent=2)
    layers = Table("layer", "ranks", "weights", "multiply-adds", "error", "left because")
    for row in rows:
        layers.add_row(row["name"], " ".join(map(str, row["ranks"])), "%d to %d" % tuple(row["parameters"]),
                       "%d to %d" % tuple(row["multiply_adds"]), "%.3f" % row["error"], row["reason"])
    table = Table("in MNN", "accuracy", "bytes", "SQNR (dB)")
    for name, result in results.items():
        table.add_row(name, "%.3f" % result["accuracy"], "%d" % result["bytes"], "%.0f" % result["sqnr_db"])
    Console().print(layers, table, "report, picture and models: " + options.out)


if __name__ == "__main__":
    main()
