"""The integer simulator against the real MNN runtime: not one different level, ties and corners included.

All cases are branches of one model, converted and run once. Steps are related by powers of two, which puts
many sums next to a tie.
"""

import itertools
from typing import Dict, List, NamedTuple

import numpy as np
import pytest

from onnx_convolutions import Branch, model, output_names
from slimtrain.core import (
    Activation,
    Grid,
    IntegerConv,
    LayerState,
    accumulate,
    activation_grid,
    capped_grid,
    dequantize,
    has_small_groups,
    input_levels,
    quantize,
    same_padding,
    simulate_conv,
    stored_zero_point,
    weight_grid,
)
from slimtrain.proto import LayerParams, convert, quantize_algorithm, run_model, save_algorithm

f32 = np.float32


class Case(NamedTuple):
    """One convolution and the float input that it is given."""

    conv: IntegerConv
    x: np.ndarray
    input_grid: Grid
    weight_grid: Grid


def case(seed, outputs=16, inner=8, kernel=(3, 3), groups=1, size=(9, 10), bits=8, signed=True, batch=2,
         on_grid=True, weight_size=1.0, large_bias=False, cap=True, coarse=False, lowest=None, **options):
    """A random convolution of ``bits``-bit levels whose outputs fill their grid.

    ``coarse`` levels make many of the sums ties; ``on_grid`` False puts the float inputs next to ties;
    ``weight_size`` shrinks weight and output scales; a large bias is beyond the 24 bits of a float32 in units
    of the accumulator; ``cap`` says whether a ReLU6 limits the output grid. ``lowest`` levels of input and output
    that int8 holds only with a zero point.
    """
    rng = np.random.RandomState(seed)
    weights, inputs = weight_grid(bits), activation_grid(bits, signed)
    outputs_grid = inputs
    if lowest is not None:
        inputs, outputs_grid = (Grid(8, level, level + 255) for level in lowest)
    lowest = weights.lower if signed else -weights.upper
    weight = rng.randint(lowest, weights.upper + 1, (outputs, inner) + kernel)
    levels = rng.randint(inputs.lower, inputs.upper + 1, (batch, inner * groups) + size)
    if coarse:
        weight, levels = weight % 15 * 16 - 112, levels % 15 * 16 - 112
    spread = np.sqrt(weight[0].size * np.mean(weight**2.0) * np.mean(levels**2.0))
    halvings = rng.randint(0, 3, outputs) + int(np.floor(np.log2(2 * spread / outputs_grid.upper)))
    grain = 256 if coarse else 1
    bias = np.round(rng.randint(-2, 3, outputs) * spread / 4 / grain) * grain
    if large_bias:
        halvings, bias = np.full(outputs, 20), rng.randint(-2**26, 2**26, outputs)
    input_scale, output_scale = f32(rng.uniform(0.05, 0.2)), f32(rng.uniform(0.1, 0.2) * weight_size)
    scales = (f32(0.5) ** halvings * output_scale / input_scale).astype(f32)
    if options.get("activation") is Activation.RELU6 and cap:
        outputs_grid = capped_grid(outputs_grid, output_scale)
    conv = IntegerConv(weight, scales, (bias * input_scale * scales).astype(f32), input_scale, output_scale,
                       outputs_grid, groups=groups, input_zero_point=stored_zero_point(inputs), **options)
    offsets = 0 if on_grid else rng.choice([-0.5, 0.5, 0.499999, 0.25], levels.shape)
    return Case(conv, ((levels + offsets) * input_scale).astype(f32), inputs, weights)


RELU, RELU6 = Activation.RELU, Activation.RELU6
SAME = (same_padding(9, 3, 2), same_padding(10, 3, 2))
CASES = {
    "dense": case(1),
    "dense, at ties": case(3, coarse=True),
    "dense, wide": case(2, outputs=33, inner=130, kernel=(1, 1)),
    "dense, inputs at ties": case(4, on_grid=False),
    "dense, strided, SAME": case(5, strides=(2, 2), padding=SAME),
    "dense, dilated, padded": case(6, dilation=(2, 1), padding=((2, 2), (1, 1))),
    "dense, relu": case(7, activation=RELU),
    "dense, relu6": case(8, activation=RELU6),
    "dense, relu6, not capped": case(9, activation=RELU6, cap=False),
    "dense, tiny scales": case(10, weight_size=1e-6),
    "dense, large bias": case(11, outputs=64, large_bias=True),
    "dense, 4 bits": case(12, bits=4),
    "dense, 3 bits": case(13, bits=3),
    "dense, 2 bits": case(14, bits=2),
    "dense, 4 bits unsigned, relu": case(15, bits=4, signed=False, activation=RELU),
    "dense, 2 bits unsigned, relu6": case(16, bits=2, signed=False, activation=RELU6),
    "linear": case(17, outputs=10, inner=37, kernel=(1, 1), size=(1, 1), batch=20),
    "one-dimensional": case(18, kernel=(1, 3), size=(1, 40), padding=((0, 0), (1, 1))),
    "grouped": case(19, groups=4, inner=3, outputs=20),
    "grouped, at ties": case(32, groups=3, inner=4, outputs=18, coarse=True),
    "grouped, relu, 4 bits": case(20, groups=2, bits=4, strides=(2, 1), activation=RELU),
    "grouped, one input each": case(34, groups=8, inner=1, outputs=32),
    "grouped, one output each": case(35, groups=2, inner=5, outputs=2),
    "depthwise": case(21, inner=1, outputs=16, groups=16),
    "depthwise, at ties": case(33, inner=1, outputs=16, groups=16, coarse=True),
    "depthwise, inputs at ties": case(22, inner=1, outputs=5, groups=5, on_grid=False),
    "depthwise, strided, SAME, relu6": case(23, inner=1, outputs=20, groups=20, strides=(2, 2), padding=SAME,
                                            activation=RELU6),
    "depthwise, relu6, not capped": case(24, inner=1, outputs=8, groups=8, activation=RELU6, cap=False),
    "depthwise, dilated, relu": case(25, inner=1, outputs=8, groups=8, dilation=(2, 2), activation=RELU),
    "depthwise, tiny scales": case(26, inner=1, outputs=8, groups=8, weight_size=4e-5),
    "depthwise, large bias": case(27, inner=1, outputs=64, groups=64, large_bias=True),
    "depthwise, 4 bits": case(28, inner=1, outputs=8, groups=8, bits=4),
    "depthwise, 3 bits unsigned, relu": case(29, inner=1, outputs=8, groups=8, bits=3, signed=False,
                                             activation=RELU),
    "depthwise, 2 bits": case(30, inner=1, outputs=8, groups=8, bits=2),
    "dense, zero points": case(36, lowest=(0, -100), padding=SAME),
    "dense, zero points at ties": case(37, lowest=(-30, 0), padding=SAME, coarse=True),
    "dense, zero points, relu": case(38, lowest=(-200, -20), activation=RELU),
    "grouped, zero points, relu6": case(39, lowest=(0, 0), groups=2, activation=RELU6),
    "depthwise, zero points": case(40, inner=1, groups=16, lowest=(0, -100), padding=SAME),
    "depthwise, zero points at ties": case(41, inner=1, groups=16, lowest=(-30, 0), padding=SAME, coarse=True),
    "dense, zero points, inputs at ties": case(42, lowest=(-30, 0), on_grid=False),
    "dense, no negative levels, inputs at ties": case(43, lowest=(0, -100), on_grid=False, padding=SAME),
    "depthwise, zero points, inputs at ties": case(44, inner=1, groups=16, lowest=(-200, -30), on_grid=False),
    "one channel to one": case(31, inner=1, outputs=1, size=(20, 30)),
}


def simulated(one: Case) -> np.ndarray:
    return simulate_conv(input_levels(one.x, one.conv.input_scale, one.input_grid), one.conv)


def branch(one: Case) -> Branch:
    conv = one.conv
    weight = dequantize(conv.weight, conv.weight_scales, axis=0)
    return Branch(one.x.shape, simulated(one).shape, weight, conv.bias, conv.strides, conv.padding,
                  conv.dilation, conv.groups, conv.activation)


def layer_params(index: int, one: Case) -> List[LayerParams]:
    """Parameters of each operator that the converter makes of a case."""
    conv, names = one.conv, output_names(index, branch(one))
    return [LayerParams(name, (name,), float(conv.input_scale), float(conv.output_scale), scales,
                        one.input_grid, conv.output_grid, one.weight_grid)
            for name, scales in zip(names, np.split(conv.weight_scales, len(names)))]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Dict[str, np.ndarray]:
    """What MNN computes, by case."""
    folder, cases = tmp_path_factory.mktemp("simulator"), list(CASES.values())
    (folder / "model.onnx").write_bytes(model(map(branch, cases)))
    layers = [layer for index, one in enumerate(cases) for layer in layer_params(index, one)]
    save_algorithm(folder / "params.bin", quantize_algorithm(layers), append=False)
    conversion = convert(folder / "model.onnx", folder / "model.mnn", folder / "params.bin")
    assert conversion.coverage.fraction == 1.0 and not conversion.unasked
    results = run_model(folder / "model.mnn", {f"x{index}": one.x for index, one in enumerate(cases)})
    return {name: results[f"y{index}"] for index, name in enumerate(CASES)}


@pytest.mark.parametrize("name", list(CASES))
def test_no_level_differs(outputs, name):
    conv = CASES[name].conv
    levels = simulated(CASES[name])
    assert len(np.unique(levels)) > min(conv.output_grid.upper, 20), "a case of few levels proves little"
    np.testing.assert_array_equal(outputs[name], dequantize(levels, conv.output_scale))


@pytest.mark.parametrize("name", ["dense, at ties", "grouped, at ties", "depthwise, at ties"])
def test_exact_arithmetic_rounds_these_ties_elsewhere(outputs, name):
    one, conv = CASES[name], CASES[name].conv
    sums = accumulate(input_levels(one.x, conv.input_scale, one.input_grid), conv)
    steps = conv.weight_scales.astype(np.float64) * float(conv.input_scale)
    real = sums * steps[:, None, None] + conv.bias[:, None, None]
    exact = dequantize(quantize(real, conv.output_scale, conv.output_grid), conv.output_scale)
    assert (exact != outputs[name]).mean() > 0.01


def test_small_groups_are_what_stays_float(tmp_path):
    shapes = list(itertools.product((2, 3, 4, 6), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6)))
    branches = [Branch((1, groups * inner, 4, 4), (1, groups * outer, 3, 3),
                       np.ones((groups * outer, inner, 2, 2)), groups=groups)
                for groups, inner, outer in shapes]
    names = [output_names(index, one) for index, one in enumerate(branches)]
    grid = weight_grid(8)
    layers = [LayerParams(name, (name,), 1.0, 1.0, np.ones(len(one.weight) // len(own)), grid, grid, grid)
              for one, own in zip(branches, names) for name in own]
    (tmp_path / "model.onnx").write_bytes(model(branches))
    save_algorithm(tmp_path / "params.bin", quantize_algorithm(layers), append=False)
    conversion = convert(tmp_path / "model.onnx", tmp_path / "model.mnn", tmp_path / "params.bin",
                         allow_partial=True)
    found = {layer.name for layer in conversion.coverage.layers if layer.state is LayerState.INT8}
    in_int8 = [shape for shape, wanted in zip(shapes, names) if found.issuperset(wanted)]
    assert in_int8 == [(groups, inner, outer) for groups, inner, outer in shapes
                       if not has_small_groups(groups * inner, groups * outer, groups)]
