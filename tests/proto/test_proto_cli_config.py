"""``slimtrain config`` and ``slimtrain doctor``: what they say, and the exit status a script can trust."""
import json

import pytest

from cli_runner import run
from slimtrain.core import load_pipeline, pipeline_schema
from slimtrain.proto import doctor
from slimtrain.proto.doctor import Part, examine

LINE = "prune:simd_oc,sparsity=0.6;quantize:lsq,bits=4;export:out/model"


def test_a_good_pipeline_is_shown(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text("pipeline:\n- prune: snip\n  sparsity: 0.75\n- quantize: ema\n", encoding="utf-8")
    status, output, errors = run("config", "check", path)
    assert (status, errors) == (0, "")
    assert all(text in output for text in ("SNIPLevelPruner", "sparsity=0.75", "EMAQuantizer", "retain_sparsity=True"))


@pytest.mark.parametrize("form", ["--yaml", "--short"])
def test_one_form_becomes_the_other(form):
    status, output, _ = run("config", "check", LINE, form)
    assert status == 0
    assert load_pipeline(output if form == "--yaml" else output.strip()) == load_pipeline(LINE)


def test_a_bad_pipeline_is_one_line_and_status_1(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text("pipeline:\n- quantize: lsq\n  bits: 9\n", encoding="utf-8")
    status, output, errors = run("config", "check", path)
    assert (status, output) == (1, "")
    assert errors == "Error: %s: stage 1 (quantize): bits must be an integer from 2 to 8, got 9\n" % path


def test_what_has_no_short_form_says_so(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text("pipeline:\n- quantize: weight\n  layer_bits: {a: 4}\n", encoding="utf-8")
    status, _, errors = run("config", "check", path, "--short")
    assert status == 1 and "layer_bits has no short form" in errors


def test_schema_is_json():
    status, output, _ = run("config", "schema")
    assert status == 0 and json.loads(output) == pipeline_schema()


def test_doctor_tells_what_works_and_what_to_install(monkeypatch):
    monkeypatch.setattr(doctor, "_PARTS", (
        Part("works", "import slimtrain.core", "nothing"),
        Part("broken", "import no_such_package", "pip install 'slimtrain[torch]'")))
    status, output, _ = run("doctor")
    assert status == 0 and "No module named 'no_such_package'" in output and "pip install 'slimtrain[torch]'" in output


def test_doctor_fails_where_slimtrain_itself_does_not_work(monkeypatch):
    monkeypatch.setattr(doctor, "_PARTS", (Part("itself", "import os; os.abort()", ""),))
    assert run("doctor")[0] == 1


def test_doctor_names_the_versions_that_are_installed():
    packages = dict(doctor.installed())
    assert packages["numpy"] == __import__("numpy").__version__
    assert packages["click"] is not None


def test_parts_are_really_tried():
    assert examine(Part("", "import slimtrain.proto", "")).problem == ""
    assert examine(Part("", "raise SystemExit(3)", "")).problem.startswith("import: failed with exit status 3")
