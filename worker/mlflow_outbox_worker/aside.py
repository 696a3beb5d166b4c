"""Questions whose answer nothing else sets a time to: each is put in a thread that may be left to itself.

The driver of a database that has a server waits for as long as the connection lasts, and the Databricks SDK looks for
the workspace for five minutes, whatever they are told.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from mlflow_outbox import stopwatch
from mlflow_outbox_worker.sink import SinkError

T = TypeVar("T")

#: Schemes whose clients keep to the time that they are given.
_PUNCTUAL: Final = frozenset({"http", "https", "sqlite", "file"})
#: Questions that are under way at most; some may never have an answer.
_MOST: Final = 16

_slots = threading.Semaphore(_MOST)


def _after_fork_in_child() -> None:
    global _slots  # noqa: PLW0603 - the child's own: threads that have some are not there
    _slots = threading.Semaphore(_MOST)


os.register_at_fork(after_in_child=_after_fork_in_child)


def is_needed(scheme: str) -> bool:
    """Return whether nothing else ends the wait for what is asked of a destination with this scheme."""
    return scheme not in _PUNCTUAL


def ask(question: Callable[[], T], timeout: float) -> T:
    """Put a question, and wait so many seconds for its answer; one that comes later is for nobody.

    Raises:
        SinkError: there was none in time, or too many others have none yet.
    """
    end = stopwatch.seconds() + timeout
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()
    slots = _slots

    def put() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)
        finally:
            slots.release()

    if slots.acquire(timeout=timeout):
        try:
            threading.Thread(target=put, name="mlflow-outbox-question", daemon=True).start()
        except RuntimeError:  # no threads left, or the interpreter is about to end
            slots.release()
        else:
            concurrent.futures.wait([answer], max(0.0, end - stopwatch.seconds()))
    if answer.done():
        return answer.result()
    msg = "it has not answered in time"
    raise SinkError(msg, kind="timeout")
