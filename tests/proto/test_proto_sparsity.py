"""What sparse storage is expected to save against the bytes that the converter writes, and what is said beforehand."""

import json
import os

import numpy as np
import pytest

from cli_runner import run
from proto_layers import layer, save_layers
from sample_models import pointwise
from slimtrain.proto import ConvertOptions, PruneType, convert, estimate_sparse, prune_algorithm, save_algorithm

SIZE = 96


def pruned(folder, sparsity, block=1):
    """A 1x1 convolution whose blocks of output channels are zero at random; its path and its share of zeros."""
    rng = np.random.RandomState(3)
    weight = rng.randn(SIZE, SIZE, 1, 1).astype(np.float32)
    dead = np.repeat(rng.rand(SIZE // block, SIZE) < sparsity, block, axis=0)
    weight += np.sign(weight)  # far from zero, so that no grid of 4 bits rounds more of them to it
    weight[dead] = 0
    sample = pointwise(folder, weight, np.zeros(SIZE, np.float32), rng.randn(1, SIZE, 3, 3).astype(np.float32))
    return sample, float(np.mean(weight == 0))


def block_params(folder, zeros):
    path = str(folder / "prune.bin")
    save_algorithm(path, prune_algorithm(PruneType.SIMD_OC, ["w"], [zeros], ["conv"], [4]), append=False)
    return path


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("block", [1, 4])
def test_expected_bytes_are_those_of_the_file(sparsity, block, tmp_path):
    sample, zeros = pruned(tmp_path, sparsity, block)
    params = block_params(tmp_path, zeros) if block == 4 else None
    for bits in (0, 4, 8):
        options = ConvertOptions(weight_bits=bits, sparse=True)
        estimate = estimate_sparse(sample.path, params, options)
        real = convert(sample.path, tmp_path / "sparse.mnn", params, options).bytes
        dense = convert(sample.path, tmp_path / "dense.mnn", params, ConvertOptions(weight_bits=bits)).bytes
        assert estimate.dense == dense
        assert estimate.zeros == pytest.approx(zeros, abs=1e-6)
        weights = SIZE * SIZE * (bits or 32) // 8
        # beside the weights MNN may write a table of their levels, at most 256 bytes
        assert abs(estimate.expected - real) < 0.02 * weights + 256, bits
        assert bool(estimate.notes()) == (zeros > 0.05 and estimate.expected >= dense)


def test_int8_layers_are_said_to_gain_nothing_before_the_conversion(tmp_path):
    sample, zeros = pruned(tmp_path, 0.9)
    params = save_layers(tmp_path / "p.bin", layer("conv", (sample.convs[0].tensor,), channels=SIZE))
    out = tmp_path / "out.mnn"
    status, output, errors = run("convert", sample.path, "--params", params, "-o", out, "--sparse", "--weight-bits", 8)
    assert status == 0
    assert "gain nothing: full int8 layers are always stored dense" in errors
    size = os.path.getsize(str(out))
    assert "expected {0:,} bytes, got {0:,}, 100.0% of the dense {0:,}".format(size) in output
    assert "{:.1%} zeros".format(zeros) in output


def test_what_is_worth_it_is_not_commented_on(tmp_path):
    sample, zeros = pruned(tmp_path, 0.8)
    out = tmp_path / "out.mnn"
    status, output, errors = run("convert", sample.path, "-o", out, "--sparse", "--weight-bits", 8, "--json")
    assert (status, errors) == (0, "")
    sparse = json.loads(output)["sparse"]
    assert sparse["notes"] == [] and sparse["zeros"] == pytest.approx(zeros)
    assert sparse["expected_bytes"] < 0.6 * sparse["dense_bytes"]
    assert os.path.getsize(str(out)) < 0.6 * sparse["dense_bytes"]


def test_blocks_of_floats_may_make_the_file_larger_and_this_is_said(tmp_path):
    sample, zeros = pruned(tmp_path, 0.35, block=4)
    out = tmp_path / "out.mnn"
    status, _, errors = run("convert", sample.path, "--params", block_params(tmp_path, zeros), "-o", out, "--sparse")
    assert status == 0
    assert "without --sparse the file is smaller" in errors
    assert os.path.getsize(str(out)) > convert(sample.path, tmp_path / "dense.mnn").bytes
