"""The digits task of the quality benchmarks: data, nets, float training, fine-tuning in Lightning."""
from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from typing import Any, Dict, Iterable, List, Tuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SEEDS = (0, 1, 2)
TRAINING = 1200
FLOAT_EPOCHS, FLOAT_RATE = 20, 0.05
TUNING_EPOCHS, TUNING_RATE = 8, 0.01


def quiet() -> None:
    """Only the figures."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def data() -> Tuple[Tuple[Tensor, Tensor], Tuple[Tensor, Tensor]]:
    """1200 training and 597 test images [N, 1, 8, 8] in 0..1 with their labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)[order]
    labels = torch.from_numpy(digits.target).long()[order]
    return (images[:TRAINING], labels[:TRAINING]), (images[TRAINING:], labels[TRAINING:])


def conv_net() -> nn.Sequential:
    """Four 3x3 convolutions with batch norm and ReLU, 61 thousand weights."""
    layers: List[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def lenet_300_100() -> nn.Sequential:
    """LeNet-300-100 on 8x8 images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    """LeNet-5 (Caffe) with 3x3 kernels on 8x8 images."""
    return nn.Sequential(nn.Conv2d(1, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 500), nn.ReLU(), nn.Linear(500, 10))


class Digits(pl.LightningModule):
    """Trains a net by SGD with momentum and a cosine schedule."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}}


def fit(net: nn.Module, seed: int, epochs: int, rate: float, *callbacks: Any) -> Digits:
    """Train in place and return the module, with its net in evaluation mode."""
    torch.manual_seed(seed)
    dataset = torch.utils.data.TensorDataset(*data()[0])
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)
    module = Digits(net, rate)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                   callbacks=list(callbacks)).fit(module, loader)
    return module.eval()


def tune(net: nn.Module, seed: int, *callbacks: Any, epochs: int = TUNING_EPOCHS,
         rate: float = TUNING_RATE) -> Digits:
    """Fine-tune a copy of a trained net."""
    return fit(copy.deepcopy(net), seed, epochs, rate, *callbacks)


def float_nets(make: Any = conv_net, seeds: Iterable[int] = SEEDS) -> Dict[int, nn.Module]:
    """A net trained in float for each seed."""
    nets: Dict[int, nn.Module] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        nets[seed] = fit(make(), seed, FLOAT_EPOCHS, FLOAT_RATE).net
    return nets


def accuracy(model: nn.Module) -> float:
    """Share of the test images that are classified right."""
    images, labels = data()[1]
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())
