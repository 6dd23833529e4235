"""Every family of networks, trained and deployed: MNN computes what was simulated, value for value."""
from __future__ import annotations

import pytest

from deployments import compare
from slimtrain.callbacks import LSQQuantizer
from zoo import ZOO

pytest.importorskip("MNN")

LOW_BITS = dict(zip(ZOO, (2, 3, 4, 2, 3, 4, 2, 3, 4)))


def check(name, bits, folder, **options):
    result = compare(lambda model: LSQQuantizer(model, bits=bits), ZOO[name], folder / "net", **options)
    assert result.coverage == 1.0
    assert result.deployed.coverage.fraction == 1.0
    assert result.sqnr_db >= 100
    assert result.float64_db >= 100


@pytest.mark.parametrize("name", ZOO)
def test_eight_bits(name, tmp_path):
    check(name, 8, tmp_path, inputs=2, dynamo=False)


@pytest.mark.parametrize("name", ZOO)
def test_low_bits(name, tmp_path):
    check(name, LOW_BITS[name], tmp_path, inputs=2, dynamo=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])  # of 2, the conv chain at 2 bits knows one answer to everything
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", ZOO)
def test_all_bits_of_all_networks(name, bits, seed, tmp_path):
    check(name, bits, tmp_path, inputs=6, steps=20, seed=seed)
