"""Accuracy and size of low-bit weights on digits, trained and not, in simulation and in MNN, as a Markdown table.

    python tests/bench/bench_digits_weights.py [--modes symmetric asymmetric] [--seeds 3] [--json FILE]

A net of four convolutions and a linear layer is trained in float, then fine-tuned for 8 epochs with its weights as MNN
stores them, and deployed. "Integers" are those of the converted file that equal the trained ones, "size" the bytes of
the file over those of the float one. Takes minutes.
"""
import argparse
import copy
import json
import os
import statistics
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import digits_torch
from bench_digits_lsq import deployed_accuracy
from mnn_weights import decode
from slimtrain.callbacks import WeightQuantizer, WeightQuantizerCallback
from slimtrain.core import WeightMode
from slimtrain.proto import convert, read_params

CASES = [(8, True), (4, True), (3, True), (2, True), (4, False)]  # bits, whether trained
LIMITS = {(4, True): 0.988, (3, True): 0.988, (2, True): 0.983, (4, False): 0.988}


def equal_integers(quantizer, deployed, net):
    """How many weights of the file are the trained integers, and how many there are."""
    found, equal, total = decode(deployed.mnn), 0, 0
    norms = {"%d" % index: net[index + 1] for index in (0, 3, 6, 9)}
    for algorithm in read_params(os.path.splitext(deployed.mnn)[0] + ".compress_params.bin").algo:
        for entry in algorithm.quant_params.layer:
            name = entry.weight[0].name.rpartition("net.")[2]
            stored = quantizer.stored_weights()["net." + name if "net." + name in quantizer.layers else name]
            levels = stored.levels.reshape(len(stored.levels), -1).astype(np.int64)
            bits, norm = entry.weight[0].bits, norms.get(name)
            turned = np.zeros(len(levels), bool) if norm is None else norm.weight.detach().numpy() < 0
            if entry.weight[0].asymmetric:
                levels = np.where(turned[:, None], 2 ** bits - 1 - levels, levels) - 2 ** (bits - 1)
            else:
                levels = np.where(turned[:, None], -levels, levels)
            equal += int((found[entry.op_name].levels.ravel() == levels.ravel()).sum())
            total += levels.size
    return equal, total


def measure(nets, bits, trained, mode):
    """Figures of each seed, and those of their files together."""
    result = {"simulated": [], "mnn": [], "size": [], "equal": 0, "weights": 0}
    for seed, net in nets.items():
        with tempfile.TemporaryDirectory() as folder:
            stem, example = os.path.join(folder, "net"), digits_torch.data()[1][0]
            if trained:
                callback = WeightQuantizerCallback(bits, mode=mode, export_to="")
                model = digits_torch.tune(net, seed, callback)
                quantizer, net = callback.quantizer, model.net
            else:
                model = net = copy.deepcopy(net)
                quantizer = WeightQuantizer(model, bits, mode=mode)
                quantizer.convert()
            deployed = quantizer.deploy(stem, example, dynamo=False)
            convert(stem + ".onnx", stem + ".float.mnn")
            result["simulated"].append(digits_torch.accuracy(model))
            result["mnn"].append(deployed_accuracy(deployed.mnn))
            result["size"].append(deployed.bytes / os.path.getsize(stem + ".float.mnn"))
            equal, total = equal_integers(quantizer, deployed, net)
            result["equal"], result["weights"] = result["equal"] + equal, result["weights"] + total
    return result


def row(bits, trained, mode, figures):
    limit = LIMITS.get((bits, trained))
    return "| %d | %s | %s | %.4f | %.4f | %s | %s | %.3f |" % (
        bits, mode, "yes" if trained else "no", statistics.mean(figures["simulated"]), statistics.mean(figures["mnn"]),
        "" if limit is None else "%.3f" % limit,
        "all %d" % figures["weights"] if figures["equal"] == figures["weights"] else "%d of %d" % (
            figures["equal"], figures["weights"]), max(figures["size"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=[mode.value for mode in WeightMode])
    parser.add_argument("--seeds", type=int, default=len(digits_torch.SEEDS), help="how many; one image of one seed "
                        "moves the mean of three by 0.0006")
    parser.add_argument("--json")
    options = parser.parse_args()
    digits_torch.quiet()
    nets = digits_torch.float_nets(seeds=range(options.seeds))
    float_accuracy = statistics.mean(digits_torch.accuracy(net) for net in nets.values())
    print("digits, weights of few bits, mean of %d seeds; float %.4f\n" % (len(nets), float_accuracy))
    print("| bits | mode | trained | simulated | MNN | wanted | integers | size |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    results = []
    for mode in options.modes:
        for bits, trained in CASES:
            figures = measure(nets, bits, trained, mode)
            print(row(bits, trained, mode, figures), flush=True)
            results.append({"bits": bits, "trained": trained, "mode": mode, **figures})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"float": float_accuracy, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
