"""The parameter file: golden bytes, appending, JSON, errors, and nothing half written."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from proto_layers import layer, save_layers
from slimtrain.core import ParameterFileError
from slimtrain.proto import (
    PruneType,
    WeightOnlyParams,
    params_from_json,
    params_to_json,
    prune_algorithm,
    quantize_algorithm,
    read_params,
    save_algorithm,
    write_params,
)
from slimtrain.proto.schema import CompressionAlgo, Pipeline
from wire import FOREIGN_FILE, FOREIGN_PRUNE, FOREIGN_QUANTIZE, block, number, real, text

ENVIRONMENT = dict(os.environ, PYTHONPATH=os.pathsep.join(os.path.abspath(part) for part in sys.path))
PRUNE = prune_algorithm(PruneType.RANDOM, ["w"], [0.5], ["layer"])
PRUNE_BLOCKS = prune_algorithm(PruneType.SIMD_OC, ["w"], [0.5], ["layer"], [4])
QUANTIZE = quantize_algorithm([layer()])


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "compress_params.bin")


def bytes_of(path):
    with open(path, "rb") as file:
        return file.read()


def put(path, data):
    with open(path, "wb") as file:
        file.write(data)
    return path


def test_golden_file(path):
    save_algorithm(path, PRUNE, append=False)
    level = block(2, text(1, "w"), real(2, 0.5), text(3, "layer"))
    algorithm = number(1, 1) + block(3, number(1, 0), level)
    namespace = uuid.uuid5(uuid.NAMESPACE_DNS, "compress-params.slimtrain")
    name = str(uuid.uuid5(namespace, algorithm.hex()))
    assert bytes_of(path) == text(1, "0.0.0") + block(2, algorithm) + text(3, name)


def test_equal_parameters_are_equal_files(path, tmp_path):
    other = str(tmp_path / "other.bin")
    for target in (path, other):
        save_algorithm(target, quantize_algorithm([layer()]), append=False)
    assert bytes_of(path) == bytes_of(other)
    save_algorithm(other, quantize_algorithm([layer(input_scale=0.25)]), append=False)
    assert read_params(path).mnn_uuid != read_params(other).mnn_uuid


def test_append_keeps_the_rest_and_replaces_its_own_kind(path):
    first = save_algorithm(path, PRUNE, append=False)
    save_algorithm(path, QUANTIZE, append=True)
    save_algorithm(path, PRUNE_BLOCKS, append=True)
    newer = prune_algorithm(PruneType.RANDOM, ["w"], [0.75], ["layer"])
    final = save_algorithm(path, newer, append=True)
    assert list(final.algo) == [newer, QUANTIZE, PRUNE_BLOCKS]
    assert final.mnn_uuid == first.mnn_uuid
    assert read_params(path) == final


def test_without_append_the_old_file_is_gone(path):
    save_algorithm(path, PRUNE, append=False)
    save_algorithm(path, QUANTIZE, append=False)
    assert list(read_params(path).algo) == [QUANTIZE]


def test_appending_keeps_every_byte_of_another_writer(path):
    put(path, FOREIGN_FILE)
    save_algorithm(path, PRUNE_BLOCKS, append=True)
    added = block(2, PRUNE_BLOCKS.SerializeToString())
    expected = text(1, "0.0.0") + FOREIGN_QUANTIZE + FOREIGN_PRUNE + added
    assert bytes_of(path) == expected + text(3, "their-uuid") + text(9, "unknown too")


def test_append_replaces_all_earlier_ones_of_its_kind(path):
    put(path, text(1, "0.0.0") + FOREIGN_QUANTIZE + FOREIGN_PRUNE + FOREIGN_QUANTIZE)
    pipeline = save_algorithm(path, QUANTIZE, append=True)
    assert [algorithm.type for algorithm in pipeline.algo] == [
        CompressionAlgo.QUANTIZE,
        CompressionAlgo.PRUNE,
    ]
    assert pipeline.algo[0] == QUANTIZE
    assert uuid.UUID(pipeline.mnn_uuid).version == 5


def test_append_to_nothing_is_an_error(path):
    with pytest.raises(ParameterFileError, match="cannot read the parameter file .*No such file"):
        save_algorithm(path, PRUNE, append=True)
    assert not os.path.exists(path)


@pytest.mark.parametrize("suffix", ["bin", "json"])
def test_round_trip_through_both_forms(tmp_path, suffix):
    layers = [layer(input_scale=0.1, weight_scales=[1e-7, 3.3333333, 1e-30]), WeightOnlyParams("b", "op", 3)]
    algorithm = quantize_algorithm(layers)
    target = str(tmp_path / f"params.{suffix}")
    saved = save_algorithm(target, algorithm, append=False)
    saved = save_algorithm(target, PRUNE_BLOCKS, append=True)
    assert read_params(target) == saved
    assert list(saved.algo) == [algorithm, PRUNE_BLOCKS]


def test_json_has_the_names_of_the_schema():
    pipeline = Pipeline(version="0.0.0", mnn_uuid="u")
    pipeline.algo.add().CopyFrom(QUANTIZE)
    value = json.loads(params_to_json(pipeline))
    entry = value["algo"][0]["quant_params"]["layer"][0]
    assert value["mnn_uuid"] == "u"
    assert entry["output"] == [
        {"name": "y", "bits": 8, "scales": [0.25], "zero_point": 0, "clamp_min": -127, "clamp_max": 127}
    ]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "5",
        "null",
        "[]",
        "{",
        "{}",
        '{"version": 5}',
        '{"version": "0.0.0", "unheard_of": 1}',
        '{"version": "0.0.0", "algo": [{"type": "PAINT"}]}',
        '{"version": "0.0.0", "algo": [{"quant_params": {"layer": [{"input": [{"bits": 8}]}]}}]}',
        '{"version": "0.0.0", "algo": ' + "[" * 100000,
    ],
)
def test_broken_json_is_one_clear_error(tmp_path, broken):
    target = put(str(tmp_path / "p.json"), broken.encode())
    with pytest.raises(ParameterFileError, match="p.json"):
        read_params(target)
    with pytest.raises(ParameterFileError):
        params_from_json(broken)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"PK\x03\x04 not this",
        FOREIGN_FILE[:100],
        text(1, "0.0.0") + b"\x12\xff\xff\xff\xff\x03abc",  # an algorithm that claims a gigabyte
        b"\x0a\xff\xff\xff\xff\x03",  # a version that claims a gigabyte
        text(1, "0.0.0") + b"\x0c" + text(3, "behind the end of a group"),
        text(1, "\x00\x01") + FOREIGN_QUANTIZE,
        FOREIGN_QUANTIZE,
        block(1, b"\xff\xfe") + FOREIGN_QUANTIZE,
        FOREIGN_FILE.replace(b"unknown too", b"unknown to"),
        FOREIGN_FILE.replace(text(3, "layer"), block(3, b"\xff" * 5)),
        number(1, 8) + text(2, "pytorch") + text(3, "2.0"),  # an ONNX model starts like this
    ],
)
def test_broken_and_foreign_files_are_one_clear_error(path, data):
    put(path, data)
    begin = time.time()
    with pytest.raises(
        ParameterFileError, match="compress_params.bin: not a compression parameter file"
    ):
        read_params(path)
    assert time.time() - begin < 1


def test_an_empty_file_is_called_empty(path):
    put(path, b"")
    with pytest.raises(ParameterFileError, match="compress_params.bin: the parameter file is empty"):
        read_params(path)


def test_a_huge_file_is_not_read(path):
    with open(path, "wb") as file:
        file.write(FOREIGN_FILE)
        file.truncate(1 << 30)
    begin = time.time()
    with pytest.raises(ParameterFileError, match="too many"):
        read_params(path)
    assert time.time() - begin < 1


MEMORY_OF_READING = """
import resource, sys
from slimtrain.core import ParameterFileError
from slimtrain.proto import read_params
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_params(sys.argv[1])
except ParameterFileError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_claimed_gigabyte_is_not_reserved(path):
    put(path, text(1, "0.0.0") + b"\x12\xff\xff\xff\xff\x03abc")
    output = subprocess.check_output([sys.executable, "-c", MEMORY_OF_READING, path], env=ENVIRONMENT)
    assert int(output) < 50_000  # kilobytes


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ParameterFileError, match="cannot read"):
        read_params(tmp_path)


def changed(change):
    """A pipeline of one full int8 layer "conv" after ``change`` of its entry."""
    pipeline = Pipeline(version="0.0.0")
    pipeline.algo.add().CopyFrom(QUANTIZE)
    change(pipeline.algo[0].quant_params.layer[0])
    return pipeline


def clear(side):
    return lambda entry: entry.ClearField(side)


def assign(side, field, value):
    return lambda entry: setattr(getattr(entry, side)[0], field, value)


def set_scale(side, value):
    def change(entry):
        getattr(entry, side)[0].scales[0] = value

    return change


def conv_with_3_channels(entry):
    entry.conv.input_channel = 1
    entry.conv.output_channel = 3


REFUSED = [
    (clear("input"), "'conv': full int8 needs input, weight and output, there is no input"),
    (clear("output"), "'conv': .* there is no output"),
    (clear("weight"), "'y': .* there is no weight"),
    (assign("input", "bits", 4), "'conv': input bits must be 8, got 4"),
    (assign("output", "bits", 7), "'conv': output bits must be 8, got 7"),
    (assign("weight", "bits", 4), "'conv': weight bits must be 8, got 4"),
    (assign("input", "zero_point", -128), r"'conv': input zero_point must lie in the range \[-127, 127\], got -128"),
    (assign("weight", "asymmetric", True), "'conv': weights .* symmetric"),
    (assign("output", "clamp_max", 128), "'conv': output range"),
    (assign("weight", "clamp_min", 128), "'conv': weight range"),
    (lambda entry: entry.weight[0].ClearField("scales"), "'conv': weight has no scale"),
    (lambda entry: entry.input[0].scales.append(1.0), "'conv': input needs one scale"),
    (set_scale("weight", 0.0), "'conv': weight scale 1 of 2"),
    (set_scale("output", float("nan")), "'conv': output scale"),
    (conv_with_3_channels, "'conv': expected one weight scale for each of 3 output channels, got 2"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_would_break_the_model_is_refused_by_layer_name(path, change, message):
    put(path, b"old")
    pipeline = changed(change)
    with pytest.raises(ParameterFileError, match=f"layer {message}"):
        write_params(path, pipeline)
    with pytest.raises(ParameterFileError, match=f"layer {message}"):
        save_algorithm(path, pipeline.algo[0], append=False)
    assert bytes_of(path) == b"old"


def test_weight_only_entries_are_checked(path):
    pipeline = Pipeline(version="0.0.0")
    algorithm = quantize_algorithm([WeightOnlyParams("fc", "op", 4)])
    pipeline.algo.add().CopyFrom(algorithm)
    write_params(path, pipeline)
    entry = pipeline.algo[0].quant_params.layer[0]
    entry.weight[0].bits = 9
    with pytest.raises(ParameterFileError, match="layer 'fc': weight-only bits"):
        write_params(path, pipeline)
    entry.weight[0].bits = 4
    entry.ClearField("op_name")
    with pytest.raises(ParameterFileError, match="layer 'fc': .* op_name"):
        write_params(path, pipeline)
    entry.ClearField("weight")
    with pytest.raises(ParameterFileError, match="needs weight"):
        write_params(path, pipeline)


def test_for_guide_would_switch_full_int8_off(path):
    pipeline = changed(lambda entry: None)
    pipeline.for_guide = True
    with pytest.raises(ParameterFileError, match="for_guide"):
        write_params(path, pipeline)
    put(path, Pipeline(version="0.0.0", for_guide=True).SerializeToString())
    with pytest.raises(ParameterFileError, match="for_guide"):
        save_algorithm(path, QUANTIZE, append=True)


def test_incomplete_messages_are_refused(path):
    incomplete = Pipeline(version="0.0.0")
    incomplete.algo.add().quant_params.layer.add().weight.add(bits=8)
    for target in (path, path + ".json"):
        with pytest.raises(ParameterFileError, match="required fields are not set: .*name"):
            write_params(target, incomplete)
        assert not os.path.exists(target)
    with pytest.raises(ParameterFileError, match="needs quant_params"):
        save_algorithm(path, CompressionAlgo(), append=False)


KILLED_WHILE_WRITING = """
import os, signal, sys
from slimtrain.proto import PruneType, prune_algorithm, save_algorithm
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
save_algorithm(sys.argv[1], prune_algorithm(PruneType.FILTER, ["w"], [0.5], ["layer"]), append=True)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_writing_leaves_the_old_file(path, moment):
    save_layers(path, layer())
    before = bytes_of(path)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, path, moment], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    assert bytes_of(path) == before
