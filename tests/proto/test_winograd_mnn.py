"""The Winograd simulator against MNN's Winograd kernels, run on x86."""

from typing import Dict, NamedTuple

import numpy as np
import pytest

from onnx_convolutions import Branch, model, output_names
from slimtrain.core import (
    Activation,
    IntegerConv,
    WinogradForm,
    WinogradScales,
    activation_grid,
    dequantize,
    input_levels,
    max_steps,
    simulate_conv,
    sqnr_db,
    weight_grid,
)
from slimtrain.core.winograd import (
    largest_ratio,
    simulate_winograd,
    stable_ratio,
    transform_input,
    transform_weight,
    transforms,
)
from slimtrain.proto import LayerParams, QuantMethod, convert, quantize_algorithm, run_model, save_algorithm

GRID = activation_grid(8)


class Case(NamedTuple):
    """A convolution, how it is transformed, and the float input that it is given."""

    conv: IntegerConv
    scales: WinogradScales
    x: np.ndarray


def case(seed, form, outputs=12, inner=7, size=(11, 10), batch=2, padding=((1, 1), (1, 1)), **options):
    """A random convolution whose transformed numbers fill their range and sometimes leave it."""
    rng, form = np.random.RandomState(seed), WinogradForm(*form)
    weight = np.clip(np.round(rng.randn(outputs, inner, form.kernel, form.kernel) * 45), -127, 127).astype(int)
    levels = np.clip(np.round(rng.randn(batch, inner, *size) * 45), -127, 127).astype(int)
    largest = 0.8 * np.abs(transform_input(levels, form, padding)).max(axis=(1, 2, 3, 4)) / 127
    heaviest = 0.8 * np.abs(transform_weight(weight, form)).max(axis=2) / 127
    assert heaviest.max() < largest_ratio(transforms(form).weight)
    input_scale, scales = np.float32(0.03), (rng.uniform(0.5, 2, outputs) / 1000).astype(np.float32)
    spread = 45 * 45 * np.sqrt(weight[0].size) * 0.03 / 1000
    conv = IntegerConv(weight, scales, (rng.randn(outputs) * spread).astype(np.float32), float(input_scale),
                       spread / 40, GRID, padding=padding, **options)
    return Case(conv, WinogradScales(form, stable_ratio(largest), stable_ratio(heaviest)),
                (levels * input_scale).astype(np.float32))


CASES = {
    "F(2,3)": case(1, (2, 3)),
    "F(2,3), wide, relu": case(2, (2, 3), outputs=40, inner=65, activation=Activation.RELU),
    "F(2,3), lopsided padding": case(3, (2, 3), padding=((0, 2), (1, 0)), size=(9, 8)),
    "F(2,3), one tile": case(4, (2, 3), size=(4, 3), padding=((0, 0), (0, 1)), outputs=3, inner=1),
    "F(4,3)": case(5, (4, 3)),
    "F(4,3), wide, relu": case(6, (4, 3), outputs=40, inner=65, activation=Activation.RELU),
    "F(2,5)": case(7, (2, 5), padding=((2, 2), (2, 2))),
}


def branch(one: Case, shape) -> Branch:
    weight = dequantize(one.conv.weight, one.conv.weight_scales, axis=0)
    return Branch(one.x.shape, shape, weight, one.conv.bias, padding=one.conv.padding, activation=one.conv.activation)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Dict[str, np.ndarray]:
    """What MNN computes, by case."""
    folder, branches, layers = tmp_path_factory.mktemp("winograd"), [], []
    for index, one in enumerate(CASES.values()):
        branches.append(branch(one, simulated(one).shape))
        name, conv = output_names(index, branches[-1])[0], one.conv
        layers.append(LayerParams(name, (name,), conv.input_scale, conv.output_scale, conv.weight_scales, GRID,
                                  conv.output_grid, weight_grid(8), QuantMethod.WINOGRAD_AWARE, winograd=one.scales))
    (folder / "model.onnx").write_bytes(model(branches))
    save_algorithm(folder / "params.bin", quantize_algorithm(layers), append=False)
    assert convert(folder / "model.onnx", folder / "model.mnn", folder / "params.bin").coverage.fraction == 1.0
    results = run_model(folder / "model.mnn", {f"x{index}": one.x for index, one in enumerate(CASES.values())})
    return {name: results[f"y{index}"] for index, name in enumerate(CASES)}


def simulated(one: Case) -> np.ndarray:
    return simulate_winograd(input_levels(one.x, one.conv.input_scale, GRID), one.conv, one.scales)


@pytest.mark.parametrize("name", list(CASES))
def test_mnn_computes_what_is_simulated(outputs, name):
    one = CASES[name]
    expected = dequantize(simulated(one), one.conv.output_scale)
    # float32 sums of transformed products move an output next to a tie, never further
    assert max_steps(expected, outputs[name], one.conv.output_scale) < 1.5
    assert (np.abs(expected - outputs[name]) > one.conv.output_scale / 2).mean() < 1e-3


@pytest.mark.parametrize("name", list(CASES))
def test_it_is_not_plain_int8_that_ran(outputs, name):
    one = CASES[name]
    plain = dequantize(simulate_conv(input_levels(one.x, one.conv.input_scale, GRID), one.conv), one.conv.output_scale)
    assert 4 < sqnr_db(plain, outputs[name]) < 45
