"""What delivery takes from a run's journals: the next window, and what is missing in it once two looks agree.

A window is recorded as a whole. So it holds few of the events that are a request each (files, MLflow's own requests):
else a server that takes a number of them and then wants a pause, or a flush that has less time than all of them take,
would be sent the same first ones again and again, and never come to the others. Where even those are too many, and some
are answered twice before the server wants its pause, the next windows are half as large, down to one event, until
some of them were recorded. (Of points alone, those that were answered are left out instead: ``volley``. A store that
would have points twice gets the same windows again, which is what tells those in doubt.)
Of large files a flush, or a program at its end, may have time for a few only, however few a window holds, and who goes
on is another process. So it is noted in the ledger that such a window was begun, and who finds that takes one file at a
time, and then more.

What is recorded with a window, the run's view, names all files that the run has. So of a run with many thousands
windows hold a hundredth of what was delivered: else each twenty would cost many megabytes.

What was logged before a deletion is recorded before that is sent: were it sent anew, after an answer that was lost,
MLflow would refuse it for what we have deleted ourselves.

What the cursors pass is never read again. A directory's listing that leaves out a file that is there, as some network
file systems give while others are moved, must not be what decides: so where the numbers of events tell that some are
not there, or what there is of a writer does not begin with its first, the disk is looked at once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from mlflow_outbox.counters import Counters
from mlflow_outbox.linked import is_linked
from mlflow_outbox.spool.events import Artifact, Event, FileFor, Request
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Window
from mlflow_outbox_worker.records import RunRecord

#: Events of a window for each batch of points: as many again as MLflow takes points at once may be of another kind.
_EVENTS: Final = 2000
#: Files and requests of MLflow's own in a window, at least, and files that the run has for each one more.
_REQUESTS: Final = 20
_FILES: Final = 100
#: Requests of points that count as one: they are sent together (``linked``), unless one of them is refused.
_TOGETHER: Final = 100
#: Windows that are recorded before the next one holds twice as much.
_KEPT_FOR: Final = 8
#: Halvings that leave one file, or request of MLflow's own.
_TO_ONE: Final = _REQUESTS.bit_length()
#: Halvings that leave one event.
_MOST_HALVED: Final = _EVENTS.bit_length()
#: Requests after which MLflow refuses what was logged before; that of an experiment may have to wait for runs.
_DELETIONS: Final = frozenset({"delete_run", "delete_logged_model", "delete_experiment"})


@dataclasses.dataclass
class _Pace:
    """How often windows were halved; failures since the last one that was recorded, and these since a failure."""

    halved: int = 0
    failed: int = 0
    recorded: int = 0


class Intake:
    """Reads windows of runs; may be used from several threads.

    Args:
        points: metric points of one batch.
        counters: counts windows in which the second look had more as "overlooked".
    """

    def __init__(self, points: int, counters: Counters) -> None:
        self._points = points
        self._counters = counters
        #: Of runs whose windows failed in part, or were halved since.
        self._paces: dict[str, _Pace] = {}

    def failed(self, run_id: str) -> None:
        """Have the next windows of a run hold less if this one fails for the second time when it was made in part."""
        pace = self._paces.setdefault(run_id, _Pace())
        pace.failed, pace.recorded = pace.failed + 1, 0
        if pace.failed > 1:
            pace.halved = min(pace.halved + 1, _MOST_HALVED)

    def broken_off(self, run_id: str) -> None:
        """Have the next windows of a run hold one file: another process had begun this one, and no time for it all."""
        self._paces[run_id] = _Pace(halved=_TO_ONE)

    def recorded(self, run_id: str) -> None:
        """Have the next windows of a run hold more again, if it has recorded some of those that hold less."""
        pace = self._paces.get(run_id)
        if pace is None:
            return
        pace.failed, pace.recorded = 0, pace.recorded + 1
        if pace.recorded == _KEPT_FOR:
            pace.halved, pace.recorded = pace.halved - 1, 0
        if pace.halved <= 0:
            del self._paces[run_id]

    def window(self, reader: RunReader, record: RunRecord, after: str, *, batches: int = 1, files: int = 0) -> Window:
        """Return the next events.

        Args:
            reader: of the run.
            record: how far it was delivered.
            after: the writer that has used up the window before this one; "" for none.
            batches: how many batches of points it may hold.
            files: how many the run has that were delivered.

        Raises:
            OSError: the run's files could not be read; try again after a pause.
        """
        requests = max(_REQUESTS, files // _FILES)
        window = self._next(reader, record, after, batches, requests)
        if not (window.missing or window.broken or any(window.begun.values())):
            return window
        again = self._next(reader, record, after, batches, requests)  # which lists anew
        if (again.missing, len(again.broken)) > (window.missing, len(window.broken)):
            return window
        if again.missing < window.missing or again.begun != window.begun:
            self._counters.add("overlooked")
            self._counters.warn_once(
                ("overlooked", record.run_id),
                f"mlflow-outbox: at a second look the disk had more of run {record.run_id} than at the first; "
                "nothing was lost",
            )
        return again

    def _next(self, reader: RunReader, record: RunRecord, after: str, batches: int, requests: int) -> Window:
        """Return the next events: those before a deletion, or those from it on."""
        pace = self._paces.get(record.run_id)
        halved = pace.halved if pace is not None else 0
        points, items = max(1, self._points * batches >> halved), max(1, _EVENTS * batches >> halved)
        window = reader.window(record.cursors, points=points, items=items, after=after)
        end = _end(window.events, max(1, requests >> halved))
        return reader.window(record.cursors, points=points, items=end, after=after) if end else window


def _end(events: Sequence[tuple[str, Event]], most: int = _REQUESTS) -> int:
    """Return how many events are enough for one window; 0 for all.

    Args:
        events: what there is for it.
        most: files and requests that it may hold.
    """
    requests: set[object] = set()
    series = 0  # of requests of points that follow each other
    for number, (_, event) in enumerate(events):
        series = series + 1 if is_linked(event) else 0
        if series > 1 and series % _TOGETHER != 1:
            continue
        if number and isinstance(event, Request) and event.operation in _DELETIONS:
            return number
        if isinstance(event, Artifact):  # of several contents of a file only the last is sent
            request: object = event.path
        elif isinstance(event, FileFor):
            request = event.owner, event.path
        elif isinstance(event, Request):
            request = number
        else:
            continue
        if len(requests) == most and request not in requests:
            return number
        requests.add(request)
    return 0
