"""Bits chosen layer by layer: a digits classifier in the bytes of 3 bits, without loss and without a training step.

A small network is trained in float. Each layer is then stored in 8, 6, 4, 3 and 2 bits, alone, and the loss watched; a
search gives every layer the bits that fit a budget of bytes, or of loss. MNN runs the result; the table at the end
compares it with the same number of bits for all layers.

    python examples/digits_automatic_bits.py [--out out/bits] [--epochs 20]
"""
import argparse
import logging
import os
import warnings

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

from slimtrain.callbacks import WeightQuantizer, draw_sensitivity, sensitivity_table, weight_sensitivity
from slimtrain.proto import run_model

SEED, BATCH, TEST = 7, 64, 360


def load_images():
    """Digits as float32 [N, 1, 8, 8] in 0..1: training images and labels, test images and labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
    images = (torch.from_numpy(digits.images).float() / 16)[order, None]
    labels = torch.from_numpy(digits.target).long()[order]
    return images[TEST:], labels[TEST:], images[:TEST], labels[:TEST]


def build():
    """Four convolutions with batch norm and a linear layer."""
    layers = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model, images, labels, epochs):
    """Train in float."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def deploy(stem, model, images, labels, **arguments):
    """Store the weights, convert, and let MNN classify: (accuracy, bytes of the file, SQNR against the simulation)."""
    quantizer = WeightQuantizer(model, **arguments)
    deployed = quantizer.deploy(stem, images)
    quantizer.strip_wq_ops()
    (logits,) = run_model(deployed.mnn, images.numpy()).values()
    return float((logits.argmax(1) == labels.numpy()).mean()), deployed.bytes, deployed.sqnr_db


def main():
    """Train, measure, choose, deploy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join("out", "bits"), help="where the files go")
    parser.add_argument("--epochs", type=int, default=20, help="of training in float")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    warnings.filterwarnings("ignore")
    torch.manual_seed(SEED)
    images, labels, test_images, test_labels = load_images()
    model = train(build(), images, labels, options.epochs)

    # a part of the training images shows what each layer minds; the test images are kept for the end
    examples = list(zip(images[:512].split(128), labels[:512].split(128)))
    sensitivity = weight_sensitivity(model, examples, F.cross_entropy)
    console = Console()
    console.print(sensitivity_table(sensitivity), highlight=False, soft_wrap=True)
    budget = sum(result.bytes for result in sensitivity.results if result.bits == 3)
    plan = sensitivity.choose(largest_bytes=budget)
    draw_sensitivity(sensitivity, os.path.join(options.out, "sensitivity.png"), plan)

    table = Table("weights", "bits by layer", "bytes of weights", "bytes of file", "accuracy of MNN", "to simulation")
    uniform = {bits: {"bits": bits} for bits in (8, 4, 3, 2)}
    chosen = {"layer_bits": plan.layer_bits, "skip_quant_layers": plan.skip_quant_layers}
    for name, arguments in [*(("%d bits" % bits, each) for bits, each in uniform.items()), ("chosen", chosen)]:
        stem = os.path.join(options.out, name.replace(" ", "_"))
        accuracy, size, sqnr_db = deploy(stem, model, test_images, test_labels, **arguments)
        weights = plan.bytes if name == "chosen" else sum(
            result.bytes for result in sensitivity.results if result.bits == arguments["bits"])
        widths = " ".join(map(str, plan.bits.values())) if name == "chosen" else name
        table.add_row(name, widths, "%d" % weights, "%d" % size, "%.2f %%" % (100 * accuracy), "%.0f dB" % sqnr_db)
    console.print(table)
    with torch.no_grad():
        plain = float((model(test_images).argmax(1) == test_labels).float().mean())
    console.print("float: %.2f %%; the picture is %s" % (100 * plain, os.path.join(options.out, "sensitivity.png")))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
