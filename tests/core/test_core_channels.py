"""Channel classes and their choice, against loops over the layers of small networks written by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtrain.core import ChannelGraph, ChannelPlan, channel_plan, choose_channels, plan_keeps

NONE = np.array([-1, -1, -1])


def chain(widths, kernel=9):
    """input(3) -> conv -> conv -> ... ; the last layer's channels leave the network."""
    graph = ChannelGraph()
    channels = NONE
    for index, width in enumerate(widths):
        rows = graph.new(width)
        graph.add_layer("conv%d" % index, rows, channels, kernel)
        channels = rows
    graph.fix(channels, "leaves the network")
    return graph.finish()


def residual(width=8):
    graph = ChannelGraph()
    stem, inner, branch, head = (graph.new(count) for count in (width, 6, width, 4))
    graph.add_layer("stem", stem, NONE, 9)
    graph.add_layer("inner", inner, stem, 9)
    graph.add_layer("branch", branch, inner, 9)
    graph.join(stem, branch)
    graph.add_layer("head", head, stem, 1)
    graph.fix(head, "leaves the network")
    return graph.finish()


def naive_weights(classes, keep):
    total = 0
    for layer in classes.layers.values():
        for row in layer.rows:
            for column in layer.columns:
                total += layer.kernel * bool(keep[row]) * bool(column < 0 or keep[column])
    return total


def test_weights_are_counted_as_rows_times_columns():
    classes = residual()
    keep = np.random.RandomState(0).rand(classes.size) > 0.4
    assert classes.weights(keep) == naive_weights(classes, keep)
    assert classes.weights(np.ones(classes.size, bool)) == 9 * (8 * 3 + 6 * 8 + 8 * 6) + 4 * 8


def test_a_residual_couples_its_producers():
    classes = residual()
    assert {group.layers: group.classes.size for group in classes.groups} == {("stem", "branch"): 8, ("inner",): 6}
    np.testing.assert_array_equal(classes.layers["stem"].rows, classes.layers["branch"].rows)
    assert classes.fixed == {"head": "leaves the network"}


def test_a_layer_that_is_used_twice_joins_its_channels():
    graph = ChannelGraph()
    first, second = graph.new(4), graph.new(4)
    graph.add_layer("a", first, NONE, 1)
    graph.add_layer("b", second, NONE, 1)
    graph.add_layer("shared", graph.new(5), first, 1)
    graph.add_layer("shared", graph.new(5), second, 1)
    classes = graph.finish()
    np.testing.assert_array_equal(classes.layers["a"].rows, classes.layers["b"].rows)
    with pytest.raises(ValueError, match="'shared'"):
        graph.add_layer("shared", graph.new(5), first[:3], 1)


def test_what_is_read_where_something_fixed_is_read_too_stays():
    graph = ChannelGraph()
    rows = graph.new(3)
    graph.add_layer("a", rows, NONE, 1)
    graph.add_layer("shared", graph.new(5), rows, 1)
    graph.add_layer("shared", graph.new(5), NONE, 1)
    assert "fixed channels" in graph.finish().fixed["a"]


def test_partly_fixed_layers_say_so():
    graph = ChannelGraph()
    rows = graph.new(4)
    graph.add_layer("a", rows, NONE, 1)
    graph.fix(rows[:2], "is cut")
    classes = graph.finish()
    assert classes.fixed == {"a": "in part: is cut"}
    assert classes.groups[0].classes.size == 2


@given(st.integers(0, 10 ** 6), st.floats(0.05, 0.85), st.sampled_from([1, 4]))
@settings(max_examples=50)
def test_the_share_of_weights_removed_is_near_the_request(seed, sparsity, align):
    classes = chain([64, 48, 96, 64, 10])
    choice = choose_channels(classes, np.random.RandomState(seed).rand(classes.size), sparsity, align)
    full = naive_weights(classes, np.ones(classes.size, bool))
    assert choice.sparsity == pytest.approx(1 - naive_weights(classes, choice.keep) / full)
    assert abs(choice.sparsity - sparsity) < 0.012 * align + 0.005
    for group in classes.groups:
        assert choice.keep[group.classes].sum() % align == 0


def test_within_a_group_the_least_important_go():
    classes = residual()
    scores = np.random.RandomState(1).rand(classes.size)
    keep = choose_channels(classes, scores, 0.5).keep
    for group in classes.groups:
        kept, gone = scores[group.classes][keep[group.classes]], scores[group.classes][~keep[group.classes]]
        assert kept.size and (not gone.size or gone.max() < kept.min())


def test_no_group_is_emptied_before_the_others_are_thinned():
    classes = chain([32, 32, 32, 32, 10])
    scores = np.random.RandomState(2).rand(classes.size) + 1
    scores[classes.groups[1].classes[:30]] = 1e-6  # two channels carry the whole layer
    keep = choose_channels(classes, scores, 0.8).keep
    kept = [int(keep[group.classes].sum()) for group in classes.groups]
    assert min(kept) >= 5 and naive_weights(classes, keep) <= 0.25 * naive_weights(classes, np.ones(len(keep), bool))


def test_what_is_removed_stays_removed():
    classes = chain([32, 32, 10])
    first = choose_channels(classes, np.random.RandomState(3).rand(classes.size), 0.3).keep
    second = choose_channels(classes, np.random.RandomState(4).rand(classes.size), 0.6, alive=first).keep
    assert not (second & ~first).any()


def test_a_group_never_loses_its_last_channels():
    classes = chain([8, 8, 4])
    keep = choose_channels(classes, np.random.RandomState(5).rand(classes.size), 0.99, align=4).keep
    assert [int(keep[group.classes].sum()) for group in classes.groups] == [4, 4]


@pytest.mark.parametrize("change, message", [
    ({"sparsity": 1.0}, "sparsity"), ({"align": 0}, "aligned"), ({"max_prune_ratio": 1.5}, "max_prune_ratio"),
    ({"scores": np.zeros(3)}, "scores")])
def test_bad_arguments_are_refused(change, message):
    classes = chain([4, 4])
    arguments = {"scores": np.ones(classes.size), "sparsity": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        choose_channels(classes, **arguments)


def test_a_network_without_removable_channels_says_why():
    classes = chain([4])
    with pytest.raises(ValueError, match="conv0: leaves the network"):
        choose_channels(classes, np.ones(classes.size), 0.5)


def test_a_given_share_holds_for_its_group_whatever_the_scores():
    classes = residual()
    keep = choose_channels(classes, np.random.RandomState(6).rand(classes.size), 0.3, shares={"branch": 0.75}).keep
    assert {group.layers: int(keep[group.classes].sum()) for group in classes.groups}[("stem", "branch")] == 2
    keep = choose_channels(classes, np.random.RandomState(6).rand(classes.size), 0.3,
                           shares={"stem": 0.5, "inner": 0.0}).keep
    assert [int(keep[group.classes].sum()) for group in classes.groups] == [4, 6]


def test_a_plan_names_what_is_left_and_survives_being_written():
    classes = residual()
    keep = choose_channels(classes, np.random.RandomState(7).rand(classes.size), 0.5).keep
    plan = channel_plan(classes, keep)
    assert ChannelPlan.from_json(plan.to_json()) == plan
    sizes = {name: len(layer.rows) * len(layer.columns) for name, layer in plan.layers.items()}
    kernels = {name: layer.kernel for name, layer in classes.layers.items()}
    assert sum(sizes[name] * kernels[name] for name in sizes) == classes.weights(keep)
    for name, pairs in plan_keeps(classes, keep).items():
        assert pairs.sum() == sizes[name]
    for text in ("[]", "{", '{"format": "other"}', '{"format": "slimtrain channels 1", "layers": {"a": {}}}'):
        with pytest.raises(ValueError, match="channel plan"):
            ChannelPlan.from_json(text)


def test_coupled_rows_of_a_table_lose_the_same_columns():
    graph = ChannelGraph()
    rows = graph.new(8)
    graph.add_layer("grouped", rows, NONE, 1)
    graph.couple(rows.reshape(2, 4))
    classes = graph.finish()
    assert classes.groups[0].classes.size == 4
    np.testing.assert_array_equal(classes.layers["grouped"].rows[:4], classes.layers["grouped"].rows[4:])
