"""A pipeline as text: a YAML file for a project, one line for a command-line flag; read and written.

    pipeline:
      - prune: simd_oc
        sparsity: 0.6
      - quantize: lsq
      - export: out/model

is the same as ``prune:simd_oc,sparsity=0.6;quantize:lsq;export:out/model``.
"""
from __future__ import annotations

import dataclasses
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

from slimtrain.core.fields import nearest
from slimtrain.core.pipeline import Pipeline, PipelineError, changed_arguments
from slimtrain.core.stages import STAGES, Export, Kind, Stage

PathLike = Union[str, "os.PathLike[str]"]

_TOP = "pipeline"


def load_pipeline(path_or_text: PathLike) -> Pipeline:
    """A pipeline from a YAML file, from the text of one, or from the short form.

    Args:
        path_or_text: a path that ends in ``.yaml``, ``.yml`` or ``.json``, or the text itself.

    Raises:
        PipelineError: it is not a pipeline; one line that names the file, the stage and the mend.
    """
    text = os.fspath(path_or_text)
    if "\n" not in text and text.lower().endswith((".yaml", ".yml", ".json")):
        return _from_file(text)
    return parse_yaml(text) if "\n" in text or text.lstrip().startswith(("{", "[")) else parse_short(text)


def _from_file(path: str) -> Pipeline:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError("%s cannot be read: %s" % (path, error)) from error
    try:
        return parse_yaml(text)
    except PipelineError as error:
        raise PipelineError("%s: %s" % (path, error)) from error


def parse_yaml(text: str) -> Pipeline:
    """A pipeline from YAML, or from JSON, which is YAML."""
    import yaml  # loading it costs more than all of core

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:  # the latter for nesting without end
        raise PipelineError("not YAML: %s" % " ".join(str(error).split())) from error
    if isinstance(content, dict):
        for key in content:
            if key != _TOP:
                raise PipelineError("unknown key %r at the top: %s" % (key, nearest(str(key), [_TOP])))
        content = content.get(_TOP)
    if not isinstance(content, list):
        raise PipelineError("expected 'pipeline:' with a list of stages, got %s" % type(content).__name__)
    return _pipeline([_stage(index + 1, entry) for index, entry in enumerate(content)])


def parse_short(text: str) -> Pipeline:
    """A pipeline from one line: stages with ``;`` between them, ``kind:algorithm,argument=value,...`` each.

    Values are YAML; several layer names are joined by ``+``: ``skip_quant_layers=stem+head.*``.
    """
    entries = [part.strip() for part in text.split(";")]
    return _pipeline([_stage(index + 1, _entry(index + 1, part)) for index, part in enumerate(entries) if part])


def _entry(number: int, text: str) -> Dict[str, Any]:
    import yaml

    head, *rest = text.split(",")
    kind, _, algorithm = head.partition(":")
    entry: Dict[str, Any] = {kind.strip(): algorithm.strip()}
    for item in rest:
        name, separator, value = item.partition("=")
        if not separator:
            raise PipelineError("stage %d: expected argument=value, got %r" % (number, item.strip()))
        try:
            entry[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise PipelineError("stage %d: %s=%s is not a value" % (number, name.strip(), value)) from error
    return entry


def _stage(number: int, entry: Any) -> Stage:
    place = "stage %d" % number
    if not isinstance(entry, dict):
        raise PipelineError("%s: expected 'kind: algorithm' and arguments, got %r" % (place, entry))
    kind, algorithm = _kind(place, entry)
    place = "%s (%s)" % (place, kind.value)
    if kind is Kind.EXPORT:
        arguments = {"to": algorithm or "", **{key: value for key, value in entry.items() if key != kind.value}}
        return _made(place, Export, arguments)
    known = STAGES[kind]
    if not algorithm and len(known) == 1:
        algorithm = next(iter(known))
    if algorithm not in known:
        raise PipelineError("%s: unknown algorithm %r: %s" % (place, algorithm, nearest(str(algorithm), list(known))))
    return _made(place, known[algorithm], {key: value for key, value in entry.items() if key != kind.value})


def _kind(place: str, entry: Mapping[Any, Any]) -> Tuple[Kind, Any]:
    kinds = [kind for kind in Kind if kind.value in entry]
    if len(kinds) != 1:
        known = [kind.value for kind in Kind]
        first = next((str(key) for key in entry), "")
        raise PipelineError("%s: expected one of %s, got %s: %s" % (
            place, ", ".join(known), " and ".join(kind.value for kind in kinds) or repr(first),
            "make them two stages" if kinds else nearest(first, known)))
    return kinds[0], entry[kinds[0].value]


def _made(place: str, stage: Type[Stage], arguments: Mapping[str, Any]) -> Stage:
    fields = {field.name: field for field in dataclasses.fields(stage)}
    for name in arguments:
        if name not in fields:
            raise PipelineError("%s: unknown argument %r: %s" % (place, name, nearest(str(name), list(fields))))
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            raise PipelineError("%s: %s must be given" % (place, name))
    try:
        return stage(**{name: _joined(fields[name], value) for name, value in arguments.items()})
    except (TypeError, ValueError) as error:
        raise PipelineError("%s: %s" % (place, error)) from error


def _joined(field: dataclasses.Field[Any], value: Any) -> Any:
    """Layer names of the short form; a file has lists."""
    return value.split("+") if field.default == () and isinstance(value, str) else value


def _pipeline(stages: Sequence[Stage]) -> Pipeline:
    exports = [index for index, stage in enumerate(stages) if isinstance(stage, Export)]
    if exports and exports != [len(stages) - 1]:
        raise PipelineError("stage %d (export): export comes once, and last" % (exports[0] + 1))
    export = stages[-1] if exports else Export()
    assert isinstance(export, Export)
    return Pipeline(tuple(stages[:-1] if exports else stages), export)


def to_plain(pipeline: Pipeline) -> Dict[str, List[Dict[str, Any]]]:
    """A pipeline as the plain lists and dicts of its file; what equals a default is left out."""
    entries: List[Dict[str, Any]] = [{stage.KIND.value: stage.ALGORITHM, **changed_arguments(stage)}
                                     for stage in pipeline.stages]
    if pipeline.export != Export():
        arguments = changed_arguments(pipeline.export)
        entries.append({Kind.EXPORT.value: arguments.pop("to", ""), **arguments})
    return {_TOP: entries}


def to_yaml(pipeline: Pipeline) -> str:
    """The file of a pipeline; :func:`load_pipeline` gives an equal one."""
    import yaml

    text: str = yaml.safe_dump(to_plain(pipeline), sort_keys=False, allow_unicode=True)
    return text


def to_short(pipeline: Pipeline) -> str:
    """The one line of a pipeline.

    Raises:
        ValueError: an argument has no short form (bits by layer): use a file.
    """
    return ";".join(_short(entry) for entry in to_plain(pipeline)[_TOP])


def _short(entry: Dict[str, Any]) -> str:
    (kind, algorithm), *arguments = entry.items()
    return ",".join(["%s:%s" % (kind, algorithm), *("%s=%s" % (name, _short_value(name, value))
                                                    for name, value in arguments)])


def _short_value(name: str, value: Any) -> Optional[str]:
    if isinstance(value, dict):
        raise ValueError("%s has no short form: write a file" % name)
    if isinstance(value, list):
        return "+".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
