"""A schedule over the runs of a trainer, for callbacks of any trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftkit.schedules.half import HalfFineTuning
from peftkit.schedules.schedule import Schedule, SteppedSchedule


class Runs:
    """Makes a schedule when a run begins and closes it at the end; one that was interrupted is closed by the next run.

    Each run of `HalfFineTuning` is a round of its own.

    Attributes:
        schedule: the schedule of the run; the last one's between runs.
    """

    schedule: Schedule | None = None

    def __init__(self, make: type[Schedule], settings: Mapping[str, Any]):
        self.make, self.settings = make, dict(settings)

    def begin(self, model: nn.Module, optimizer: Any, kept: Mapping[str, Any] | None) -> None:
        """Make it; from `kept`, the state in a checkpoint, where a run goes on.

        Raises:
            As the schedule, and then the model is as it was.
        """
        before, self.schedule = self.schedule, None
        if before is not None:
            before.close()
        schedule = self.make(model, optimizer, **self.settings)
        try:
            if kept is not None:
                schedule.load_state_dict(kept)
            elif isinstance(schedule, HalfFineTuning) and before is not None:
                schedule.load_state_dict(before.state_dict())
                schedule.new_round()
        except BaseException:
            schedule.close()
            raise
        self.schedule = schedule

    def step(self) -> None:
        """After a step of the optimizer."""
        if isinstance(self.schedule, SteppedSchedule):
            self.schedule.step()

    def end(self) -> None:
        """Close it."""
        if self.schedule is not None:
            self.schedule.close()
