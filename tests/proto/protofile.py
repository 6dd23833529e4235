"""A reader of .proto files, for the part of the language that compression.proto uses; any other line is an error."""

import re

from google.protobuf import descriptor_pb2

FIELD = re.compile(r"(optional|required|repeated) (\w+) (\w+) = (\d+)(?: \[default = ([^\]]+)\])?;")
VALUE = re.compile(r"(\w+) = (\d+);")
TYPES = {"bool": "TYPE_BOOL", "float": "TYPE_FLOAT", "int32": "TYPE_INT32", "string": "TYPE_STRING"}


def parse_proto(text, name):
    """The text as a FileDescriptorProto."""
    file = descriptor_pb2.FileDescriptorProto(name=name)
    stack, unresolved = [("", file)], []
    lines = [line for line in (raw.split("//")[0].strip() for raw in text.splitlines()) if line]
    assert lines[0] == 'syntax = "proto2";'
    for line in lines[1:]:
        path, scope = stack[-1]
        words = line.split()
        if words[0] == "package":
            file.package = words[1].rstrip(";")
        elif line == "}":
            stack.pop()
        elif words[0] in ("message", "enum") and words[2:] == ["{"]:
            children = getattr(scope, "message_type" if scope is file else "nested_type")
            children = children if words[0] == "message" else scope.enum_type
            stack.append((f"{path}.{words[1]}", children.add(name=words[1])))
        elif isinstance(scope, descriptor_pb2.EnumDescriptorProto):
            value, number = VALUE.fullmatch(line).groups()
            scope.value.add(name=value, number=int(number))
        else:
            unresolved.append((path, *add_field(scope, *FIELD.fullmatch(line).groups())))
    assert len(stack) == 1
    resolve(file, unresolved)
    return file


def add_field(message, label, kind, name, number, default):
    field = message.field.add(name=name, number=int(number))
    field.label = descriptor_pb2.FieldDescriptorProto.Label.Value("LABEL_" + label.upper())
    if default is not None:
        field.default_value = default.strip('"')
    return field, kind


def resolve(file, unresolved):
    """Give every field its type; names of messages and enums are looked up from the inside out."""
    kinds = {}

    def visit(path, scope, nested):
        for enum in scope.enum_type:
            kinds[f"{path}.{enum.name}"] = "TYPE_ENUM"
        for message in nested:
            kinds[f"{path}.{message.name}"] = "TYPE_MESSAGE"
            visit(f"{path}.{message.name}", message, message.nested_type)

    visit("", file, file.message_type)
    for path, field, kind in unresolved:
        if kind in TYPES:
            field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(TYPES[kind])
            continue
        while f"{path}.{kind}" not in kinds:
            assert path, f"unknown type {kind}"
            path = path.rpartition(".")[0]
        field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(kinds[f"{path}.{kind}"])
        field.type_name = f".{file.package}{path}.{kind}"
