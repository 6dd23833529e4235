"""Shares of weights by hand."""

from slimtrain.core import Coverage, LayerCoverage, LayerState


def sample():
    return Coverage((
        LayerCoverage("stem", "Conv", 100, LayerState.INT8),
        LayerCoverage("up", "ConvTranspose", 250, LayerState.FLOAT, "MNN has no int8 transposed convolution"),
        LayerCoverage("head", "Linear", 150, LayerState.WEIGHT_ONLY, "no scales"),
    ))


def test_shares_are_by_weights_not_by_layers():
    coverage = sample()
    assert coverage.parameters == 500
    assert coverage.fraction == coverage.share(LayerState.INT8) == 0.2
    assert coverage.share(LayerState.FLOAT) == 0.5
    assert coverage.share(LayerState.WEIGHT_ONLY) == 0.3


def test_what_is_missing_keeps_its_order_and_reason():
    assert [layer.name for layer in sample().missing] == ["up", "head"]
    assert sample().missing[0].reason == "MNN has no int8 transposed convolution"


def test_nothing_wanted_is_fully_covered():
    assert Coverage(()).fraction == 1.0
    assert Coverage(()).share(LayerState.FLOAT) == 0.0
    assert Coverage(()).missing == () and Coverage(()).rows() == []
    empty = Coverage((LayerCoverage("empty", "Conv", 0, LayerState.INT8),))
    assert empty.fraction == 1.0 and empty.rows() == [("empty", "Conv", 0, 0.0, "int8", "")]


def test_rows_are_plain_tuples():
    assert sample().rows() == [
        ("stem", "Conv", 100, 0.2, "int8", ""),
        ("up", "ConvTranspose", 250, 0.5, "float", "MNN has no int8 transposed convolution"),
        ("head", "Linear", 150, 0.3, "weight only", "no scales"),
    ]
