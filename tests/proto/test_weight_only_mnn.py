"""The weight-only grid of the core against the integers that the real converter writes."""

import numpy as np
import pytest

from mnn_weights import decode
from onnx_convolutions import Branch, model
from slimtrain.core import WeightMode, stored_weight
from slimtrain.proto import ConvertOptions, convert, run_model

# the converter's dump has six decimals; the runtime test below sees all digits
_DUMP_STEP = 2e-6

SHAPES = {"dense": (6, 32, 3, 3), "pointwise": (5, 48, 1, 1), "single": (7, 1, 1, 1)}


def _branches(weights):
    branches = []
    for weight in weights:
        outputs, inputs, height, width = weight.shape
        branches.append(Branch((1, inputs, 4, 4), (1, outputs, 5 - height, 5 - width), weight))
    return branches


@pytest.fixture(scope="module")
def weights():
    rng = np.random.RandomState(3)
    drawn = [(rng.standard_t(3, size=shape) * 0.1).astype(np.float32) for shape in SHAPES.values()]
    drawn[0][1] = 0                   # a channel of zeros
    drawn[0][2] *= 1e-6               # scales below what MNN divides by
    drawn[0][3] = 0.25                # a constant channel
    drawn[1][0] = np.abs(drawn[1][0]) + 0.5   # zero far outside the range
    drawn[1][1] = np.arange(48).reshape(48, 1, 1) / 2   # ties
    drawn[2][:, 0, 0, 0] = [0, 1, -1, 1e-7, -1e-3, 3, 4]
    return drawn


def _convert(weights, folder, options):
    source, target = str(folder / "model.onnx"), str(folder / "model.mnn")
    with open(source, "wb") as file:
        file.write(model(_branches(weights)))
    convert(source, target, options=options)
    return target


@pytest.mark.parametrize("mode", list(WeightMode))
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (6, 0), (5, 0), (4, 0), (3, 0), (2, 0), (4, 16), (8, 16), (2, 16)])
def test_levels_are_those_of_the_converter(weights, mode, bits, block, tmp_path):
    asymmetric = mode is WeightMode.ASYMMETRIC
    path = _convert(weights, tmp_path, ConvertOptions(weight_bits=bits, asymmetric=asymmetric, weight_block=block))
    found = decode(path)
    for index, weight in enumerate(weights):
        stored = stored_weight(weight, bits, mode, block)
        decoded = found["y%d" % index]
        offset = 2 ** (bits - 1) if asymmetric else 0
        assert decoded.bits == bits
        assert decoded.asymmetric == asymmetric
        np.testing.assert_array_equal(decoded.levels.reshape(weight.shape) + offset, stored.levels)
        alpha = np.stack([stored.minimums, stored.scales], -1) if asymmetric else stored.scales
        np.testing.assert_allclose(decoded.alpha, alpha.ravel(), atol=_DUMP_STEP)


@pytest.mark.parametrize("mode", list(WeightMode))
def test_values_are_what_the_runtime_multiplies_with(weights, mode, tmp_path):
    path = _convert(weights, tmp_path, ConvertOptions(weight_bits=3, asymmetric=mode is WeightMode.ASYMMETRIC))
    for index, weight in enumerate(weights):
        _, inputs, height, width = weight.shape
        values = stored_weight(weight, 3, mode).values.astype(np.float64)
        x = np.random.RandomState(index).randn(1, inputs, 4, 4).astype(np.float32)
        windows = np.lib.stride_tricks.as_strided(
            x, (inputs, height, width, 5 - height, 5 - width), (*x.strides[1:], *x.strides[2:]))
        expected = np.einsum("ocyx,cyxij->oij", values, windows.astype(np.float64))[None]
        feeds = {"x%d" % other: np.zeros((1, part.shape[1], 4, 4), np.float32) for other, part in enumerate(weights)}
        got = run_model(path, dict(feeds, **{"x%d" % index: x}))["y%d" % index]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
