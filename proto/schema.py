"""The messages of ``compress_params.bin``, built from a table into a descriptor pool of their own.

A private pool, because a process may already hold another copy of package ``MNN.Compression`` (another
toolbox, or generated code) and the default pool refuses a second one.  A table in Python, because generated
code ties a package to versions of protobuf, while this builds on every runtime from 3.20 on.
``compression.proto`` beside this file is the same schema for people and for other languages; a test keeps the
two equal.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Tuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "MNN.Compression"
# Classes made at run time have no static type; in signatures this name says which values are messages.
Message = Any

_Descriptor = descriptor_pb2.FieldDescriptorProto
_LABELS = {
    "optional": _Descriptor.LABEL_OPTIONAL,
    "required": _Descriptor.LABEL_REQUIRED,
    "repeated": _Descriptor.LABEL_REPEATED,
}
_SCALARS = {
    "bool": _Descriptor.TYPE_BOOL,
    "float": _Descriptor.TYPE_FLOAT,
    "int32": _Descriptor.TYPE_INT32,
    "string": _Descriptor.TYPE_STRING,
}


class _Field(NamedTuple):
    number: int
    label: str
    type: str
    name: str
    default: str = ""


# Nested types are spelled with their outer message, outer messages come before inner ones.
_ENUMS: Dict[str, Tuple[str, ...]] = {
    "CompressionAlgo.CompressionType": ("QUANTIZE", "PRUNE"),
    "QuantizeParams.RoundMode": ("ROUND_TOWARDS_ZERO", "ROUND_AWAY_FROM_ZERO", "ROUND_HALF_TO_EVEN"),
    "LayerQuantizeParams.QuantMethod": ("QAT", "OverflowAware", "WinogradAware"),
    "PruneParams.PruneType": ("RANDOM", "SIMD_OC", "FILTER"),
}
_MESSAGES: Dict[str, Tuple[_Field, ...]] = {
    "Pipeline": (
        _Field(1, "required", "string", "version", "0.0.0"),
        _Field(2, "repeated", "CompressionAlgo", "algo"),
        _Field(3, "optional", "string", "mnn_uuid"),
        _Field(4, "optional", "bool", "for_guide", "false"),
    ),
    "CompressionAlgo": (
        _Field(1, "optional", "CompressionAlgo.CompressionType", "type", "QUANTIZE"),
        _Field(2, "optional", "QuantizeParams", "quant_params"),
        _Field(3, "optional", "PruneParams", "prune_params"),
    ),
    "QuantizeParams": (
        _Field(1, "optional", "QuantizeParams.RoundMode", "round_mode", "ROUND_AWAY_FROM_ZERO"),
        _Field(4, "repeated", "LayerQuantizeParams", "layer"),
    ),
    "LayerQuantizeParams": (
        _Field(1, "repeated", "LayerQuantizeParams.ActivationParams", "input"),
        _Field(2, "repeated", "LayerQuantizeParams.WeightParams", "weight"),
        _Field(3, "repeated", "LayerQuantizeParams.ActivationParams", "output"),
        _Field(4, "optional", "LayerQuantizeParams.QuantMethod", "method", "QAT"),
        _Field(5, "optional", "LayerQuantizeParams.WinogradParams", "wino_params"),
        _Field(6, "optional", "string", "op_name"),
        _Field(7, "optional", "string", "subgraph_name"),
        _Field(8, "optional", "LayerQuantizeParams.ConvolutionInfo", "conv"),
    ),
    "LayerQuantizeParams.ActivationParams": (
        _Field(1, "required", "string", "name"),
        _Field(2, "optional", "int32", "bits", "8"),
        _Field(3, "repeated", "float", "scales"),
        _Field(4, "optional", "int32", "zero_point", "0"),
        _Field(5, "optional", "int32", "clamp_min", "-128"),
        _Field(6, "optional", "int32", "clamp_max", "127"),
    ),
    "LayerQuantizeParams.WeightParams": (
        _Field(1, "required", "string", "name"),
        _Field(2, "optional", "int32", "bits", "8"),
        _Field(3, "repeated", "float", "scales"),
        _Field(4, "optional", "int32", "clamp_min", "-128"),
        _Field(5, "optional", "int32", "clamp_max", "127"),
        _Field(6, "optional", "bool", "asymmetric", "false"),
        _Field(7, "optional", "int32", "block_size", "0"),
    ),
    "LayerQuantizeParams.WinogradParams": (
        _Field(1, "required", "int32", "version", "0"),
        _Field(4, "repeated", "int32", "units_attr"),
    ),
    "LayerQuantizeParams.ConvolutionInfo": (
        _Field(1, "required", "int32", "input_channel"),
        _Field(2, "required", "int32", "output_channel"),
        _Field(3, "repeated", "int32", "kernel_size"),
    ),
    "PruneParams": (
        _Field(1, "optional", "PruneParams.PruneType", "type", "RANDOM"),
        _Field(2, "optional", "LevelPrunerParams", "level_pruner_params"),
        _Field(3, "optional", "SIMDOCPrunerParams", "simd_oc_pruner_params"),
    ),
    "LevelPrunerParams": (
        _Field(1, "repeated", "string", "weight_tensor_names"),
        _Field(2, "repeated", "float", "prune_ratios"),
        _Field(3, "repeated", "string", "layer_names"),
    ),
    "SIMDOCPrunerParams": (
        _Field(1, "repeated", "string", "weight_tensor_names"),
        _Field(2, "repeated", "float", "prune_ratios"),
        _Field(3, "repeated", "string", "layer_names"),
        _Field(4, "repeated", "int32", "oc_blocks"),
    ),
}


def _add_field(message: Any, field: _Field) -> None:
    added = message.field.add(name=field.name, number=field.number, label=_LABELS[field.label])
    if field.type in _SCALARS:
        added.type = _SCALARS[field.type]
    else:
        added.type = _Descriptor.TYPE_ENUM if field.type in _ENUMS else _Descriptor.TYPE_MESSAGE
        added.type_name = f".{PACKAGE}.{field.type}"
    if field.default:
        added.default_value = field.default


def file_descriptor() -> descriptor_pb2.FileDescriptorProto:
    """The whole schema as protobuf's own description of a file (proto2, package ``MNN.Compression``)."""
    file = descriptor_pb2.FileDescriptorProto(name="compression.proto", package=PACKAGE)
    placed: Dict[str, Any] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = placed[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        placed[path] = message
        for field in fields:
            _add_field(message, field)
    for path, values in _ENUMS.items():
        outer, _, name = path.rpartition(".")
        enum = placed[outer].enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    return file


def _message_classes() -> Dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file_descriptor().SerializeToString())
    factory: Any = message_factory
    # GetMessageClass came with protobuf 4.22; before it, the same was a method of a factory over the pool.
    modern = hasattr(factory, "GetMessageClass")
    build = factory.GetMessageClass if modern else factory.MessageFactory(pool).GetPrototype
    names = [path for path in _MESSAGES if "." not in path]
    return {name: build(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


_CLASSES = _message_classes()
Pipeline = _CLASSES["Pipeline"]
CompressionAlgo = _CLASSES["CompressionAlgo"]
QuantizeParams = _CLASSES["QuantizeParams"]
LayerQuantizeParams = _CLASSES["LayerQuantizeParams"]
PruneParams = _CLASSES["PruneParams"]
LevelPrunerParams = _CLASSES["LevelPrunerParams"]
SIMDOCPrunerParams = _CLASSES["SIMDOCPrunerParams"]
