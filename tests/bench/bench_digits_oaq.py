"""EMA and OAQ beside LSQ in 8 bits on digits: accuracy, the largest integer sums, the time of a training step.

    python tests/bench/bench_digits_oaq.py [--rounds 25] [--json FILE]

A net of four convolutions and a linear layer is trained in float, then fine-tuned for 8 epochs with each quantizer. The
sums of products of every layer over the whole test set are computed anew in int64 from the integers that are deployed;
beyond 32767 they overflow 16 bits. Step times are ratios to the float step, of median processor times over steps that
take turns.
Takes minutes.
"""
import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "callbacks"))
import digits_torch
from bench_digits_lsq import deployed_accuracy
from slimtrain.callbacks import (
    EMAQuantizerCallback,
    LSQQuantizer,
    LSQQuantizerCallback,
    OAQQuantizer,
    OAQQuantizerCallback,
)
from zoo import ResNet

KINDS = {"LSQ": LSQQuantizerCallback, "EMA": EMAQuantizerCallback, "OAQ": OAQQuantizerCallback}
LARGEST_SUM = 32767
MOST_BEHIND, SLOWEST = 0.005, 1.35


def largest_sums(quantizer, images):
    """By layer, the largest magnitude of an int64 sum of products of the deployed integers."""
    model, seen = quantizer.model, {}
    layers = {layer.name: layer for layer in quantizer.deployed_layers()}

    def look(name):
        def hook(module, args):
            layer = layers[name]
            grid = layer.input_grid
            levels = torch.round(args[0].double() / layer.input_scale).clamp(grid.lower, grid.upper)
            weight = torch.from_numpy(layer.levels).long().flatten(1)
            if isinstance(module, torch.nn.Conv2d):
                columns = F.unfold(levels, module.kernel_size, module.dilation, module.padding, module.stride).long()
                sums = weight @ columns
            else:
                sums = levels.long() @ weight.t()
            seen[name] = max(seen.get(name, 0), int(sums.max()), -1 - int(sums.min()))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [look(name) for name in layers]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return seen


def measure(nets, kind):
    """Accuracies, the largest sum of any layer, and the clamps of each seed."""
    result = {"simulated": [], "mnn": [], "largest_sum": [], "clamps": [], "sqnr_db": []}
    for seed, net in nets.items():
        with tempfile.TemporaryDirectory() as folder:
            callback = KINDS[kind](export_to=os.path.join(folder, "net"))
            module = digits_torch.tune(net, seed, callback)
            result["simulated"].append(digits_torch.accuracy(module))
            result["mnn"].append(deployed_accuracy(callback.deployed.mnn))
            result["sqnr_db"].append(min(callback.deployed.sqnr_db, 300.0))
            sums = largest_sums(callback.quantizer, digits_torch.data()[1][0])
            result["largest_sum"].append(max(sums.values()))
            clamps = getattr(callback.quantizer, "clamps", {})
            result["clamps"].append({name: clamp.level for name, clamp in clamps.items()})
            if any(not clamp.fits_int16 for clamp in clamps.values()):
                raise RuntimeError("a layer gave up: %r" % clamps)
    return result


def stepper(make_quantizer):
    """A function that makes one training step of a ResNet-18, batch 8, 112x112."""
    torch.manual_seed(0)
    model, images, labels = ResNet(64).train(), torch.randn(8, 3, 112, 112), torch.randint(10, (8,))
    if make_quantizer is not None:
        make_quantizer(model).convert()
        model(images)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def step_ratios(rounds, warm_up=5):
    """Medians of processor time over steps that take turns, over that of the float step."""
    steps = {"float": stepper(None), "LSQ": stepper(LSQQuantizer), "OAQ": stepper(OAQQuantizer)}
    times = {name: [] for name in steps}
    for number in range(rounds + warm_up):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if number >= warm_up:  # before that it compiles, and narrows most clamps
                times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: medians[name] / medians["float"] for name in ("LSQ", "OAQ")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json")
    options = parser.parse_args()
    digits_torch.quiet()
    ratios = step_ratios(options.rounds)
    print("training step over the float one, ResNet-18: LSQ %.2f, OAQ %.2f (at most %.2f)\n" % (
        ratios["LSQ"], ratios["OAQ"], SLOWEST))
    nets = digits_torch.float_nets()
    print("digits, 8 bits, mean of %d seeds; float %.4f; OAQ may be %.3f behind LSQ\n" % (
        len(nets), statistics.mean(digits_torch.accuracy(copy.deepcopy(net)) for net in nets.values()), MOST_BEHIND))
    print("| quantizer | simulated | MNN | largest sum | clamps |")
    print("| --- | ---: | ---: | ---: | --- |")
    results = {}
    for kind in KINDS:
        results[kind] = figures = measure(nets, kind)
        levels = [level for clamps in figures["clamps"] for level in clamps.values()]
        largest = max(figures["largest_sum"])
        print("| %s | %.4f | %.4f | %d%s | %s |" % (
            kind, statistics.mean(figures["simulated"]), statistics.mean(figures["mnn"]), largest,
            " overflows" if largest > LARGEST_SUM else "", "%d..%d" % (min(levels), max(levels)) if levels else "127"),
            flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"step_ratios": ratios, "quantizers": results}, file, indent=2)


if __name__ == "__main__":
    main()
