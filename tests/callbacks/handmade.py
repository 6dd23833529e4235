"""What a quantized model shall compute, written by hand: numpy puts values on grids, torch multiplies."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from slimtrain.callbacks import LSQQuantizer
from slimtrain.core import Role, fake_quantize

IN, OUT = Role.INPUT, Role.OUTPUT


def quantized(model, *example, bits=4, seed=0, **options):
    """A converted quantizer all of whose scales differ, so that a scale in the wrong place shows."""
    quantizer = LSQQuantizer(model, bits=bits, **options)
    quantizer.convert()
    quantizer.calibrate([example])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scale in quantizer.scale_parameters():
            scale.mul_(0.7 + 0.6 * torch.rand(scale.shape, generator=generator))
    model.train()
    return quantizer


class Hand:
    """Operations of a quantized model, one by one."""

    def __init__(self, quantizer) -> None:
        self.quantizer = quantizer
        self.layers = dict(quantizer.model.named_modules())

    def q(self, layer, role, x):
        """Put an activation on the grid of a layer's input or output."""
        scales = self.quantizer.scales[layer]
        value = fake_quantize(x.detach().numpy(), scales.activation_scale(role).item(), scales.grid(role))
        return torch.from_numpy(np.asarray(value))

    def run(self, layer, x):
        """The bare layer with its weights on their grid."""
        module, scales = self.layers[layer], self.quantizer.scales[layer]
        weight = fake_quantize(module.weight.detach().numpy(), scales.weight_scale().detach().numpy(),
                               scales.weight_grid, axis=0)
        weight, bias = torch.from_numpy(weight), module.bias
        if isinstance(module, torch.nn.Linear):
            return F.linear(x, weight, bias)
        function = F.conv1d if isinstance(module, torch.nn.Conv1d) else F.conv2d
        return function(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    def relu(self, layer, x):
        """The layer with a fused ReLU and its output on the grid."""
        return self.q(layer, OUT, F.relu(self.run(layer, x)))

    def plain(self, layer, x):
        """The layer alone, its output on the grid."""
        return self.q(layer, OUT, self.run(layer, x))
