"""What became of each layer of a network that was decomposed or expanded: the lines of a report."""

from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple


class FactorizedLayer(NamedTuple):
    """One line of the report; ``ranks`` is empty and ``reason`` says why where a layer is left as it is."""

    name: str
    kind: str
    factorization: str
    ranks: Tuple[int, ...]
    parameters: Tuple[int, int]      #: weights before and after
    multiply_adds: Tuple[int, int]   #: before and after; per output position where the sizes are not known
    error: float                     #: |weight - product of its factors| / |weight|
    reason: str


class ExpandedLine(NamedTuple):
    """One line of the report; ``reason`` says why a layer is not expanded."""

    name: str
    kind: str
    parameters: Tuple[int, int]  #: weights before and after
    bypass: bool
    reason: str


def describe_factorized(report: Sequence[FactorizedLayer]) -> List[str]:
    """One sentence per layer, and one for the model."""
    lines = []
    for line in report:
        if line.ranks:
            lines.append("%s: %s %s, %d weights instead of %d, relative error %.3f" % (
                line.name, line.factorization, line.ranks, line.parameters[1], line.parameters[0], line.error))
        else:
            lines.append("%s is left as it is: %s" % (line.name, line.reason))
    before, after = (sum(line.parameters[index] for line in report) for index in (0, 1))
    lines.append("decomposed %d of %d layers: %d of %d weights are left (%.1f %%)" % (
        sum(bool(line.ranks) for line in report), len(report), after, before, 100 * after / max(before, 1)))
    return lines
