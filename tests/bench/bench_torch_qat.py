"""Time of an LSQ training step over that of the float step, and of the fake-quant operation over a product.

    python tests/bench/bench_torch_qat.py [--rounds 25] [--threads 2] [--json FILE]

Batch 8, 112x112 pixels, ResNet-18 and MobileNetV2 at full width. Steps take turns, so that whatever else the machine
does hits both of a pair; the figures are ratios of medians.
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "callbacks"))
from slimtrain.callbacks import LSQQuantizer
from slimtrain.callbacks.fake_quant import Range, fake_quantize
from zoo import InvertedResidual, ResNet, conv_bn

BATCH, PIXELS, ELEMENTS = 8, 112, 1_600_000
LIMITS = {"ResNet-18": 1.25, "MobileNetV2": 1.45, "fake-quant operation": 1.5}


def mobilenet():
    """MobileNetV2 (arXiv 1801.04381, table 2) at width 1."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers, inputs = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)], 32
    for expand, outputs, repeats, stride in plan:
        for index in range(repeats):
            layers.append(InvertedResidual(inputs, outputs, 1 if index else stride, expand))
            inputs = outputs
    layers.append(conv_bn(inputs, 1280, 1, activation=nn.ReLU6))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def stepper(make, quantized):
    """A function that makes one training step on one batch."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(1000, (BATCH,))
    model = make().train()
    if quantized:
        LSQQuantizer(model).convert()
        model(images)  # the first batch chooses the scales
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def operations():
    """Forward and backward of one fake quantization, and of a product with the same operands."""
    torch.manual_seed(0)
    x, gradient = torch.randn(ELEMENTS, requires_grad=True), torch.randn(ELEMENTS)
    scale = torch.tensor(0.02, requires_grad=True)
    levels = Range.of(-127, 127, 1e-6)

    def run(function):
        x.grad = scale.grad = None
        function().backward(gradient)

    return lambda: run(lambda: fake_quantize(x, scale, levels)), lambda: run(lambda: x * scale)


def medians(first, second, rounds, warm_up=3):
    """Median seconds of two functions that take turns."""
    times = [], []
    for number in range(rounds + warm_up):
        for function, measured in zip((first, second), times):
            begin = time.perf_counter()
            function()
            if number >= warm_up:
                measured.append(time.perf_counter() - begin)
    return [statistics.median(measured) for measured in times]


def measure(rounds):
    """Milliseconds of both sides and their ratio, by name."""
    nets = {"ResNet-18": lambda: ResNet(64, 1000), "MobileNetV2": mobilenet}
    pairs = {name: (stepper(make, True), stepper(make, False)) for name, make in nets.items()}
    pairs["fake-quant operation"] = operations()
    result = {}
    for name, pair in pairs.items():
        seconds, base = medians(*pair, rounds if name in nets else 10 * rounds)
        result[name] = {"ms": seconds * 1e3, "base_ms": base * 1e3, "ratio": seconds / base}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.rounds)
    for name, figures in result.items():
        print("{}: {ms:.1f} ms, {ratio:.2f} x {base_ms:.1f} ms (at most {:.2f} wanted)".format(
            name, LIMITS[name], **figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": options.threads, "limits": LIMITS, **result}, file,
                      indent=2)


if __name__ == "__main__":
    main()
