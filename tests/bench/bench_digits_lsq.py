"""Accuracy of LSQ at 8 to 2 bits on digits, in simulation and in MNN, beside the float net.

    python tests/bench/bench_digits_lsq.py [--bits 8 4 3 2] [--seeds 3] [--json FILE]

A net of four convolutions and a linear layer is trained in float, then fine-tuned for 8 epochs with every layer
quantized, and deployed; the accuracy in MNN is measured on the converted file. Takes minutes.
"""
import argparse
import json
import os
import statistics
import tempfile

from rich.console import Console
from rich.table import Table

import digits_torch
from slimtrain.callbacks import LSQQuantizerCallback
from slimtrain.proto import run_model

LIMITS = {4: 0.987, 3: 0.985, 2: 0.975}


def deployed_accuracy(path):
    """Share of the test images that a .mnn file classifies."""
    images, labels = digits_torch.data()[1]
    (scores,) = run_model(path, images.numpy()).values()
    return float((scores.argmax(1) == labels.numpy()).mean())


def measure(nets, bits):
    """Accuracies of each seed in simulation and in MNN, and the least coverage and SQNR of the deployed files."""
    simulated, in_mnn, coverage, sqnr = [], [], [], []
    for seed, net in nets.items():
        with tempfile.TemporaryDirectory() as folder:
            callback = LSQQuantizerCallback(bits=bits, export_to=os.path.join(folder, "net"))
            module = digits_torch.tune(net, seed, callback)
            simulated.append(digits_torch.accuracy(module))
            in_mnn.append(deployed_accuracy(callback.deployed.mnn))
            coverage.append(min(callback.deployed.coverage.fraction, callback.quantizer.coverage().fraction))
            sqnr.append(min(callback.deployed.sqnr_db, 300.0))
    return {"simulated": simulated, "mnn": in_mnn, "coverage": min(coverage), "sqnr_db": min(sqnr)}


def show(float_accuracies, results):
    """Print the table."""
    table = Table(title="digits, LSQ, mean of %d seeds" % len(float_accuracies))
    for title in ("bits", "simulated", "MNN", "wanted", "coverage", "SQNR dB"):
        table.add_column(title, justify="right")
    table.add_row("float", "%.4f" % statistics.mean(float_accuracies))
    for bits, figures in results.items():
        table.add_row("W%dA%d" % (bits, bits), "%.4f" % statistics.mean(figures["simulated"]),
                      "%.4f" % statistics.mean(figures["mnn"]), "%.3f" % LIMITS[bits] if bits in LIMITS else "",
                      "{:.0%}".format(figures["coverage"]), "%.0f" % figures["sqnr_db"])
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--seeds", type=int, default=len(digits_torch.SEEDS), help="how many; one image of one seed "
                        "is 0.0006 of the mean of three")
    parser.add_argument("--json")
    options = parser.parse_args()
    digits_torch.quiet()
    nets = digits_torch.float_nets(seeds=range(options.seeds))
    float_accuracies = [digits_torch.accuracy(net) for net in nets.values()]
    results = {bits: measure(nets, bits) for bits in options.bits}
    show(float_accuracies, results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"float": float_accuracies, "limits": LIMITS, "bits": results}, file, indent=2)


if __name__ == "__main__":
    main()
