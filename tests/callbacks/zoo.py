"""Small networks of every family that people deploy, with an example input each."""
from __future__ import annotations

from typing import Callable, Dict, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1,
            activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs), activation())


class Chain(nn.Module):
    """Convolutions one behind the other, with functional activations and a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        x = torch.relu(self.conv3(x))
        return self.head(x.mean([2, 3]))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18's plan: stem with max pool, four stages of two blocks, average pool, linear head."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for index in range(4):
            inputs, outputs = width * 2 ** max(index - 1, 0), width * 2 ** index
            stages += [BasicBlock(inputs, outputs, 1 if index == 0 else 2), BasicBlock(outputs, outputs, 1)]
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [] if expand == 1 else [conv_bn(inputs, hidden, 1, activation=nn.ReLU6)]
        layers += [conv_bn(hidden, hidden, 3, stride, hidden, activation=nn.ReLU6),
                   nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """ReLU6, depthwise convolutions, linear bottlenecks and a 1000-way classifier above 65536 weights."""

    def __init__(self, width: int = 8, last: int = 80, classes: int = 1000) -> None:
        super().__init__()
        plan = [(width, 1, 1), (width * 2, 2, 6), (width * 2, 1, 6), (width * 3, 2, 6), (width * 3, 1, 6)]
        blocks, inputs = [conv_bn(3, width, 3, 2, activation=nn.ReLU6)], width
        for outputs, stride, expand in plan:
            blocks.append(InvertedResidual(inputs, outputs, stride, expand))
            inputs = outputs
        blocks.append(conv_bn(inputs, last, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.expand = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(gate))))


class HardSwishNet(nn.Module):
    """MobileNetV3's parts: hard-swish, squeeze and excite, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2, activation=nn.Hardswish)
        self.expand = conv_bn(16, 32, 1, activation=nn.Hardswish)
        self.depthwise = conv_bn(32, 32, 5, 1, 32, activation=nn.Hardswish)
        self.se = SqueezeExcite(32)
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.Linear(16, 32), nn.Hardswish(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.se(self.depthwise(self.expand(x))))
        return self.head(x.mean([2, 3]))


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(conv_bn(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
                                    nn.BatchNorm2d(half), conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNet(nn.Module):
    """Concat, split and channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.last = conv_bn(16, 24, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.units(self.stem(x))).mean([2, 3]))


class Grouped(nn.Module):
    """ResNeXt's grouped convolutions, with a different activation behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.grouped1 = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.grouped2 = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.last = nn.Conv2d(32, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped2(F.relu(self.grouped1(self.stem(x)))))


class MLP(nn.Module):
    """Linear layers with batch norm and activations behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 300), nn.ReLU6(),
                                    nn.Dropout(0.1), nn.Linear(300, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Sequence(nn.Module):
    """Linear layers on (batch, sequence, features): a gated feed-forward block with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 96)
        self.gate = nn.Linear(32, 96)
        self.outer = nn.Linear(96, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.inner(x)) * torch.sigmoid(self.gate(x))
        return self.head(self.norm(x + self.outer(hidden)))


class Speech(nn.Module):
    """Conv1d layers, one depthwise, over (batch, channels, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(16, 24, 5, 2, 2)
        self.depthwise = nn.Sequential(nn.Conv1d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm1d(24), nn.ReLU())
        self.conv2 = nn.Conv1d(24, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.depthwise(F.relu(self.conv1(x))))


class Net(NamedTuple):
    make: Callable[[], nn.Module]
    shape: Tuple[int, ...]


ZOO: Dict[str, Net] = {
    "conv chain": Net(Chain, (2, 3, 16, 16)),
    "ResNet-18-like": Net(ResNet, (2, 3, 64, 64)),
    "MobileNetV2-like": Net(MobileNetV2, (2, 3, 32, 32)),
    "hard-swish and SE": Net(HardSwishNet, (2, 3, 16, 16)),
    "concat and channel shuffle": Net(ShuffleNet, (2, 3, 16, 16)),
    "grouped convolutions": Net(Grouped, (2, 3, 16, 16)),
    "MLP": Net(MLP, (4, 64)),
    "3-D Linear": Net(Sequence, (2, 7, 32)),
    "Conv1d": Net(Speech, (2, 16, 40)),
}


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and affines as training leaves them, some factors negative, and signals that last."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                size = (2.0 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * size)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.num_features, generator=generator) * 0.4 + 1.0)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model
