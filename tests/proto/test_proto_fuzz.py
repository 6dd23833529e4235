"""Any bytes at all: a pipeline that round-trips, or one clear error; never another exception."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_layers import layer
from slimtrain.core import Grid, ParameterFileError
from slimtrain.proto import (
    PruneType,
    WeightOnlyParams,
    params_from_json,
    params_to_json,
    prune_algorithm,
    quantize_algorithm,
)
from slimtrain.proto.params import parse_params, serialize
from slimtrain.proto.schema import Pipeline
from wire import FOREIGN_FILE

# What protobuf 3.20 has to say before the error that is ours.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected end-group tag")

NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable())
SCALES = st.floats(2.0**-120, 2.0**120, width=32)
GRIDS = st.tuples(st.integers(-128, 127), st.integers(-128, 127)).map(
    lambda ends: Grid(8, min(ends), max(ends))
)


def full_layers(name):
    return st.builds(
        layer,
        st.just(name),
        st.just((name, name + "__before_tr")),
        input_scale=SCALES,
        output_scale=SCALES,
        weight_scales=st.lists(SCALES, min_size=1, max_size=5),
        input_grid=GRIDS,
        output_grid=GRIDS,
        weight_grid=GRIDS,
    )


LAYERS = st.lists(NAMES, min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.tuples(
        *(
            full_layers(name) | st.builds(WeightOnlyParams, st.just(name), st.just(name), st.integers(2, 8))
            for name in names
        )
    )
)
PIPELINES = LAYERS.map(
    lambda layers: Pipeline(
        version="0.0.0",
        algo=[quantize_algorithm(layers), prune_algorithm(PruneType.SIMD_OC, ["w"], [0.5], ["l"], [4])],
    )
)


def survives(data):
    """Reading gives an error of ours, or a pipeline that can be printed and written again."""
    try:
        pipeline = parse_params(data)
    except ParameterFileError:
        return
    params_to_json(pipeline)
    assert parse_params(serialize(pipeline)) == pipeline or has_nan(pipeline)


def has_nan(pipeline):
    return any(
        np.isnan(list(entry.scales)).any()
        for algorithm in pipeline.algo
        for layer_entry in algorithm.quant_params.layer
        for side in (layer_entry.input, layer_entry.weight, layer_entry.output)
        for entry in side
    ) or any(
        np.isnan(list(level.prune_ratios)).any()
        for algorithm in pipeline.algo
        for level in (
            algorithm.prune_params.level_pruner_params,
            algorithm.prune_params.simd_oc_pruner_params,
        )
    )


@given(st.binary(max_size=200))
def test_random_bytes(data):
    survives(data)


@settings(max_examples=300)
@given(st.data())
def test_flipped_bits(data):
    broken = bytearray(FOREIGN_FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    survives(bytes(broken))


@given(st.integers(1, len(FOREIGN_FILE) - 1))
def test_truncated_files(length):
    survives(FOREIGN_FILE[:length])


@given(PIPELINES)
def test_pipelines_survive_both_forms_and_bytes_are_stable(pipeline):
    data = serialize(pipeline)
    again = parse_params(data)
    assert again == pipeline
    assert serialize(again) == data
    assert serialize(params_from_json(params_to_json(pipeline))) == data


@given(st.text(max_size=50))
def test_random_json(text):
    with contextlib.suppress(ParameterFileError):
        params_from_json(text)
