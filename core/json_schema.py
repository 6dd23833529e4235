"""The JSON schema of a pipeline file, for editors that complete and check while one types."""
from __future__ import annotations

import dataclasses
from typing import Any, Dict, Type

from slimtrain.core.fields import spec_of
from slimtrain.core.stages import STAGES, Kind, Stage


def pipeline_schema() -> Dict[str, Any]:
    """A JSON schema (draft 2020-12) of what :func:`slimtrain.core.load_pipeline` reads."""
    stages = [_stage_schema(kind, algorithm, stage) for kind, known in STAGES.items()
              for algorithm, stage in known.items()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "slimtrain pipeline",
        "type": "object",
        "required": ["pipeline"],
        "additionalProperties": False,
        "properties": {"pipeline": {"type": "array", "minItems": 1, "items": {"oneOf": stages}}},
    }


def _stage_schema(kind: Kind, algorithm: str, stage: Type[Stage]) -> Dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(stage)}
    properties: Dict[str, Any] = {kind.value: {"const": algorithm}}
    if kind is Kind.EXPORT:
        properties[kind.value] = {"type": ["string", "null"], "description": spec_of(fields.pop("to")).doc}
    elif len(STAGES[kind]) == 1:
        properties[kind.value] = {"enum": [algorithm, None]}
    for name, field in fields.items():
        properties[name] = _field_schema(field)
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    return {"type": "object", "title": "%s: %s" % (kind.value, algorithm or "path"),
            "description": (stage.__doc__ or "").strip(), "required": [kind.value, *required],
            "additionalProperties": False, "properties": properties}


def _field_schema(field: dataclasses.Field[Any]) -> Dict[str, Any]:
    spec = spec_of(field)
    schema = spec.schema()
    if spec.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    described: Dict[str, Any] = {**schema, "description": spec.doc}
    if field.default is not dataclasses.MISSING:
        default = field.default
        described["default"] = list(default) if isinstance(default, tuple) else getattr(default, "value", default)
    return described
