"""Coverage on models written down by hand: who is found, who is not, and what is said about it."""

import pytest

from proto_layers import layer
from slimtrain.core import LayerState
from slimtrain.proto import MnnLayer, MnnModel, WeightOnlyParams, quantize_algorithm
from slimtrain.proto.coverage import compare, misfits, wanted_layers
from slimtrain.proto.schema import Pipeline
from wire import FOREIGN_FILE

FLOAT, INT8, WEIGHT_ONLY = LayerState.FLOAT, LayerState.INT8, LayerState.WEIGHT_ONLY


def op(tensor, state=INT8, kind="Convolution", parameters=100, channels=2, inputs=1, name=None):
    bits = {FLOAT: 32, INT8: 8, WEIGHT_ONLY: 4}[state]
    return MnnLayer(name or tensor, tensor, kind, parameters, state, bits, channels, inputs, sparse=False)


def model(*layers, **writers):
    return MnnModel(tuple(layers), dict({item.tensor: item.kind for item in layers}, **writers), {})


def pipeline(*layers):
    return Pipeline(version="0.0.0", algo=[quantize_algorithm(layers)])


def test_spellings_of_one_layer_count_once():
    both = layer("conv", ("y", "y__before_tr"))
    result = compare(pipeline(both), model(op("y__before_tr")))
    assert [(item.name, item.parameters, item.state) for item in result.full.layers] == [("conv", 100, INT8)]
    assert (result.full.fraction, result.missing, result.unasked) == (1.0, (), ())


def test_shares_are_of_the_weights_asked_for():
    result = compare(
        pipeline(layer("a", ("a",)), layer("b", ("b",))),
        model(op("a", parameters=300), op("b", FLOAT, parameters=100), op("c", FLOAT, parameters=5000)),
    )
    assert result.full.fraction == 0.75
    assert [item.name for item in result.missing] == ["b"]
    assert [(item.name, item.parameters) for item in result.unasked] == [("c", 5000)]


def test_linear_layers_are_found_under_the_name_the_converter_gives_them():
    result = compare(pipeline(layer("fc", ("y",))), model(op("y__matmul_converted")))
    assert result.full.fraction == 1.0


def test_without_parameters_nothing_is_wanted():
    result = compare(None, model(op("a", FLOAT)))
    assert (result.full.fraction, result.missing, len(result.unasked)) == (1.0, (), 1)


def test_weight_only_is_enough_for_those_who_asked_for_it():
    wanted = pipeline(WeightOnlyParams("a", "op_a", 4), WeightOnlyParams("b", "op_b", 4))
    result = compare(wanted, model(op("x", WEIGHT_ONLY, name="op_a"), op("y", FLOAT, name="op_b")))
    assert result.full.layers == ()
    assert [(item.name, item.state) for item in result.weight_only.layers] == [
        ("a", WEIGHT_ONLY),
        ("b", FLOAT),
    ]
    assert [(item.name, item.reason) for item in result.missing] == [
        ("b", "the converter left the operator 'op_b' in float")
    ]


@pytest.mark.parametrize(
    ("found", "changes", "reason"),
    [
        (op("y", WEIGHT_ONLY), {}, "ignored its parameters"),
        (op("y", FLOAT, kind="Deconvolution"), {}, "no full int8 for Deconvolution"),
        (op("y", FLOAT, inputs=2), {}, "weights are computed by the model"),
        (op("z", FLOAT, name="conv_op"), {"op_name": "conv_op"}, "calls its output 'z', the parameters 'y'"),
        (op("z", FLOAT), {}, "no convolution writes 'y'; unclaimed with 2 channels: 'z'"),
        (op("z", FLOAT, channels=3), {}, "no convolution writes 'y'$"),
    ],
)
def test_reasons(found, changes, reason):
    result = compare(pipeline(layer("conv", ("y",), **changes)), model(found))
    (missing,) = result.missing
    assert missing.name == "conv"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(missing.reason)


def test_a_tensor_written_by_something_else_is_explained():
    result = compare(pipeline(layer("conv", ("y",))), model(op("c", FLOAT, channels=9), y="ReLU"))
    assert result.missing[0].reason == "no convolution writes 'y'; 'y' is written by ReLU"


def test_a_layer_that_is_not_found_does_not_count_as_nothing():
    result = compare(
        pipeline(layer("a", ("a",)), layer("b", ("b",), channels=3)), model(op("a", parameters=97))
    )
    assert result.full.fraction == 0.97


def test_shared_weights_of_another_writer_are_two_layers():
    theirs = Pipeline.FromString(FOREIGN_FILE)
    entries = theirs.algo[0].quant_params.layer
    second = entries.add()
    second.CopyFrom(entries[0])
    second.output[0].name = "y2"
    spelling = entries.add()
    spelling.CopyFrom(entries[0])
    spelling.output[0].name = "y__before_tr"
    assert [item.tensors for item in wanted_layers(theirs)] == [("y", "y__before_tr"), ("y2",)]


def test_scale_counts_that_crash():
    wanted = pipeline(
        layer("a", ("a",), channels=1),
        layer("b", ("b",), channels=2),
        layer("never int8", ("c",), channels=3),
        layer("under another name", ("z",), channels=4, op_name="d"),
    )
    found = model(
        op("a", channels=2),
        op("b", channels=2),
        op("c", FLOAT, kind="Deconvolution", channels=5),
        op("y", FLOAT, name="d", channels=5),
    )
    assert misfits(wanted, found) == ("layer 'a': 1 weight scales for 2 output channels",)
