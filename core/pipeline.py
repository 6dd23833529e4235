"""A compression pipeline: its stages in the order of their work, checked before anything is trained."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from slimtrain.core.stages import (
    Export,
    Kind,
    Prune,
    PruneTaylorFO,
    Quantize,
    QuantizeWAQ,
    QuantizeWeights,
    Stage,
)
from slimtrain.core.weight_only import WeightMode

_ORDER = {kind: place for place, kind in enumerate(Kind)}


class PipelineError(ValueError):
    """A configuration that cannot work; one line that names the place and the mend."""


@dataclass(frozen=True)
class Pipeline:
    """Stages and where the result goes.

    Attributes:
        stages: at most one of each kind, in the order of :class:`Kind`; no export among them.
        export: where the files go.

    Raises:
        PipelineError: the stages cannot work together.
    """

    stages: Tuple[Stage, ...]
    export: Export = Export()

    def __post_init__(self) -> None:
        stages = tuple(self.stages)
        if not stages:
            raise PipelineError("the pipeline has no stage: give at least one of over_parameterize, low_rank, prune "
                                "and quantize")
        _check_order(stages)
        _check_combinations({stage.KIND: stage for stage in stages})
        object.__setattr__(self, "stages", tuple(_completed(stage, stages) for stage in stages))

    def stage(self, kind: Kind) -> Optional[Stage]:
        """The stage of a kind, if there is one."""
        return next((stage for stage in self.stages if stage.KIND is kind), None)

    @property
    def runs(self) -> Tuple[Pipeline, ...]:
        """The pipeline as training runs, one after the other: what is over-parameterized is merged before the rest."""
        first, rest = self.stages[:1], self.stages[1:]
        if first[0].KIND is not Kind.OVER_PARAMETERIZE or not rest:
            return (self,)
        return Pipeline(first, self.export), Pipeline(rest, self.export)

    def one_run(self) -> Pipeline:
        """The pipeline itself, if one training run can do it.

        Raises:
            PipelineError: it takes several.
        """
        if len(self.runs) > 1:
            raise PipelineError("over_parameterize has a training run of its own, after which the model is merged: "
                                "train the parts of pipeline.runs one after the other")
        return self

    @property
    def last(self) -> Stage:
        """The stage that writes the model."""
        return self.stages[-1]


def _check_order(stages: Tuple[Stage, ...]) -> None:
    for index, stage in enumerate(stages):
        if stage.KIND is Kind.EXPORT:
            raise PipelineError("export is no stage of its own, and belongs at the end")
        for earlier in stages[:index]:
            if earlier.KIND is stage.KIND:
                raise PipelineError("stage %d: the pipeline has two stages of %s, %s and %s; one run does one of them"
                                    % (index + 1, stage.KIND.value, earlier.ALGORITHM, stage.ALGORITHM))
            if _ORDER[earlier.KIND] > _ORDER[stage.KIND]:
                raise PipelineError("stage %d: %s must come before %s, which needs its result; move it up" % (
                    index + 1, stage.KIND.value, earlier.KIND.value))


def _check_combinations(stages: Dict[Kind, Stage]) -> None:
    prune, quantize = stages.get(Kind.PRUNE), stages.get(Kind.QUANTIZE)
    if isinstance(prune, Prune) and isinstance(quantize, Quantize) and quantize.retain_sparsity is False:
        raise PipelineError("quantize: retain_sparsity=false after prune would let pruned weights grow again; leave it "
                            "out or say true")
    if isinstance(prune, Prune) and isinstance(quantize, QuantizeWeights) and quantize.mode is WeightMode.ASYMMETRIC:
        raise PipelineError("quantize: mode asymmetric has no zero on its grid, so pruned weights would not stay zero; "
                            "use mode symmetric after prune")
    if isinstance(prune, Prune) and isinstance(quantize, QuantizeWAQ) and not isinstance(prune, PruneTaylorFO):
        raise PipelineError("quantize: waq transforms the weights, and zeros of %s do not survive that; prune channels "
                            "(taylor_fo), or quantize with lsq" % prune.ALGORITHM)


def _completed(stage: Stage, stages: Tuple[Stage, ...]) -> Stage:
    """What a stage leaves open, decided by its neighbours."""
    if isinstance(stage, Quantize) and stage.retain_sparsity is None:
        return dataclasses.replace(stage, retain_sparsity=any(other.KIND is Kind.PRUNE for other in stages))
    return stage


def changed_arguments(stage: Stage) -> Dict[str, Any]:
    """The arguments that differ from their defaults, as plain values."""
    changed = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            changed[field.name] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "value", value) if not isinstance(value, (str, int, float, dict)) else value
