"""Tiny networks and Trainers shared by the tests; imports nothing of slimtrain, as a user's own module would."""
from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Small(nn.Module):
    """Convolution with batch norm, a residual add, a depthwise convolution and a linear head."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.inner(x) + x)
        return self.head(F.relu6(self.depthwise(x)).mean([2, 3]))


def images(count: int = 32, seed: int = 0):
    """Random images whose class is the brightest quadrant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    quadrants = torch.stack([part.mean([1, 2, 3]) for half in x.chunk(2, 2) for part in half.chunk(2, 3)], 1)
    return x, quadrants.argmax(1)


def loader(count: int = 32, batch: int = 8, seed: int = 0):
    return DataLoader(TensorDataset(*images(count, seed)), batch_size=batch)


class Resumable:
    """Batches that go on where they stopped: Lightning alone starts a half finished epoch at its first batch again."""

    def __init__(self, count: int = 32, batch: int = 8) -> None:
        self.batches = list(loader(count, batch))
        self.taken = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.taken = self.taken, 0
        for index in range(start, len(self.batches)):
            self.taken = (index + 1) % len(self.batches)  # Lightning does not ask again after the last batch
            yield self.batches[index]

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Lit(pl.LightningModule):
    """A LightningModule that is its own network, trained by SGD with momentum and weight decay and a schedule."""

    def __init__(self, width: int = 6, rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Small(width)
        self.rate = rate
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=False)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), sync_dist=False)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class StepOnly(pl.LightningModule):
    """A LightningModule without a forward, whose steps call ``self.net``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def trainer(folder, *callbacks, **options):
    """A silent Trainer on the CPU that saves only what its callbacks save."""
    options = {"max_epochs": 2, "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
               **options}
    return pl.Trainer(default_root_dir=str(folder), callbacks=list(callbacks), accelerator="cpu", logger=False,
                      enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options)
