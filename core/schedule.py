"""When to prune, and how far: a step is turned into a pruning event, an event into a sparsity. Plain integers only."""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional, Union


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


def step_of(moment: Union[int, float], total_steps: int) -> int:
    """An optimizer step given as such (int), or as a fraction of the training (float in [0, 1]).

    Raises:
        ValueError: a negative step, or a fraction outside [0, 1].
    """
    if isinstance(moment, int) and not isinstance(moment, bool):
        if moment < 0:
            raise ValueError("a step must not be negative, got %r" % (moment,))
        return moment
    if not 0.0 <= moment <= 1.0:
        raise ValueError("a moment of training is an integer step or a fraction in [0, 1], got %r" % (moment,))
    return int(round(moment * total_steps))
