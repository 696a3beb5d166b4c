"""Sends batches of points of one run side by side, so that a far server is waited for once and not once a batch.

Of many runs the lanes hide the distance (``delivery``). One long run has a lane alone: with 50 ms to the server it
would spend them on each thousand points. So while fewer runs than ``parallel_runs`` have their turn, the requests that
are left over are given to those that have one: a window holds several batches then, and those of points alone go at
once.

What that may change, and why it does not:

* Points have no order among each other: the latest of a metric is the one of the largest step, whenever it came.
  Everything else of a window (params, tags, files, requests) is made in its place, before and after all that stands
  beside it. Only stores that keep a point once take part, for the whole window is sent again when a kill came between;
  when one request of it failed, without those that were answered (``reconciliation``).
* A database locks the latest value of each metric of a run, in one order (MLflow sorts the keys), and one that is new
  is the one place where two batches could meet. So a batch with a metric that the run has not had yet goes alone.
* The first window of a turn holds one batch: a run that a server refuses is met with one request. After a failure with
  several under way there is one at a time for five minutes, for whatever reason it was.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.planner import Batch, Step
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.refused import Refused
from mlflow_outbox_worker.requests import Later, Requests
from mlflow_outbox_worker.sink import Sink

#: Seconds without volleys after one that failed.
_ALONE: Final = 300.0


class Volley:
    """Makes the requests of windows; used by several threads for different runs.

    Args:
        requests: makes each of them.
        answered: told of batches that were answered for when something else of their window failed.
        sink: the tracking store.
        most: requests that may be under way at once, of all runs.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        requests: Requests,
        answered: Callable[[RunRecord, Sequence[Batch]], None],
        sink: Sink,
        most: int,
        *,
        clock: Callable[[], float] = stopwatch.seconds,
    ) -> None:
        self._requests = requests
        self._answered = answered
        self._most = most if sink.parallel and sink.deduplicates_metrics else 1
        self._clock = clock
        self._lock = threading.Lock()
        self._turns = 0
        self._alone_until = 0.0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Count a run among those that have their turn."""
        with self._lock:
            self._turns += 1
        try:
            yield
        finally:
            with self._lock:
                self._turns -= 1

    def width(self) -> int:
        """Return how many requests each run may have under way, and so how many batches its next window may hold."""
        return 1 if self._clock() < self._alone_until else max(1, self._most // max(1, self._turns))

    def make(self, record: RunRecord, view: RunView, steps: Sequence[Step], refused: Refused) -> None:
        """Make the requests of a window.

        Args:
            record: the run, which is in MLflow by now.
            view: the run as it was delivered before the window.
            steps: what to do, in order.
            refused: gets a letter for each thing that MLflow refuses for good.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
        """
        answered: list[Batch] = []
        beside: list[Batch] = []
        made = 0  # of what is not left out when the window is sent again
        try:
            for step in steps:
                if isinstance(step, Batch) and _is_of_known_metrics(step, view):
                    beside.append(step)
                    continue
                with Later.behind(made):
                    self._fire(record, beside, refused, answered)
                    beside = []
                    letters = len(refused.letters)
                    self._requests.make(record, step, refused)
                if isinstance(step, Batch) and len(refused.letters) == letters:
                    answered.append(step)
                made += not isinstance(step, Batch) or bool(step.params or step.tags)
            with Later.behind(made):
                self._fire(record, beside, refused, answered)
        except BaseException:  # raised again
            self._answered(record, answered)
            raise

    def _fire(self, record: RunRecord, batches: Sequence[Batch], refused: Refused, answered: list[Batch]) -> None:
        width = self.width() if len(batches) > 1 else 1
        for begin in range(0, len(batches), width):
            shots = [_Shot(self._requests, record, batch) for batch in batches[begin : begin + width]]
            for shot in shots[1:]:
                shot.begin()
            shots[0].make()
            for shot in shots:
                shot.wait()
            answered += [shot.batch for shot in shots if shot.is_answered]
            failures = [shot.failure for shot in shots if shot.failure is not None]
            if failures:
                if len(shots) > 1:
                    self._alone_until = self._clock() + _ALONE
                raise failures[0]
            for shot in shots:
                refused.take(shot.refused)


class _Shot:
    """One request of several that are under way at once."""

    def __init__(self, requests: Requests, record: RunRecord, batch: Batch) -> None:
        self._requests = requests
        self._record = record
        self.batch = batch
        self._thread: threading.Thread | None = None
        self.refused = Refused()
        self.failure: BaseException | None = None

    @property
    def is_answered(self) -> bool:
        """Whether all of it arrived; what was refused has to be so once more, to become a dead letter."""
        return self.failure is None and not self.refused.letters

    def begin(self) -> None:
        self._thread = threading.Thread(target=self.make, name="mlflow-outbox-volley", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no threads left, or the interpreter is exiting: go on in this one
            self._thread = None
            self.make()

    def make(self) -> None:
        try:
            self._requests.make(self._record, self.batch, self.refused)
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            self.failure = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _is_of_known_metrics(batch: Batch, view: RunView) -> bool:
    return not (batch.params or batch.tags) and all(point.key in view.metrics for point in batch.points)
