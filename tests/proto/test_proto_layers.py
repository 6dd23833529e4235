"""Layer parameters: refused at construction by layer name, and the exact bytes of what is accepted."""

import numpy as np
import pytest

from proto_layers import layer
from slimtrain.core import Grid
from slimtrain.proto import (
    PruneType,
    QuantMethod,
    WeightOnlyParams,
    prune_algorithm,
    quantize_algorithm,
)
from wire import block, number, real, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_scale": 0.0}, "input scale 1 of 1 must be finite"),
        ({"output_scale": -1.0}, "output scale"),
        ({"output_scale": float("nan")}, "output scale"),
        ({"input_scale": 1e39}, "input scale"),
        ({"input_scale": 1e-39}, "input scale"),
        ({"weight_scales": [0.5, float("inf"), 0.5]}, "weight scale 2 of 3"),
        ({"weight_scales": 0.5}, "1-D"),
        ({"weight_scales": []}, "1-D"),
        ({"weight_scales": [[0.5]]}, "1-D"),
        ({"input_grid": Grid(8, 0, 256)}, "input range"),
        ({"input_grid": Grid(8, 3, 200)}, "input levels must hold zero"),
        ({"output_grid": Grid(8, -129, 127)}, "output range"),
        ({"weight_grid": Grid(4, 7, -8)}, "weight range"),
        ({"outputs": ()}, "output_names"),
        ({"outputs": ("y", "")}, "output_names"),
    ],
)
def test_bad_values_are_refused_by_layer_name(changes, message):
    with pytest.raises(ValueError, match=f"layer 'block1.conv': .*{message}"):
        layer("block1.conv", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_grid": (-8, 7)},
        {"outputs": "y"},
        {"outputs": (1,)},
        {"method": 0},
        {"input_scale": "1"},
        {"output_scale": [1, 2]},
    ],
)
def test_bad_kinds_are_refused_by_layer_name(changes):
    with pytest.raises(TypeError, match="layer 'block1.conv'"):
        layer("block1.conv", **changes)


def test_name_is_required():
    with pytest.raises(ValueError, match="needs a name"):
        layer("")
    with pytest.raises(TypeError, match="must be a string"):
        layer(None)


def test_numpy_scalars_are_numbers():
    params = layer(input_scale=np.float32(0.1), output_scale=np.array([2]))
    assert (type(params.input_scale), params.input_scale) == (float, float(np.float32(0.1)))
    assert params.output_scale == 2.0
    quantize_algorithm([params])


def test_scales_become_float32_and_cannot_be_changed():
    scales = np.array([0.1, 0.2])
    params = layer(weight_scales=scales)
    scales[0] = 7
    assert params.weight_scales.dtype == np.float32
    np.testing.assert_array_equal(params.weight_scales, np.float32([0.1, 0.2]))
    with pytest.raises(ValueError, match="read-only"):
        params.weight_scales[0] = 1


@pytest.mark.parametrize(
    "changes", [{"bits": 1}, {"bits": 9}, {"op_name": ""}, {"block_size": 8}, {"block_size": -16}]
)
def test_weight_only_is_checked(changes):
    with pytest.raises(ValueError, match="layer 'fc'"):
        WeightOnlyParams(**dict({"name": "fc", "op_name": "op", "bits": 4}, **changes))


def full_entry(output_name, method=0):
    """The bytes of ``layer("conv", ..., output_grid 0..15)`` in the order of field numbers."""
    low = number(5, -127) + number(6, 127)
    return block(
        4,
        block(1, text(1, "conv"), number(2, 8), real(3, 0.5), number(4, 0), low),
        block(
            2,
            text(1, "conv"),
            number(2, 8),
            real(3, 0.125),
            real(3, 0.125),
            number(4, -127),
            number(5, 127),
            number(6, 0),
        ),
        block(
            3, text(1, output_name), number(2, 8), real(3, 0.25), number(4, 0), number(5, 0), number(6, 15)
        ),
        number(4, method),
    )


def test_each_spelling_is_an_entry_of_its_own_and_bits_are_always_8():
    params = layer(outputs=("y", "y__before_tr", "y"), output_grid=Grid(4, 0, 15))
    expected = number(1, 0) + block(2, number(1, 1), full_entry("y"), full_entry("y__before_tr"))
    assert quantize_algorithm([params]).SerializeToString() == expected


def test_method_is_written():
    params = layer(output_grid=Grid(4, 0, 15), method=QuantMethod.WINOGRAD_AWARE)
    expected = number(1, 0) + block(2, number(1, 1), full_entry("y", method=2))
    assert quantize_algorithm([params]).SerializeToString() == expected


def test_weight_only_entry():
    algorithm = quantize_algorithm([WeightOnlyParams("fc", "op", 4, asymmetric=True, block_size=32)])
    weight = block(2, text(1, "fc"), number(2, 4), number(6, 1), number(7, 32))
    # an output that no tensor is called: the converter crashes on entries without any beside 1-D convolutions
    entry = block(4, weight, block(3, text(1, "no tensor of op")), text(6, "op"))
    assert algorithm.SerializeToString() == number(1, 0) + block(2, number(1, 1), entry)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [layer("a"), layer("b")],
        [layer("a"), layer("a", outputs=("z",))],
        [WeightOnlyParams("a", "op", 4), WeightOnlyParams("b", "op", 8)],
    ],
)
def test_layers_that_shadow_each_other_are_refused(layers):
    with pytest.raises(ValueError, match="no layers|layers 'a' and '.' have the same"):
        quantize_algorithm(layers)


def test_full_and_weight_only_layers_mix():
    layers = [layer("a"), WeightOnlyParams("b", "y", 4)]
    assert len(quantize_algorithm(layers).quant_params.layer) == 2


def test_random_pruning_bytes():
    algorithm = prune_algorithm(PruneType.RANDOM, ["w1", "w2"], [0.5, 0.75], ["a", "b"])
    level = block(2, text(1, "w1"), text(1, "w2"), real(2, 0.5), real(2, 0.75), text(3, "a"), text(3, "b"))
    assert algorithm.SerializeToString() == number(1, 1) + block(3, number(1, 0), level)


def test_block_pruning_bytes():
    algorithm = prune_algorithm(PruneType.SIMD_OC, ["w"], [0.5], ["a"], [4])
    level = block(3, text(1, "w"), real(2, 0.5), text(3, "a"), number(4, 4))
    assert algorithm.SerializeToString() == number(1, 1) + block(3, number(1, 1), level)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PruneType.RANDOM, ["w"], [], ["a"]), "got 0, 1 and 0"),
        ((PruneType.RANDOM, ["w"], [0.5], ["a"], [4]), "0 oc_blocks"),
        ((PruneType.SIMD_OC, ["w"], [0.5], ["a"]), "1 oc_blocks"),
        ((PruneType.FILTER, ["w"], [1.5], ["a"]), "layer 'a'"),
        ((PruneType.FILTER, ["w"], [float("nan")], ["a"]), "layer 'a'"),
    ],
)
def test_bad_pruning_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_algorithm(*arguments)
