"""The report as a value: what is written is what is read, curves stay short, and a broken file is one error."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest

from slimtrain.core import (
    ChosenSpectrum,
    CompressionReport,
    Curve,
    History,
    LayerRow,
    SlimtrainError,
    histogram,
    load_report,
    save_report,
    stored_bytes,
)

REPORT = CompressionReport(
    "Net", {"mnn": "a.mnn"}, 4000, 1000, 1100, 0.75, 152.5, "slimtrain convert a.onnx",
    (LayerRow("stem", "Convolution", 432, "int8", 8, 0.5, "pruned"),
     LayerRow("up", "Deconvolution", 9, "float", 32, 0, "")),
    weights={"stem": histogram(np.linspace(-2, 2, 101), -1.5, 1.5), "up": histogram(np.zeros(3))},
    layer_sqnr_db={"stem": 40.25}, curves={"sparsity": Curve((1, 2), (0.25, 0.5))},
    spectra={"stem": ChosenSpectrum((3.0, 1.0), 1)})


def test_what_is_written_is_what_is_read(tmp_path):
    save_report(tmp_path / "r.json", REPORT)
    assert load_report(tmp_path / "r.json") == REPORT
    json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.parametrize("change", [
    lambda text: text[:len(text) // 2], lambda text: "", lambda text: "[]",
    lambda text: text.replace("coverage", "cover"),
    lambda text: text.replace('"low"', '"lower"'), lambda text: '{"layers": 3}', lambda text: "\x00\xff"])
def test_a_broken_file_is_one_error_that_names_it(change, tmp_path):
    path = tmp_path / "r.json"
    save_report(path, REPORT)
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode("latin-1"))
    with pytest.raises(SlimtrainError, match="r.json is no compression report"):
        load_report(path)


def test_a_histogram_counts_every_finite_value():
    values = np.concatenate([np.random.RandomState(0).randn(1000), [np.nan, np.inf, -np.inf]])
    found = histogram(values, -1.0, 2.0)
    counts, _ = np.histogram(values[np.isfinite(values)], 64)
    assert list(found.counts) == list(counts) and sum(found.counts) == 1000
    assert (found.low, found.high) == (values[np.isfinite(values)].min(), values[np.isfinite(values)].max())
    assert (found.clip_low, found.clip_high) == (-1.0, 2.0)
    assert sum(histogram(np.full(7, 3.0)).counts) == 7 and sum(histogram(np.zeros(0)).counts) == 0
    assert histogram(np.zeros(2)).clip_high == math.inf


def test_bytes_of_a_layer():
    assert stored_bytes(1000, 8, 10) == 1000 + 80
    assert stored_bytes(1001, 4, 10) == 501 + 80


def test_curves_stay_short_and_keep_both_ends_of_training():
    history = History(most=10)
    for step in range(1000):
        if history.wants(step):
            history.add(step, {"even": float(step), **({"late": 1.0} if step >= 500 else {})})
    even, late = history.curves()["even"], history.curves()["late"]
    assert even.steps[0] == 0 and 5 <= len(even.steps) <= 10 and even.steps[-1] > 800
    assert even.values == tuple(float(step) for step in even.steps)
    assert min(late.steps) >= 500


def test_a_step_counts_once_and_a_resumed_history_goes_on():
    history, again = History(most=4), History(most=4)
    for step in (0, 0, 1, 2, 3, 4, 4):
        history.add(step, {"x": step * 1.0})
    assert history.curves()["x"].steps == (0, 2, 4)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for each in (history, again):
        for step in (5, 6, 7, 8):
            each.add(step, {"x": 0.0})
    assert again.curves() == history.curves()
    with pytest.raises(ValueError, match="got 1"):
        History(most=1)
