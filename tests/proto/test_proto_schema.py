"""The schema: equal to its .proto text, compatible on the wire, private to this package."""

import os
import subprocess
import sys
from pathlib import Path

import slimtrain.proto
from protofile import parse_proto
from slimtrain.proto import schema
from wire import FOREIGN_FILE

PROTO_FILE = Path(slimtrain.proto.__file__).parent / "compression.proto"

BESIDE_ANOTHER_COPY = """
from google.protobuf import descriptor_pb2, descriptor_pool
other = descriptor_pb2.FileDescriptorProto(name="MNN_compression.proto", package="MNN.Compression")
pipeline = other.message_type.add(name="Pipeline")
pipeline.field.add(name="something_else", number=1, type=5, label=1)
descriptor_pool.Default().AddSerializedFile(other.SerializeToString())
assert descriptor_pool.Default().FindMessageTypeByName("MNN.Compression.Pipeline")
from slimtrain.proto.schema import Pipeline
pipeline = Pipeline(version="0.0.0")
pipeline.algo.add().type = 1
print(pipeline.SerializeToString().hex())
"""


def test_table_and_proto_file_say_the_same():
    parsed = parse_proto(PROTO_FILE.read_text(encoding="utf-8"), "compression.proto")
    assert parsed == schema.file_descriptor()


def test_comparison_notices_a_change():
    changed = PROTO_FILE.read_text(encoding="utf-8").replace("clamp_max = 6", "clamp_max = 16")
    assert parse_proto(changed, "compression.proto") != schema.file_descriptor()


def test_defaults_are_those_of_the_converter():
    layer = schema.LayerQuantizeParams()
    side, weight = layer.input.add(), layer.weight.add()
    assert (side.bits, side.zero_point, side.clamp_min, side.clamp_max) == (8, 0, -128, 127)
    assert (weight.bits, weight.clamp_min, weight.clamp_max, weight.asymmetric, weight.block_size) == (
        8,
        -128,
        127,
        False,
        0,
    )
    assert schema.QuantizeParams().round_mode == schema.QuantizeParams.ROUND_AWAY_FROM_ZERO == 1
    assert not schema.Pipeline().for_guide


def test_reads_what_another_writer_wrote():
    pipeline = schema.Pipeline.FromString(FOREIGN_FILE)
    layer = pipeline.algo[0].quant_params.layer[0]
    assert (pipeline.version, pipeline.mnn_uuid) == ("0.0.0", "their-uuid")
    assert (layer.input[0].name, layer.input[0].bits, layer.input[0].zero_point) == ("x", 4, 3)
    assert list(layer.weight[0].scales) == [0.5, 0.25]
    assert (layer.output[0].clamp_min, layer.output[0].clamp_max) == (-8, 7)
    prune = pipeline.algo[1].prune_params.level_pruner_params
    assert (list(prune.weight_tensor_names), list(prune.layer_names)) == (["w"], ["layer"])


def test_unknown_fields_survive():
    assert schema.Pipeline.FromString(FOREIGN_FILE).SerializeToString() == FOREIGN_FILE


def test_lives_beside_another_copy_in_the_default_pool():
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    output = subprocess.check_output([sys.executable, "-c", BESIDE_ANOTHER_COPY], env=environment)
    assert output.decode().strip() == (b"\x0a\x050.0.0" + b"\x12\x02\x08\x01").hex()
