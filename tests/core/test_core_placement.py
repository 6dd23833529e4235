"""The rule of where MNN quantizes, on graphs small enough to decide by hand."""
import pytest

from slimtrain.core.placement import Op, OpKind, Quantizer, Role, place

CONV = OpKind.LAYER


def owner(layer, role):
    return Quantizer(layer, Role(role))


def test_a_chain_is_quantized_after_what_the_converter_fuses():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("b", OpKind.BATCH_NORM, ("a",)), Op("c", OpKind.RELU6, ("b",)),
           Op("d", CONV, ("c",), "conv2")]
    placed = place(ops, ["d"])
    assert placed.quantizers == {"x": owner("conv1", "input"), "c": owner("conv1", "output"),
                                 "d": owner("conv2", "output")}
    assert [call.fused for call in placed.calls] == ["c", "d"]
    assert placed.calls[1].input == owner("conv1", "output")
    assert placed.non_negative == (owner("conv1", "output"),)


def test_an_output_with_two_readers_is_not_fused():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("b", OpKind.RELU, ("a",)), Op("c", OpKind.OTHER, ("a",)),
           Op("d", OpKind.COMBINE, ("b", "c")), Op("e", CONV, ("d",), "conv2")]
    placed = place(ops, ["e"])
    assert placed.quantizers["a"] == owner("conv1", "output")
    assert "b" not in placed.quantizers
    assert placed.quantizers["d"] == owner("conv2", "input")
    assert placed.non_negative == ()


def test_a_network_output_is_not_fused_away():
    ops = [Op("a", CONV, ("x",), "conv"), Op("b", OpKind.RELU, ("a",))]
    assert place(ops, ["a", "b"]).calls[0].fused == "a"


def test_all_readers_of_a_residual_sum_share_the_first_readers_scale():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("s", OpKind.COMBINE, ("a", "x")), Op("r", OpKind.RELU, ("s",)),
           Op("b", CONV, ("r",), "conv2"), Op("c", CONV, ("r",), "conv3"), Op("t", OpKind.COMBINE, ("b", "c"))]
    placed = place(ops, ["t"])
    assert placed.quantizers["r"] == owner("conv2", "input")
    assert placed.calls[2].input == owner("conv2", "input")
    assert "s" not in placed.quantizers and "t" not in placed.quantizers
    assert owner("conv2", "input") in placed.non_negative


def test_views_and_pools_share_the_scale_of_what_they_read():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("p", OpKind.MAX_POOL, ("a",)), Op("v", OpKind.VIEW, ("p",)),
           Op("b", CONV, ("v",), "fc")]
    assert place(ops, ["b"]).calls[1].input == owner("conv1", "output")


def test_concatenated_tensors_share_the_scale_of_the_first_layer_that_produces_one():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("f", OpKind.OTHER, ("x",)), Op("b", CONV, ("f",), "conv2"),
           Op("l", OpKind.VIEW, ("a",)), Op("c", OpKind.CONCAT, ("l", "b", "f")), Op("d", CONV, ("c",), "conv3")]
    placed = place(ops, ["d"])
    shared = owner("conv1", "output")
    assert placed.quantizers == {"x": owner("conv1", "input"), "a": shared, "b": shared, "f": shared,
                                 "d": owner("conv3", "output")}
    assert placed.on_grid == {**placed.quantizers, "l": shared, "c": shared}
    assert [call.input for call in placed.calls] == [owner("conv1", "input"), shared, shared]


def test_an_interpolated_tensor_has_a_scale_of_its_own():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("u", OpKind.RESIZE, ("a",)), Op("b", CONV, ("u",), "conv2")]
    assert place(ops, ["b"]).calls[1].input == owner("conv2", "input")


def test_a_layer_called_twice_has_two_calls_and_one_pair_of_scales():
    ops = [Op("a", CONV, ("x",), "shared"), Op("b", CONV, ("a",), "shared")]
    placed = place(ops, ["b"])
    assert [call.input for call in placed.calls] == [owner("shared", "input"), owner("shared", "output")]


def test_operations_that_lead_nowhere_do_not_count():
    ops = [Op("a", CONV, ("x",), "conv1"), Op("d", OpKind.OTHER, ("a",)), Op("e", CONV, ("a",), "dead"),
           Op("b", OpKind.RELU, ("a",))]
    placed = place(ops, ["b"])
    assert [call.layer for call in placed.calls] == ["conv1"]
    assert placed.calls[0].fused == "b"


def test_a_scale_that_also_serves_a_signed_tensor_is_signed():
    ops = [Op("a", CONV, ("x",), "shared"), Op("r", OpKind.RELU, ("a",)), Op("b", CONV, ("r",), "shared")]
    assert place(ops, ["b"]).non_negative == ()


@pytest.mark.parametrize("ops, message", [
    ([Op("a", OpKind.OTHER, ("x",)), Op("a", OpKind.OTHER, ("x",))], "named 'a'"),
    ([Op("a", CONV, ("x", "y"), "conv")], "must read one tensor"),
])
def test_a_graph_that_is_none_is_refused(ops, message):
    with pytest.raises(ValueError, match=message):
        place(ops, ["a"])
