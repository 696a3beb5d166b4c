"""What a delivery loop sees of its runs: which have something new, by doorbell, by size, and by a look at all of them.

Where only this machine writes, the doorbell tells of each segment that is begun, and a segment that is being written
tells by its size. Other machines' bells may not be heard; there the times of a run's directories tell. In case all of
that was missed, the list of all runs is read now and then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox_worker.gate import Gate
from mlflow_outbox_worker.schedule import Schedule, Stamp
from mlflow_outbox_worker.sources import Source

#: Seconds between two looks at the list of all runs, in case a doorbell was missed.
_LOOK_AROUND: Final = 30.0
#: The same where other machines write, whose doorbell may not be heard.
_LOOK_AT_OTHERS: Final = 5.0


class Lookout:
    """Takes notice of what there is to do, and of who asks to hurry.

    Args:
        source: where the runs are.
        schedule: told of each that may have something new, and to hurry.
        gate: told to hurry.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, source: Source, schedule: Schedule, gate: Gate, clock: Callable[[], float]) -> None:
        self._source = source
        self._schedule = schedule
        self._gate = gate
        self._clock = clock
        self._pause = _LOOK_AT_OTHERS if source.remote else _LOOK_AROUND
        self._next_look = 0.0
        self._doorbell = 0
        self._hurry = 0

    def begin(self) -> None:
        """Take notice of every run on disk; who asked to hurry before is served by that."""
        self._hurry = self._source.hurry_asked()
        self._look_around()

    def look(self) -> bool:
        """Take notice of what is new; return whether that was a look at all runs."""
        self._listen()
        for run_id in self._schedule.grown(self.stamp):
            self._schedule.mark(run_id)
        if self._clock() < self._next_look:
            return False
        self._look_around()
        return True

    def stamp(self, run_id: str) -> Stamp:
        """Return when a run's directories last changed, where no doorbell tells."""
        return tuple(_modified(folder) for folder in self._source.folders(run_id)) if self._source.remote else ()

    def _look_around(self) -> None:
        self._source.answer_doorbell()
        self._schedule.look_around(self._source.run_ids())
        self._next_look = self._clock() + self._pause

    def _listen(self) -> None:
        rung = self._source.rung(self._doorbell)
        if rung is None:
            self._doorbell = 0
            for run_id in self._source.run_ids():
                self._schedule.mark(run_id)
        else:
            ids, self._doorbell = rung
            for run_id in ids:
                self._schedule.mark(run_id)
        hurry = self._source.hurry_asked()
        if hurry != self._hurry:
            self._hurry = hurry
            self._gate.hurry()
            self._schedule.hurry()


def _modified(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
