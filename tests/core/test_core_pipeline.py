"""Pipelines as files, lines and values: what is written is what is read, and what cannot work is refused."""
from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import yaml

from slimtrain.core import (
    Kind,
    Pipeline,
    PipelineError,
    Ramp,
    WeightMode,
    add_compress_flag,
    load_pipeline,
    pipeline_schema,
    to_short,
    to_yaml,
)
from slimtrain.core.stages import STAGES, Export, LowRank, PruneSIMDOC, PruneSNIP, QuantizeLSQ, QuantizeWeights

FILE = """
pipeline:
  - prune: simd_oc
    sparsity: 0.6
    skip_layers: [stem, "head.*"]
    ramp: linear
    begin: 0.1
    end: 3 epochs
  - quantize: lsq
    bits: 4
    activation_bits: 8
  - export: out/model
    checkpoints: true
"""
LINE = ("prune:simd_oc,sparsity=0.6,skip_layers=stem+head.*,ramp=linear,begin=0.1,end=3 epochs;"
        "quantize:lsq,bits=4,activation_bits=8;export:out/model,checkpoints=true")
VALUE = Pipeline(
    (PruneSIMDOC(sparsity=0.6, skip_layers=("stem", "head.*"), ramp=Ramp.LINEAR, begin=0.1, end="3 epochs"),
     QuantizeLSQ(bits=4, activation_bits=8, retain_sparsity=True)),
    Export("out/model", True))


def test_file_line_and_objects_are_one_pipeline(tmp_path):
    path = tmp_path / "compress.yaml"
    path.write_text(FILE, encoding="utf-8")
    assert load_pipeline(path) == load_pipeline(FILE) == load_pipeline(LINE) == VALUE
    assert load_pipeline(json.dumps(yaml.safe_load(FILE))) == VALUE


def changed(stage):
    """A stage with every argument moved off its default."""
    others = {bool: lambda value: not value, int: lambda value: value + 16, float: lambda value: value / 2,
              tuple: lambda value: ("a", "b.*"), str: lambda value: "some/file"}
    values = {"bits": 3, "weight_bits": 2, "activation_bits": 5, "min_clamp_value": 7, "expand_rate": 4,
              "config_file": "r.yml", "prune_finetune_iterations": 3, "retain_sparsity": True, "layer_bits": {"a.*": 4},
              "ramp": Ramp.LINEAR, "mode": WeightMode.ASYMMETRIC, "begin": 10, "end": 200, "to": "out/x"}
    for field in dataclasses.fields(stage):
        if field.name not in values:
            values[field.name] = others[type(field.default)](field.default)
    return stage(**{field.name: values[field.name] for field in dataclasses.fields(stage)})


STAGE_CLASSES = [stage for kind, known in STAGES.items() if kind is not Kind.EXPORT for stage in known.values()]


@pytest.mark.parametrize("stage", STAGE_CLASSES, ids=lambda stage: stage.__name__)
def test_writing_and_reading_loses_nothing(stage):
    pipeline = Pipeline((changed(stage),), Export("out/x", True))
    assert all(getattr(pipeline.stages[0], field.name) != field.default for field in dataclasses.fields(stage))
    assert load_pipeline(to_yaml(pipeline)) == pipeline
    if stage is QuantizeWeights:
        with pytest.raises(ValueError, match="layer_bits has no short form"):
            to_short(pipeline)
    else:
        assert load_pipeline(to_short(pipeline)) == pipeline


def test_defaults_are_left_out_of_the_file():
    assert yaml.safe_load(to_yaml(load_pipeline("low_rank"))) == {"pipeline": [{"low_rank": "tucker"}]}
    assert to_short(load_pipeline("low_rank:tucker")) == "low_rank:tucker"


def test_one_algorithm_of_a_kind_needs_no_name():
    assert load_pipeline("low_rank") == Pipeline((LowRank(),))
    assert load_pipeline("low_rank:tucker,align_channels=4").stages == (LowRank(align_channels=4),)


def test_quantization_keeps_zeros_exactly_where_something_was_pruned():
    assert load_pipeline("prune:snip;quantize:oaq").last.retain_sparsity is True
    assert load_pipeline("quantize:oaq").last.retain_sparsity is False
    assert load_pipeline("quantize:oaq,retain_sparsity=true").last.retain_sparsity is True


def test_what_is_over_parameterized_is_merged_before_the_rest():
    pipeline = load_pipeline("over_parameterize:lop,expand_rate=4;prune:snip;quantize:lsq;export:out/m")
    first, second = pipeline.runs
    assert [stage.ALGORITHM for stage in first.stages] == ["lop"] and first.export == pipeline.export
    assert second == load_pipeline("prune:snip;quantize:lsq;export:out/m")
    with pytest.raises(PipelineError, match="has a training run of its own.*pipeline.runs"):
        pipeline.one_run()
    for alone in ("over_parameterize:lop,expand_rate=4", "low_rank;prune:snip;quantize:lsq"):
        assert load_pipeline(alone).runs == (load_pipeline(alone),) == (load_pipeline(alone).one_run(),)


WRONG = [  # text, the place and the mend
    ("", "no stage: give at least one"),
    ("quantise:lsq", "stage 1: expected one of .*'quantise': did you mean quantize"),
    ("quantize:lsk", r"stage 1 \(quantize\): unknown algorithm 'lsk': did you mean lsq"),
    ("quantize", r"stage 1 \(quantize\): unknown algorithm ''"),
    ("prune:snip,sparcity=0.5", r"stage 1 \(prune\): unknown argument 'sparcity': did you mean sparsity"),
    ("prune:snip,sparsity", "stage 1: expected argument=value, got 'sparsity'"),
    ("prune:snip,sparsity=[", "stage 1: sparsity=. is not a value"),
    ("prune:snip,sparsity=1.0", r"sparsity must be a number in \[0, 1\), got 1.0"),
    ("prune:snip,sparsity=-0.1", r"sparsity must be a number in \[0, 1\), got -0.1"),
    ("prune:snip,sparsity=half", r"sparsity must be a number in \[0, 1\), got 'half'"),
    ("prune:snip,sparsity=.nan", r"sparsity must be a number in \[0, 1\), got nan"),
    ("prune:snip,total_pruning_iterations=0", "total_pruning_iterations must be an integer of at least 1, got 0"),
    ("prune:snip,total_pruning_iterations=2.5", "total_pruning_iterations must be an integer .* got 2.5"),
    ("prune:snip,ramp=quadratic", "ramp must be one of linear, cubic, got 'quadratic'"),
    ("prune:snip,begin=0.6,end=0.2", "end must not lie before begin: 0.2 is before 0.6"),
    ("prune:snip,begin=5 epochs,end=2 epochs", "end must not lie before begin: '2 epochs' is before '5 epochs'"),
    ("prune:snip,end=1.5", r"end must be a step \(integer\), a part of the training .* got 1.5"),
    ("prune:snip,end=3 weeks", "end must be a step .* got '3 weeks'"),
    ("prune:snip,align_channels=4", "unknown argument 'align_channels'"),
    ("quantize:lsq,bits=9", "bits must be an integer from 2 to 8, got 9"),
    ("quantize:lsq,bits=1", "bits must be an integer from 2 to 8, got 1"),
    ("quantize:lsq,bits=true", "bits must be an integer from 2 to 8, got True"),
    ("quantize:lsq,weight_bits=16", "weight_bits must be an integer from 2 to 8, got 16"),
    ("quantize:lsq,skip_quant_layers=3", "skip_quant_layers must be a list of layer names or patterns, got 3"),
    ("quantize:lsq,debug_info=yup", "debug_info must be true or false, got 'yup'"),
    ("quantize:lsq,begin=0.6,end=0.2", "end must not lie before begin: 0.2 is before 0.6"),
    ("quantize:ema,begin=1.0", "begin must lie before the end of the training, got 1.0"),
    ("quantize:oaq,end=soon", "end must be a step .* got 'soon'"),
    ("quantize:waq,begin=-5", "begin must be a step .* got -5"),
    ("quantize:weight,end=0.5", "unknown argument 'end'"),
    ("quantize:weight,begin=1.0", "begin must lie before the end of the training, got 1.0"),
    ("quantize:weight,block_size=20", "block_size must be a multiple of 16, got 20"),
    ("quantize:weight,layer_bits={a: 9}", "layer_bits must hold bits from 2 to 8, got 'a': 9"),
    ("over_parameterize:lop", "expand_rate must be given"),
    ("over_parameterize:lop,expand_rate=1", "expand_rate must be an integer from 2 to 64, got 1"),
    ("low_rank:tucker,tucker_minimal_ratio=0", r"tucker_minimal_ratio must be a number in \(0, 1\], got 0"),
    ("quantize:lsq;prune:snip", "stage 2: prune must come before quantize"),
    ("quantize:lsq;low_rank", "stage 2: low_rank must come before quantize"),
    ("quantize:lsq;quantize:ema", "stage 2: the pipeline has two stages of quantize, lsq and ema"),
    ("prune:snip;quantize:lsq,retain_sparsity=false", "retain_sparsity=false after prune"),
    ("prune:snip;quantize:weight,mode=asymmetric", "mode asymmetric has no zero on its grid"),
    ("prune:simd_oc;quantize:waq", "zeros of simd_oc do not survive"),
    ("export:out;quantize:lsq", r"stage 1 \(export\): export comes once, and last"),
    ("export:out", "no stage: give at least one"),
    ("missing.yaml", "missing.yaml cannot be read"),
    ("pipeline: {a: 1}\n", "expected 'pipeline:' with a list of stages, got dict"),
    ("pipline:\n- quantize: lsq\n", "unknown key 'pipline' at the top: did you mean pipeline"),
    ("pipeline:\n- lsq\n", "stage 1: expected 'kind: algorithm' and arguments, got 'lsq'"),
    ("pipeline:\n- prune: snip\n  quantize: lsq\n", "stage 1: .* got prune and quantize: make them two stages"),
    ("pipeline:\n- quantize: [\n", "not YAML"),
    ("pipeline:\n- quantize: lsq\n  3: 4\n", "unknown argument 3"),
    ("3\n", "expected 'pipeline:' with a list of stages, got int"),
]


@pytest.mark.parametrize("text, message", WRONG, ids=[text.replace("\n", "|") for text, _ in WRONG])
def test_what_cannot_work_is_one_line_that_names_place_and_mend(text, message):
    with pytest.raises(PipelineError, match=message) as caught:
        load_pipeline(text)
    assert "\n" not in str(caught.value)


def test_a_file_is_named_in_its_errors(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="mine.yml cannot be read"):
        load_pipeline(path)
    path.write_text("pipeline:\n- quantize: lsk\n", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"mine.yml: stage 1 \(quantize\)"):
        load_pipeline(path)


@pytest.mark.parametrize("make, message", [
    (lambda: QuantizeLSQ(bits=1), "bits must"), (lambda: PruneSNIP(sparsity="x"), "sparsity must"),
    (lambda: Pipeline((QuantizeLSQ(), PruneSNIP())), "prune must come before"),
    (lambda: Pipeline((Export("x"), QuantizeLSQ())), "belongs at the end")])
def test_objects_are_checked_like_files(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_the_flag_gives_a_pipeline_or_a_usage_error(capsys):
    parser = argparse.ArgumentParser()
    add_compress_flag(parser)
    assert parser.parse_args(["--compress", LINE]).compress == VALUE
    assert parser.parse_args([]).compress is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--compress", "quantize:lsq,bits=9"])
    assert "bits must be an integer from 2 to 8, got 9" in capsys.readouterr().err


def test_schema_names_every_stage_and_argument():
    stages = pipeline_schema()["properties"]["pipeline"]["items"]["oneOf"]
    assert len(stages) == sum(len(known) for known in STAGES.values())
    for kind, known in STAGES.items():
        for algorithm, stage in known.items():
            schema = next(each for each in stages if each["title"] == "%s: %s" % (kind.value, algorithm or "path"))
            names = {field.name for field in dataclasses.fields(stage)} - ({"to"} if kind is Kind.EXPORT else set())
            assert set(schema["properties"]) == names | {kind.value}
            assert all(schema["properties"][name]["description"] for name in names)
    json.dumps(pipeline_schema(), allow_nan=False)
