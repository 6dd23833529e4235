"""Options become the words that mean them, and combinations that MNN would ignore are refused."""

import pytest

from slimtrain.proto import ConvertOptions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"weight_bits": 4}, ["--weightQuantBits", "4", "--weightQuantAsymmetric=0"]),
        (
            {"weight_bits": 2, "asymmetric": True, "weight_block": 32, "hqq": True},
            ["--weightQuantBits", "2", "--weightQuantAsymmetric=1", "--weightQuantBlock", "32", "--hqq"],
        ),
        ({"fp16": True, "sparse": True}, ["--fp16", "--detectSparseSpeedUp"]),
        ({"extra": ("--optimizeLevel", "2")}, ["--optimizeLevel", "2"]),
    ],
)
def test_words(options, words):
    assert ConvertOptions(**options).arguments() == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "2..8, got 1"),
        ({"weight_bits": 9}, "2..8, got 9"),
        ({"asymmetric": True}, "weight_bits is missing"),
        ({"weight_block": 32}, "weight_bits is missing"),
        ({"weight_bits": 4, "weight_block": 24}, "multiple of 16, got 24"),
        ({"weight_bits": 4, "hqq": True}, "asymmetric is missing"),
        ({"weight_bits": 8, "fp16": True}, "exclude each other"),
        ({"extra": ("--weightQuantAsymmetric=1",)}, "repeats .*--weightQuantAsymmetric=1"),
        ({"extra": ("--MNNModel", "x.mnn")}, "repeats .*--MNNModel"),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(ValueError, match=message):
        ConvertOptions(**options)


@pytest.mark.parametrize("options", [{"weight_bits": 4.0}, {"weight_bits": "4"}, {"extra": "--fp16"}])
def test_refused_kinds(options):
    with pytest.raises(TypeError):
        ConvertOptions(**options)
