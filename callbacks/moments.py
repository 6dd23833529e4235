"""Moments of training as optimizer steps, once a Trainer knows how long it is going to train."""
from __future__ import annotations

import math
from typing import Any, Optional

from slimtrain.core import Moment, step_of


def step_at(trainer: Any, moment: Moment) -> float:
    """The optimizer step of a moment; infinite for the end of the whole training, which never comes before a step.

    Args:
        trainer: a Trainer that is about to train.
        moment: a step (int), a part of the training (float in [0, 1]) or a text like "3 epochs".

    Raises:
        ValueError: a part of a training whose length the Trainer does not know, or epochs of unknown length.
    """
    total = training_steps(trainer)
    if isinstance(moment, float):
        if moment == 1.0:
            return math.inf
        if math.isinf(total) and moment > 0.0:
            raise ValueError("the Trainer does not know how long it will train (no limit, or endless data), so %r must "
                             "be given in optimizer steps or epochs" % moment)
    return step_of(moment, 0 if math.isinf(total) else int(total), epoch_steps(trainer))


def training_steps(trainer: Any) -> float:
    """Optimizer steps of the whole training; infinite where a Trainer about to train does not know."""
    total = trainer.estimated_stepping_batches
    return math.inf if total < 0 else total  # -1 stands for no limit


def epoch_steps(trainer: Any) -> Optional[float]:
    """Optimizer steps of an epoch; None where a data set does not tell its length."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
