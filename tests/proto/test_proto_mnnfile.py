"""Reading converted models: the dump's odd spellings, and real files."""

import pytest

from sample_models import HAS_ONNX, save_onnx
from slimtrain.core import ConversionError, LayerState
from slimtrain.proto import ConvertOptions, convert, inspect_model
from slimtrain.proto.mnnfile import parse_dump

DUMP = """
{ "oplists":
[
{ "main_type": "Convolution2D", "main":
{ "common":
{ "kernelX": 3, "kernelY": 1, "group": 2, "outputCount": 4, "inputCount": 6, "relu": true }
, "weight": \n[ nan, -inf, inf, 0.5 ]
, "bias": \n[ ]
 }
, "name": "nan", "inputIndexes":
[ 0 ]
, "outputIndexes":
[ 1 ]
, "type": "Convolution" }
,
{ "main": { "factor": -nan, "low": -inf, "high": inf },
"name": "a \\" inf", "inputIndexes": [ 1 ], "outputIndexes": [ 2 ], "type": "Reshape" }
 ]
, "extraTensorDescribe":
[
{ "index": 1, "quantInfo": { "scale": 0.25 } }
 ]
, "subgraphs":
[
{ "tensors": [ "p", "q" ], "nodes":
[
{ "type": "MatMul", "name": "product", "main": { }, "inputIndexes": [ 0, 1 ], "outputIndexes": [ 1 ] }
 ]
 }
 ]
, "tensorName": [ "x", "inf", "moved" ] }
"""


def test_numbers_that_json_cannot_hold_and_names_that_look_like_them():
    model = parse_dump(DUMP.splitlines(keepends=True))
    (layer,) = model.layers
    assert (layer.name, layer.tensor, layer.parameters, layer.channels) == ("nan", "inf", 4 * 3 * 3, 4)
    assert layer.state is LayerState.FLOAT
    assert model.writers == {"inf": "Convolution", "moved": "Reshape", "q": "MatMul"}
    assert model.steps == {"inf": 0.25, "moved": 0.25}


def test_weights_computed_by_the_model_are_not_its_own():
    (layer,) = parse_dump(DUMP.replace("[ 0 ]", "[ 0, 2 ]").splitlines(keepends=True)).layers
    assert (layer.inputs, layer.parameters) == (2, 0)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"oplists": [{}], "tensorName": []}', DUMP.replace("common", "")]
)
def test_another_form_is_an_error(text):
    with pytest.raises(ConversionError, match="cannot make sense"):
        parse_dump(text.splitlines(keepends=True))


def test_layers_of_a_real_model(chain, float_mnn):
    layers = inspect_model(float_mnn).layers
    assert [layer.tensor for layer in layers] == [conv.tensor for conv in chain.convs]
    assert [layer.name for layer in layers] == [conv.op_name for conv in chain.convs]
    assert [layer.parameters for layer in layers] == [conv.weight.size for conv in chain.convs]
    assert [layer.channels for layer in layers] == [len(conv.weight) for conv in chain.convs]
    assert {(layer.state, layer.bits, layer.sparse) for layer in layers} == {(LayerState.FLOAT, 32, False)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ConvertOptions(weight_bits=4), (LayerState.WEIGHT_ONLY, 4)),
        (ConvertOptions(fp16=True), (LayerState.FLOAT, 16)),
    ],
)
def test_storage_of_a_real_model(chain, tmp_path, options, expected):
    convert(chain.path, tmp_path / "m.mnn", options=options)
    assert {(layer.state, layer.bits) for layer in inspect_model(tmp_path / "m.mnn").layers} == {expected}


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x00" * 1000])
def test_broken_models_are_one_clear_error(tmp_path, data):
    path = tmp_path / "broken.mnn"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="broken.mnn"):
        inspect_model(path)


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(ConversionError, match="no such model"):
        inspect_model(tmp_path / "none.mnn")


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx to write the model")
def test_sparse_products_and_transposed_convolutions(tmp_path):
    import numpy as np
    from onnx import helper

    rng = np.random.RandomState(0)
    conv = rng.randn(64, 64, 3, 3).astype(np.float32) * (rng.rand(64, 64, 3, 3) > 0.9)
    arrays = {"w": conv, "v": rng.randn(64, 8, 2, 2), "m": rng.randn(8, 5)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["c", "v"], ["t"], strides=[2, 2]),
        helper.make_node("MatMul", ["t", "m"], ["y"]),
    ]
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    path = save_onnx(tmp_path / "m.onnx", nodes, arrays, {"x": [1, 64, 4, 4]}, {"y": [1, 8, 8, 5]})
    options = ConvertOptions(sparse=True, extra=("--convertMatmulToConv", "0"))
    convert(path, tmp_path / "m.mnn", options=options)
    layers = inspect_model(tmp_path / "m.mnn").layers
    assert [(layer.kind, layer.parameters, layer.state, layer.bits, layer.sparse) for layer in layers] == [
        ("Convolution", conv.size, LayerState.FLOAT, 32, True),
        ("Deconvolution", 64 * 8 * 2 * 2, LayerState.FLOAT, 32, False),
        ("MatMul", 40, LayerState.FLOAT, 32, False),
    ]
