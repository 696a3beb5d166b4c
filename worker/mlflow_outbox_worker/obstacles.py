"""Files that a server does not take, although it takes others: what is to be done about them.

A server that fails to store a file answers 500, whatever the reason is: its disk or bucket is out of order, which
passes, or it can never store a file of that path, for instance because it has a file where a folder would have to be.
The answer does not tell one from the other. A second file does, uploaded at once beside the first and deleted again:

* It is not taken either: the destination is *away*, as it would be without this module. All runs wait.
* It is taken: the run is *alone* with its trouble, and waits by its own back-off. All others go on.
* That was so ``TRIES`` times in a row, over ``SECONDS``: the same content is uploaded under another name, and then the
  file itself once more. The content is taken and the file, before and after, is not: so it is its path that the server
  refuses, and the event is a *dead* letter, which is kept and can be sent again, also with another path. What comes
  after it in its run need wait no longer.
* The content is not taken under another name either, though a few bytes are: the server may be short of room, and that
  passes. The run is *parked*: a person is told which file it is, and it is tried again slowly.

So no outage makes a dead letter, however long it lasts: only an answer about this path, given twice around one that
takes all else of it. Nothing of this is remembered beyond the process; another one begins to count again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.spool.events import Artifact, FileFor
from mlflow_outbox_worker.outcome import Outcome, classify
from mlflow_outbox_worker.sink import Sink, SinkError

#: Attempts in a row at one file before it is judged: servers that are restarted answer 500 for some moments.
TRIES: int = 5
#: Seconds, at least, from the first of them to the last; longer than such a moment.
SECONDS: float = 30.0


class Upload(NamedTuple):
    """The upload of one file.

    Attributes:
        kind, owner: whose artifacts it goes to: a "run", a "model" or a "uri", and its id in MLflow or the URI.
        content: what is to be stored.
        attempt: makes the request; raises SinkError.
    """

    kind: str
    owner: str
    content: Path
    attempt: Callable[[], None]


@dataclasses.dataclass
class _Obstacle:
    file: Artifact | FileFor
    since: float
    tries: int = 0


class Obstacles:
    """The files at which runs stand; used by several threads for different runs.

    Args:
        sink: the tracking store.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._sink = sink
        self._clock = clock
        self._met: dict[str, _Obstacle] = {}

    def upload(self, file: Artifact | FileFor, run_id: str, upload: Upload) -> tuple[SinkError, Outcome] | None:
        """Upload a file; return how that failed, and what is to be done, or None when it is stored.

        Args:
            file: the event.
            run_id: the run whose event it is.
            upload: the request.
        """
        failed = _failed(upload.attempt)
        if failed is not None and _is_obstacle(*failed):
            failed = self._judged(file, run_id, upload, *failed)
        if failed is not None and (failed[1].alone or failed[1].kind == "parked"):
            return failed
        met = self._met.get(run_id)
        # The run stands at it no more, or the destination is what is in the way. Files before it in its window are sent
        # again each time, and say nothing.
        if met is not None and (failed is not None or met.file == file):
            del self._met[run_id]
        return failed

    def _judged(
        self, file: Artifact | FileFor, run_id: str, upload: Upload, error: SinkError, outcome: Outcome
    ) -> tuple[SinkError, Outcome] | None:
        if not self._takes(upload, None):
            return error, outcome
        met = self._met.get(run_id)
        if met is None or met.file != file:
            met = self._met[run_id] = _Obstacle(file, self._clock())
        met.tries += 1
        if met.tries < TRIES or self._clock() - met.since < SECONDS:
            return error, dataclasses.replace(outcome, alone=True)
        if not self._takes(upload, upload.content):
            return error, Outcome("parked", f"MLflow takes other files of it, but not this one: {outcome.reason}")
        last = _failed(upload.attempt)
        if last is not None and _is_obstacle(*last):
            reason = f"MLflow takes this content under another name, but not under this one: {last[1].reason}"
            return last[0], Outcome("dead_letter", reason)
        return last

    def _takes(self, upload: Upload, content: Path | None) -> bool:
        try:
            return self._sink.takes(upload.kind, upload.owner, content)
        except SinkError:  # no answer, or none about files: whatever it is, it is not the first file's
            return False


def _failed(attempt: Callable[[], None]) -> tuple[SinkError, Outcome] | None:
    try:
        attempt()
    except SinkError as error:
        return error, classify(error, "upload")
    return None


def _is_obstacle(error: SinkError, outcome: Outcome) -> bool:
    """Return whether a failure can be the file's own fault, although nothing says so.

    A server that fails before it has read a large file ends the connection, and its answer does not always get through.
    """
    failed = error.kind == "answer" and (error.status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR
    return outcome.kind == "retry" and (failed or (error.kind == "connection" and error.sent))
