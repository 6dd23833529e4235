"""The report at the end of fit, and its page in a real browser."""
from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from browser import visit
from nets import Lit, Resumable, Small, images, loader, trainer
from slimtrain.callbacks import (
    CompressionReportCallback,
    LowRankDecompositionCallback,
    LSQQuantizer,
    LSQQuantizerCallback,
    WeightQuantizerCallback,
    from_config,
)
from slimtrain.callbacks.layer_statistics import layer_statistics
from slimtrain.core import (
    CompressionReport,
    Curve,
    EnergyRanks,
    LayerRow,
    WeightMode,
    load_report,
    sqnr_db,
    stored_weight,
)
from slimtrain.proto import report_page

PIPELINE = "prune:simd_oc,sparsity=0.5,total_pruning_iterations=2,sensitivity_steps=1;quantize:lsq,bits=4;export:%s"


def quiet(stem):
    """The callbacks that compress, without one that reports."""
    return from_config(PIPELINE % stem, report=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything: (folder, report callback, the other callbacks, the model)."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model, callbacks, report = Lit(), quiet(folder / "model"), CompressionReportCallback()
    trainer(folder, report, *callbacks, max_epochs=2).fit(model, loader())  # first in the list, and yet it sees the end
    return folder, report, callbacks, model


def test_report_says_what_the_file_holds(run):
    folder, callback, (pruner, quantizer), model = run
    report = load_report(folder / "compression_report.json")
    assert report == callback.report
    assert report.real_bytes == quantizer.deployed.bytes and report.coverage == 1.0 and report.sqnr_db >= 100
    rows = {row.name: row for row in report.layers}
    assert set(rows) == {"net.stem", "net.inner", "net.depthwise", "net.head"}
    for name, row in rows.items():
        weight = model.get_submodule(name).weight
        assert (row.weights, row.state, row.bits) == (weight.numel(), "int8", 8)
        assert row.sparsity == pytest.approx(float((weight == 0).float().mean()))
        assert "4-bit" in row.note
    assert report.float_bytes == 4 * sum(row.weights for row in rows.values()) + 4 * (6 + 6 + 6 + 4)
    assert report.command.startswith("slimtrain convert %s --params" % (folder / "model.onnx"))


def test_report_shows_how_training_went(run):
    _, callback, (pruner, quantizer), _ = run
    curves = callback.report.curves
    assert curves["sparsity"].values[0] < curves["sparsity"].values[-1] == pruner.pruner.sparsity
    assert curves["scale: input of net.stem"].steps[-1] == 8
    assert callback.report.weights["net.inner"].clip_high > 0 > callback.report.weights["net.inner"].clip_low


def test_page_opens_without_error_and_asks_for_nothing(run, tmp_path):
    folder, _, _, _ = run
    found = visit(folder / "compression_report.html", tmp_path)
    assert (found.console, found.requests) == ([], [])
    assert found.dom.count("<svg") == 4 and "net.depthwise" in found.dom and "slimtrain convert" in found.dom


def test_page_refers_to_nothing_outside(run):
    text = (run[0] / "compression_report.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert references and all(each.startswith(("#", "data:")) for each in references)
    assert "<script" not in text and "@import" not in text


def test_the_browser_would_notice(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><script>console.error('broken ' + 1)</script><img src='http://127.0.0.1:9/x.png'>",
                    encoding="utf-8")
    found = visit(page, tmp_path)
    assert any("broken 1" in line for line in found.console)
    assert "http://127.0.0.1:9/x.png" in found.requests


def test_a_page_shows_text_as_text():
    row = LayerRow("<i>", "", 1, "float", 32, 0, "<u>")
    report = CompressionReport("<b>&", {}, 1, 1, None, 1.0, None, "<script>", (row,),
                               curves={"<s>": Curve((0,), (0.0,))})
    page = report_page.render_page(report)
    assert not any(text in page for text in ("<b>&", "<i>", "<u>", "<script>", "<s>"))
    assert "not converted" in page and "not measured" in page


def test_resumed_run_has_the_curves_of_the_whole(run, tmp_path):
    whole = CompressionReportCallback(html=False)
    torch.manual_seed(0)
    trainer(tmp_path, whole, *quiet(tmp_path / "a"), max_epochs=2).fit(Lit(), Resumable())
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=3, save_top_k=1, monitor=None)
    part = [CompressionReportCallback(html=False), *quiet(tmp_path / "b")]
    trainer(tmp_path, *part, keep, max_steps=5, max_epochs=2, enable_checkpointing=True).fit(Lit(), Resumable())
    again = CompressionReportCallback(html=False)
    rest = trainer(tmp_path, again, *quiet(tmp_path / "c"), max_epochs=2)
    rest.fit(Lit(), Resumable(), ckpt_path=tmp_path / "half.ckpt")
    assert again.report.curves["sparsity"].steps == whole.report.curves["sparsity"].steps


def test_spectra_are_those_of_the_dense_weights_also_after_a_resume(tmp_path):
    def run(name, steps, **fit):
        low_rank = LowRankDecompositionCallback(align_channels=2, tucker_minimal_ratio=0.0, rank_rule=EnergyRanks(0.6))
        report, keep = CompressionReportCallback(), ModelCheckpoint(tmp_path, name)
        torch.manual_seed(0)
        model = Lit(16)
        dense = model.net.inner.weight.detach().double().numpy()
        quantizer = LSQQuantizerCallback(export_to=str(tmp_path / name / "model"))
        trainer(tmp_path, report, low_rank, quantizer, keep, max_steps=steps, enable_checkpointing=True).fit(
            model, Resumable(), **fit)
        return low_rank, report.report, dense

    low_rank, report, dense = run("first", 2)
    ranks = next(line.ranks for line in low_rank.report if line.name == "net.inner")
    for side, axis, rank in (("outputs", 0, ranks[0]), ("inputs", 1, ranks[1])):
        found = report.spectra["net.inner (%s)" % side]
        unfolded = np.moveaxis(dense, axis, 0).reshape(16, -1)
        np.testing.assert_allclose(found.values, np.linalg.svd(unfolded, compute_uv=False), rtol=1e-5)
        assert found.rank == rank < 16
    found = visit(tmp_path / "first" / "compression_report.html", tmp_path)
    assert (found.console, found.requests) == ([], []) and "net.inner (inputs)" in found.dom
    assert run("second", 4, ckpt_path=tmp_path / "first.ckpt")[1].spectra == report.spectra


def test_without_a_converted_model_there_is_no_report(tmp_path, caplog):
    callback = CompressionReportCallback()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, callback, max_epochs=1).fit(Lit(), loader())
    assert callback.report is None and "no model was converted" in caplog.text
    assert not (tmp_path / "compression_report.json").exists()


def test_statistics_are_those_of_the_two_models():
    torch.manual_seed(0)
    model, x = Small().eval(), images(8)[0]
    quantizer = LSQQuantizer(model, bits=4)
    quantizer.calibrate([x])
    found = layer_statistics(quantizer, x)
    assert quantizer.is_attached and not model.training
    seen = {}
    handle = model.head.register_forward_hook(lambda _, given, output: seen.update(x=given[0], y=output))
    simulated = quantizer.simulate(x).numpy()
    quantizer.detach()
    with torch.no_grad():
        plain = model(x)
    handle.remove()
    assert found.sqnr_db["head"] == pytest.approx(sqnr_db(plain.numpy(), simulated), abs=1.0)
    ends = (float(seen["x"].min()), float(seen["x"].max()))
    assert (found.inputs["head"].low, found.inputs["head"].high) == pytest.approx(ends)
    assert sum(found.weights["inner"].counts) == model.inner.weight.numel()
    assert found.weights["stem"].high == pytest.approx(float(model.stem.weight.max()))
    scale = float(quantizer.deployed_layers()[0].input_scale)
    assert found.inputs["stem"].clip_high == pytest.approx(scale * 7)


def test_layers_with_weights_of_few_bits_are_compared_too(tmp_path):
    callback, report = WeightQuantizerCallback(bits=3, export_to=str(tmp_path / "model")), CompressionReportCallback()
    model = Lit()
    trainer(tmp_path, report, callback, max_epochs=1).fit(model, loader())
    found = load_report(tmp_path / "compression_report.json")
    assert found == report.report and found.sqnr_db >= 100
    assert set(found.layer_sqnr_db) == {"net.stem", "net.inner", "net.depthwise", "net.head"}
    callback.quantizer.detach()
    stem, x = model.net.stem.eval(), callback.example()
    stored = torch.from_numpy(stored_weight(stem.weight.detach().numpy(), 3, WeightMode.SYMMETRIC).values)
    seen = {}
    handle = stem.register_forward_hook(lambda _, given, output: seen.update(x=given[0], y=output))
    with torch.no_grad():
        model(x) if isinstance(x, torch.Tensor) else model(*x)
        handle.remove()
        expected = sqnr_db(seen["y"].numpy(), stem._conv_forward(seen["x"], stored, stem.bias).numpy())
    assert found.layer_sqnr_db["net.stem"] == pytest.approx(expected, abs=0.01)
    assert found.weights["net.stem"].high == pytest.approx(float(stem.weight.max()))
