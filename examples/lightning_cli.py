"""The digits classifier under ``LightningCLI``: compression from a flag, or callbacks by their class path.

Run it like this:

    python examples/lightning_cli.py fit --trainer.max_epochs 10 --compress examples/compress.yaml
    python examples/lightning_cli.py fit --trainer.callbacks+=slimtrain.callbacks.LSQQuantizerCallback
"""
import pytorch_lightning as pl
from digits_lightning import Digits, load_images
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from slimtrain.callbacks import from_config


class DigitsData(pl.LightningDataModule):
    """scikit-learn's digits."""

    def train_dataloader(self):
        images, labels, _, _ = load_images()
        return DataLoader(TensorDataset(images, labels), 64, shuffle=True, drop_last=True)


class CompressCLI(LightningCLI):
    """Lightning's command line with the flag ``--compress``."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--compress", type=str, default="", help="a pipeline: a file, or one line")
        parser.set_defaults({"model.steps": 220, "model.rate": 1e-3})

    def instantiate_trainer(self, **kwargs):
        given = self._get(self.config_init, "trainer").callbacks or []
        compress = self._get(self.config, "compress")
        return super().instantiate_trainer(callbacks=[*given, *(from_config(compress) if compress else [])], **kwargs)


if __name__ == "__main__":
    CompressCLI(Digits, DigitsData, save_config_callback=None)
