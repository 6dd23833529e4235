"""The JSON schema of pipelines, held against a validator that is not ours, and against what the reader says."""
from __future__ import annotations

import jsonschema
import pytest
import yaml

from slimtrain.core import PipelineError, load_pipeline, pipeline_schema, to_yaml

GOOD = ["quantize:lsq", "low_rank", "prune:simd_oc,sparsity=0.5,end=3 epochs;quantize:weight,bits=4",
        "over_parameterize:lop,expand_rate=4;prune:taylor_fo,align_channels=8,ramp=linear;quantize:waq;export:out/m",
        "pipeline:\n- quantize: lsq\n  skip_quant_layers: stem+head\n",
        "pipeline:\n- quantize: weight\n  layer_bits: {a.*: 4}\n- export:\n"]
BAD = ["pipeline: []\n", "pipeline:\n- quantise: lsq\n", "pipeline:\n- quantize: lsk\n",
       "pipeline:\n- quantize: lsq\n  bits: 9\n", "pipeline:\n- quantize: lsq\n  bit: 4\n",
       "pipeline:\n- prune: snip\n  sparsity: 1.0\n", "pipeline:\n- prune: snip\n  ramp: square\n",
       "pipeline:\n- over_parameterize: lop\n", "pipeline:\n- prune: snip\n  begin: 3 weeks\n",
       "pipeline:\n- quantize: lsq\n  skip_quant_layers: 3\n", "pipline:\n- quantize: lsq\n"]


def valid(text):
    return jsonschema.Draft202012Validator(pipeline_schema()).is_valid(yaml.safe_load(text))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(pipeline_schema())


@pytest.mark.parametrize("text", GOOD)
def test_what_is_read_is_valid(text):
    assert valid(to_yaml(load_pipeline(text)))
    assert not text.startswith("pipeline:") or valid(text)


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused_is_not(text):
    with pytest.raises(PipelineError):
        load_pipeline(text)
    assert not valid(text)
