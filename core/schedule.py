"""When to prune, and how far: a step is turned into a pruning event, an event into a sparsity. Plain integers only."""
from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional, Union

#: a moment of training: an optimizer step (int), a part of the training (float in [0, 1]), or "3 epochs"
Moment = Union[int, float, str]

#: the form of a moment in words
EPOCHS = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*epochs?\s*$")


class Ramp(Enum):
    """How sparsity grows from event to event."""

    LINEAR = "linear"  #: by equal amounts
    CUBIC = "cubic"    #: ``s * (1 - (1 - t)**3)``: much while there is redundancy, little at the end (arXiv 1710.01878)


@dataclass(frozen=True)
class PruningSchedule:
    """Pruning events at ``begin_step``, ``begin_step + interval``, ... until the sparsity is reached.

    Attributes:
        sparsity: reached by the last event, in [0, 1).
        events: number of pruning events; 1 prunes all at once.
        interval: steps from one event to the next, at least 1.
        begin_step: the step of the first event; steps count from 0.
        ramp: growth between the events.
    """

    sparsity: float
    events: int = 1
    interval: int = 1
    begin_step: int = 0
    ramp: Ramp = Ramp.CUBIC

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError("sparsity must lie in [0, 1), got %r" % (self.sparsity,))
        for name, value, least in (("events", self.events, 1), ("interval", self.interval, 1),
                                   ("begin_step", self.begin_step, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError("%s must be an integer, got %r" % (name, value))
            if value < least:
                raise ValueError("%s must be at least %d, got %r" % (name, least, value))
        if not isinstance(self.ramp, Ramp):
            raise TypeError("ramp must be a Ramp, got %r" % (self.ramp,))

    @property
    def last_step(self) -> int:
        """The step of the last event."""
        return self.begin_step + (self.events - 1) * self.interval

    def event_at(self, step: int) -> Optional[int]:
        """The number of the event at ``step``, from 0; None when there is none."""
        event, rest = divmod(step - self.begin_step, self.interval)
        return event if rest == 0 and 0 <= event < self.events else None

    def fraction(self, event: int) -> float:
        """The share of the final sparsity that is reached by an event; exactly 1 at the last."""
        time = (event + 1) / self.events
        return time if self.ramp is Ramp.LINEAR else 1.0 - (1.0 - time) ** 3

    def target(self, event: int) -> float:
        """The sparsity after an event."""
        return self.sparsity * self.fraction(event)

    def looks_at(self, step: int, window: int) -> bool:
        """Whether ``step`` is an event or one of the ``window - 1`` steps before one, whose gradients count for it."""
        if step > self.last_step:
            return False
        ahead = (self.begin_step - step) if step < self.begin_step else -(step - self.begin_step) % self.interval
        return ahead < window


def schedule_between(sparsity: float, events: int, begin_step: int, end_step: int, ramp: Ramp) -> PruningSchedule:
    """A schedule whose first event is at ``begin_step`` and whose last is not after ``end_step``.

    Raises:
        ValueError: the end lies before the begin, or there is not one step for each event.
    """
    if events > 1 and end_step - begin_step < events - 1:
        raise ValueError("%d pruning events do not fit between the optimizer steps %d and %d: ask for fewer, or train "
                         "longer" % (events, begin_step, end_step))
    interval = (end_step - begin_step) // (events - 1) if events > 1 else 1
    return PruningSchedule(sparsity, events, max(interval, 1), begin_step, ramp)


def step_of(moment: Moment, total_steps: int, epoch_steps: Optional[float] = None) -> int:
    """The optimizer step of a moment of training.

    Args:
        moment: see :data:`Moment`.
        total_steps: optimizer steps of the whole training.
        epoch_steps: optimizer steps of one epoch, where it is known.

    Raises:
        TypeError, ValueError: as :func:`check_moment`; epochs where their length is not known.
    """
    check_moment(moment)
    if isinstance(moment, str):
        if epoch_steps is None:
            raise ValueError("%r cannot be told in steps, since the length of an epoch is not known here: give an "
                             "optimizer step or a part of the training" % moment)
        return int(round(_epochs(moment) * epoch_steps))
    return moment if isinstance(moment, int) else int(round(moment * total_steps))


def check_moment(moment: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless this is a :data:`Moment`."""
    expected = "must be a step (integer), a part of the training (number in [0, 1]) or a text like '3 epochs', got %r"
    if isinstance(moment, bool) or not isinstance(moment, (int, float, str)):
        raise TypeError(expected % (moment,))
    if isinstance(moment, str):
        if EPOCHS.match(moment) is None:
            raise ValueError(expected % (moment,))
    elif not (moment >= 0 and (isinstance(moment, int) or moment <= 1.0)):
        raise ValueError(expected % (moment,))


def check_window(begin: Any, end: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these are two moments of which the second may come after the first.

    A window that begins with the end of the training is refused, too: it would never open.
    """
    for name, moment in (("begin", begin), ("end", end)):
        try:
            check_moment(moment)
        except (TypeError, ValueError) as error:
            raise type(error)("%s %s" % (name, error)) from None
    if is_before(end, begin):
        raise ValueError("end must not lie before begin: %r is before %r" % (end, begin))
    if isinstance(begin, float) and begin == 1.0:
        raise ValueError("begin must lie before the end of the training, got 1.0")


def is_before(first: Moment, second: Moment) -> bool:
    """Whether ``first`` certainly lies before ``second``: moments of different kinds cannot be compared beforehand."""
    if isinstance(first, str) and isinstance(second, str):
        return _epochs(first) < _epochs(second)
    if isinstance(first, str) or isinstance(second, str) or isinstance(first, int) != isinstance(second, int):
        return False
    return first < second


def _epochs(moment: str) -> float:
    found = EPOCHS.match(moment)
    assert found is not None  # it was checked
    return float(found.group(1))
