"""What is exported with a training batch runs on any other number of samples."""
import numpy as np
import pytest
import torch
from torch import nn

from slimtrain.callbacks import LSQQuantizer
from slimtrain.core import sqnr_db
from slimtrain.proto import run_model


class Reshaping(nn.Module):
    """Reshapes that name the batch: flatten, a split of channels into groups, and one with an open axis already."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.inner, self.head = nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        y = y.reshape(y.shape[0], 2, 4, 4, 4).transpose(1, 2).flatten(1)
        y = torch.relu(self.inner(y))
        return self.head(y.reshape(y.shape[0], 16))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_any_number_of_samples(batch, dynamo, tmp_path):
    pytest.importorskip("MNN")
    torch.manual_seed(0)
    model = Reshaping()
    quantizer = LSQQuantizer(model)
    quantizer.calibrate([torch.randn(8, 2, 4, 4)])
    deployed = quantizer.deploy(tmp_path / "net", torch.randn(batch, 2, 4, 4), dynamo=dynamo)
    assert deployed.sqnr_db >= 100
    for other in (1, 3, 8):
        x = torch.randn(other, 2, 4, 4)
        (scores,) = run_model(deployed.mnn, x.numpy()).values()
        assert sqnr_db(np.asarray(quantizer.simulate(x)), scores) >= 100
