"""Ranking, schedules, sensitivities and ratio files against full sorts, double loops and written-out numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtrain.core import (
    OVERALL,
    PruningSchedule,
    Ramp,
    Sensitivity,
    accumulate_sensitivity,
    check_window,
    global_keep,
    layer_keep,
    load_sensitivity,
    read_prune_ratios,
    save_sensitivity,
    schedule_between,
    sparsity_of,
    step_of,
    write_prune_ratios,
)

SHAPES = {"a": (6, 3, 3, 3), "b": (9, 6, 1, 1), "c": (10, 54)}


def some_scores(seed, shapes=SHAPES):
    generator = np.random.RandomState(seed)
    return {name: np.abs(generator.randn(*shape) * 10.0 ** generator.randint(-4, 4)).astype(np.float32)
            for name, shape in shapes.items()}


def naive_units(score, block):
    """(value, size, places) of every unit, by loops."""
    units = []
    for start in range(0, len(score), block):
        for place in itertools.product(*map(range, score.shape[1:])):
            rows = range(start, min(start + block, len(score)))
            units.append((float(np.mean([score[(row,) + place] for row in rows])), [(row,) + place for row in rows]))
    return units


def naive_keep(scores, sparsity, block, max_prune_ratio):
    """Sort all units of all layers, remove from the bottom, skip what a full layer must not lose."""
    order, room = [], {}
    for name, score in scores.items():
        units = naive_units(score / np.sqrt((score.astype(np.float64) ** 2).sum()), block)
        room[name] = int(max_prune_ratio * len(units) + 1e-6)
        order += [(value, name, places) for value, places in units]
    order.sort(key=lambda unit: unit[0])
    keeps = {name: np.ones(score.shape, bool) for name, score in scores.items()}
    missing = round(sparsity * sum(score.size for score in scores.values()))
    for _, name, places in order:
        if room[name] and missing >= len(places) / 2:
            room[name] -= 1
            missing -= len(places)
            for place in places:
                keeps[name][place] = False
        elif room[name]:
            break
    return keeps


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("ratio", [0.92, 0.99])
def test_global_keep_is_the_full_sort(block, sparsity, ratio):
    scores = some_scores(int(sparsity * 10) + block)
    found = global_keep(scores, sparsity, block, ratio)
    wanted = naive_keep(scores, sparsity, block, ratio)
    for name in scores:
        np.testing.assert_array_equal(found[name], wanted[name])


@given(st.integers(0, 10 ** 6), st.floats(0, 0.95), st.integers(1, 5))
@settings(max_examples=60)
def test_the_number_pruned_is_exact(seed, sparsity, block):
    scores = some_scores(seed)
    total = sum(score.size for score in scores.values())
    pruned = total - sum(int(keep.sum()) for keep in global_keep(scores, sparsity, block).values())
    assert abs(pruned - sparsity * total) <= block / 2 + 0.5


@given(st.integers(0, 10 ** 6), st.floats(0, 0.95), st.integers(-20, 20), st.integers(1, 4))
@settings(max_examples=40)
def test_scores_count_relative_to_their_layer(seed, sparsity, exponent, block):
    scores = some_scores(seed)
    scaled = {name: score * np.float32(2.0 ** exponent) if name == "b" else score for name, score in scores.items()}
    first, second = global_keep(scores, sparsity, block), global_keep(scaled, sparsity, block)
    for name in scores:
        np.testing.assert_array_equal(first[name], second[name])


def test_blocks_run_along_the_output_channels_and_the_last_is_shorter():
    keep = layer_keep(np.random.RandomState(0).rand(10, 5, 3, 3).astype(np.float32), 0.5, 4)
    for start in (0, 4, 8):
        rows = keep[start:start + 4]
        assert (rows == rows[:1]).all()
    assert keep[8:].any() and not keep[8:].all()


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("axes", [(1, 2, 3, 0), (2, 3, 1, 0), (3, 0, 2, 1)])
def test_the_order_in_memory_changes_no_mask_and_is_kept(block, axes):
    scores = some_scores(3, {"a": (16, 3, 3, 5), "b": (9, 6, 2, 1), "c": (8, 3, 1, 7)})
    turned = {name: np.ascontiguousarray(score.transpose(axes)).transpose(np.argsort(axes))
              for name, score in scores.items()}
    first, found = global_keep(scores, 0.4, block), global_keep(turned, 0.4, block)
    wanted, later = (global_keep(*arguments) for arguments in (
        (scores, 0.7, block, 0.8, first), (turned, 0.7, block, 0.8, found)))
    for name in scores:
        np.testing.assert_array_equal(found[name], first[name])
        np.testing.assert_array_equal(later[name], wanted[name])
    assert all(later[name].transpose(axes).flags.c_contiguous for name in ("a", "c"))  # "b" ends within a block


def test_what_is_pruned_stays_pruned():
    first = global_keep(some_scores(1), 0.4)
    second = global_keep(some_scores(2), 0.6, alive=first)
    assert sparsity_of(second) == pytest.approx(0.6, abs=1e-3)
    for name in first:
        assert not (second[name] & ~first[name]).any()


def test_ties_are_cut_at_the_exact_number():
    keeps = global_keep({"a": np.ones((4, 25), np.float32), "b": np.zeros((4, 25), np.float32)}, 0.605)
    assert sum(int(keep.sum()) for keep in keeps.values()) == 200 - 121


def test_no_layer_loses_more_than_its_limit():
    scores = {"small": np.full((10, 100), 1e-3, np.float32) + np.arange(1000).reshape(10, 100).astype(np.float32) ** 8,
              "large": np.ones((10, 1000), np.float32) + np.random.RandomState(0).rand(10, 1000).astype(np.float32)}
    keeps = global_keep(scores, 0.5, max_prune_ratio=0.6)
    assert 1 - keeps["small"].mean() == pytest.approx(0.6)
    assert sparsity_of(keeps) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("change, message", [
    ({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"block": 0}, "block"),
    ({"max_prune_ratio": 0.0}, "max_prune_ratio"), ({"sparsity": 0.9, "max_prune_ratio": 0.5}, "raise it"),
])
def test_bad_arguments_are_refused(change, message):
    arguments = {"sparsity": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        global_keep(some_scores(0), **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scores_that_mean_nothing_are_refused_by_name(value):
    scores = some_scores(0)
    scores["b"][0, 0] = value
    with pytest.raises(ValueError, match="'b'"):
        global_keep(scores, 0.5)


def test_a_schedule_names_its_events():
    schedule = PruningSchedule(0.8, events=4, interval=10, begin_step=5, ramp=Ramp.LINEAR)
    assert [step for step in range(60) if schedule.event_at(step) is not None] == [5, 15, 25, 35]
    assert [schedule.target(event) for event in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule.last_step == 35
    cubic = PruningSchedule(0.8, events=4)
    assert [cubic.target(event) for event in range(4)] == pytest.approx([0.4625, 0.7, 0.7875, 0.8])
    assert cubic.target(3) == 0.8


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 20), st.integers(1, 12))
@settings(max_examples=60)
def test_gradients_are_looked_at_just_before_an_event(events, interval, begin, window):
    schedule = PruningSchedule(0.5, events, interval, begin)
    moments = {begin + event * interval for event in range(events)}
    for step in range(schedule.last_step + 5):
        assert schedule.looks_at(step, window) == any(step <= moment < step + window for moment in moments)


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 500), st.sampled_from(Ramp))
@settings(max_examples=60)
def test_a_schedule_between_two_steps_fits(events, begin, length, ramp):
    if length < events - 1:
        with pytest.raises(ValueError, match="do not fit"):
            schedule_between(0.9, events, begin, begin + length, ramp)
        return
    schedule = schedule_between(0.9, events, begin, begin + length, ramp)
    assert schedule.begin_step == begin and schedule.last_step <= begin + length
    targets = [schedule.target(event) for event in range(events)]
    assert targets == sorted(targets) and targets[-1] == 0.9


@pytest.mark.parametrize("change, error", [
    ({"sparsity": 1.0}, ValueError), ({"events": 0}, ValueError), ({"interval": 0}, ValueError),
    ({"begin_step": -1}, ValueError), ({"events": 1.5}, TypeError), ({"ramp": "cubic"}, TypeError)])
def test_bad_schedules_are_refused(change, error):
    with pytest.raises(error):
        PruningSchedule(**{"sparsity": 0.5, **change})


def test_moments_are_steps_or_fractions():
    assert step_of(7, 100) == 7
    assert step_of(0.25, 100) == 25
    assert step_of(1.0, 100) == 100
    for moment in (-1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="got %s" % moment):
            step_of(moment, 100)
    with pytest.raises(TypeError, match="got None"):
        step_of(None, 100)


def test_moments_are_epochs_where_their_length_is_known():
    assert step_of("3 epochs", 1000, 50) == 150
    assert step_of("1 epoch", 1000, 50) == 50
    assert step_of(" 0.5 epochs ", 1000, 50) == 25
    with pytest.raises(ValueError, match="length of an epoch is not known"):
        step_of("3 epochs", 1000)
    with pytest.raises(ValueError, match="got '3 weeks'"):
        step_of("3 weeks", 1000, 50)


def test_only_moments_of_one_kind_are_compared():
    for window in [(3, 4), (3, 3), (0.1, 0.2), ("1 epoch", "2 epochs"), (0.5, 3), ("1 epoch", 900), (0.9, "1 epoch")]:
        check_window(*window)
    for begin, end in [(4, 3), (0.2, 0.1), ("2 epochs", "1 epoch")]:
        with pytest.raises(ValueError, match="end must not lie before begin"):
            check_window(begin, end)


def test_sensitivity_is_a_mean_and_then_forgets():
    generator = np.random.RandomState(0)
    batches = [({"w": generator.randn(3, 4)}, {"w": generator.randn(3, 4)}) for _ in range(6)]
    state, values = Sensitivity({}, 0), [np.abs(weights["w"] * grads["w"]) for weights, grads in batches]
    for weights, gradients in batches[:4]:
        state = accumulate_sensitivity(state, weights, gradients, window=4)
    np.testing.assert_allclose(state.scores["w"], np.mean(values[:4], axis=0), rtol=1e-5)
    for weights, gradients in batches[4:]:
        state = accumulate_sensitivity(state, weights, gradients, window=4)
    wanted = np.mean(values[:4], axis=0) * 0.75 ** 2 + values[4] * 0.25 * 0.75 + values[5] * 0.25
    np.testing.assert_allclose(state.scores["w"], wanted, rtol=1e-5)
    assert state.batches == 6


def test_a_batch_that_overflowed_counts_nothing():
    gradient = np.array([[np.inf, np.nan, 2.0]])
    state = accumulate_sensitivity(Sensitivity({}, 0), {"w": np.ones((1, 3))}, {"w": gradient}, 1)
    np.testing.assert_array_equal(state.scores["w"], [[0, 0, 2]])


def test_sensitivities_of_other_weights_are_refused():
    with pytest.raises(ValueError, match="names"):
        accumulate_sensitivity(Sensitivity({}, 0), {"a": np.ones(2)}, {"b": np.ones(2)}, 1)
    with pytest.raises(ValueError, match="shape"):
        accumulate_sensitivity(Sensitivity({}, 0), {"a": np.ones(2)}, {"a": np.ones(3)}, 1)


def test_sensitivity_files_hold_no_pickle(tmp_path):
    scores = some_scores(3, {"conv1/kernel:0": (3, 4), "fc.weight": (5,)})
    save_sensitivity(tmp_path / "s.npy", scores)
    found = load_sensitivity(tmp_path / "s.npy")
    assert list(found) == list(scores)
    for name in scores:
        np.testing.assert_array_equal(found[name], scores[name])
    np.save(str(tmp_path / "object.npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    for name in ("object.npy", "text.npy"):
        with pytest.raises(ValueError, match=name):
            load_sensitivity(tmp_path / name)


def test_ratio_files_can_be_edited(tmp_path):
    path = tmp_path / "ratios.yml"
    write_prune_ratios(path, {"features.0.weight": 0.25, "features.3.weight": 1 / 3, "fc.weight": 0.0, OVERALL: 0.2})
    names = ["features.0.weight", "features.3.weight", "fc.weight", "new.weight"]
    assert read_prune_ratios(path, names) == pytest.approx(
        {"features.0.weight": 0.25, "features.3.weight": 1 / 3, "fc.weight": 0.0}, abs=1e-6)
    path.write_text(path.read_text() + "features.*: 0.5\n")
    assert read_prune_ratios(path, names)["features.0.weight"] == 0.5


@pytest.mark.parametrize("text, message", [
    ("a: 1.0", "'a'"), ("a: x", "'a'"), ("a: true", "'a'"), ("z: 0.5", "'z'"), ("- a", "list"), ("a: [", "YAML"),
    ("!!python/object/apply:os.getcwd []", "YAML"), ("", "NoneType")])
def test_broken_ratio_files_are_refused(tmp_path, text, message):
    path = tmp_path / "ratios.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prune_ratios(path, ["a"])
