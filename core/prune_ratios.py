"""The file of per-layer ratios: found by a first run, edited by a person, read by the next run."""
from __future__ import annotations

import os
from typing import Any, Dict, Mapping, Sequence, Union

from slimtrain.core.files import write_whole
from slimtrain.core.selection import select

PathLike = Union[str, "os.PathLike[str]"]

#: an entry that is written for the reader of the file, and ignored when it is read
OVERALL = "overall_prune_ratio"


def write_prune_ratios(path: PathLike, ratios: Mapping[str, float]) -> None:
    """Write ``weight name: share of weights to prune`` as YAML, in the order given, whole or not at all."""
    import yaml  # loading it costs more than all of core

    values = {name: round(float(ratio), 6) for name, ratio in ratios.items()}
    text = yaml.safe_dump(values, default_flow_style=False, sort_keys=False, allow_unicode=True)
    write_whole(path, text.encode("utf-8"))


def read_prune_ratios(path: PathLike, names: Sequence[str]) -> Dict[str, float]:
    """The ratios in a file by weight name; patterns (``features.*``) are allowed, the last entry that matches holds.

    Weights that the file does not mention are not in the result.

    Raises:
        ValueError: not such a file, a name that matches none of ``names``, a ratio outside [0, 1).
        OSError: the file cannot be read.
    """
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            values: Any = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError("%s is not YAML: %s" % (os.fspath(path), error)) from error
    if not isinstance(values, dict):
        raise ValueError("%s must hold 'weight name: ratio' lines, got %s" % (os.fspath(path), type(values).__name__))
    ratios: Dict[str, float] = {}
    for pattern, ratio in values.items():
        if pattern == OVERALL:
            continue
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio < 1.0:
            raise ValueError("%s: the ratio of %r must be a number in [0, 1), got %r"
                             % (os.fspath(path), pattern, ratio))
        ratios.update((name, float(ratio)) for name in select(names, [pattern]))
    return ratios
