"""Rest for the stores that are not used: no thread, no connection, no open segment until the next call.

MLflow keeps a store for as long as the process lives, and a test-suite or a sweep may make one for each of a hundred
databases. A store is put to rest when everything that it logged was delivered and it was not used for ``idle_timeout``
seconds; of the stores that fulfil the first but not the second, only those few stay awake that were used last. What
cannot be delivered now keeps its worker, which goes on trying.

One thread does it for all stores of a process. It ends when all of them rest, and a store that is used again starts it.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Final

from mlflow_outbox import stopwatch

if TYPE_CHECKING:
    from mlflow_outbox.plugin.base import Base

#: Seconds between two looks at the stores, and how long a store is not used at the least when it is put to rest.
_LOOK: Final = 1.0
#: Stores that stay awake although they have nothing to do, until their time is over.
_AWAKE: Final = 8
#: Seconds for the last delivery of a store: it has nothing left but the ends of its segments.
_LAST: Final = 5.0
#: Looks after one at which a store could not be put to rest: doubled each time, up to so many.
_MOST_LOOKS: Final = 64


class Pulse:
    """When one store was used last, and whether it rests.

    Args:
        store: the store.
    """

    def __init__(self, store: Base) -> None:
        self._store = weakref.ref(store)
        self.used = stopwatch.seconds()
        self.rests = False
        self._wait = 1
        self._skip = 0

    def begin(self) -> None:
        """Look after the store from now on; to be called once it is made as a whole."""
        _watched.add(self)
        _start()

    def beat(self) -> None:
        """Take notice that the store is used."""
        self.used = stopwatch.seconds()
        if self.rests:
            self.rests, self._wait, self._skip = False, 1, 0
            _start()

    def try_to_rest(self) -> None:
        """Put the store to rest if it can be."""
        self._skip -= 1
        store = self._store()
        if store is None or self._skip > 0:
            return
        used = self.used
        self.rests = store.rest(_LAST)
        if self.used != used:  # in this order: whoever uses it notes the time first, and looks whether it rests then
            self.rests = False
        elif not self.rests:
            self._skip = self._wait
            self._wait = min(self._wait * 2, _MOST_LOOKS)

    def timeout(self) -> float:
        """Return the seconds after which the store may rest whatever the others do."""
        store = self._store()
        return store.outbox.settings.idle_timeout if store is not None else 0.0

    def is_gone(self) -> bool:
        """Return whether there is no store any more."""
        return self._store() is None


_watched: set[Pulse] = set()
_lock = threading.RLock()  # a signal handler may log while its thread is in here
_thread: threading.Thread | None = None
_ended = threading.Event()


def _start() -> None:
    global _thread  # noqa: PLW0603 - one thread of the process
    with _lock:
        if _thread is not None or sys.is_finalizing() or _ended.is_set():
            return
        thread = threading.Thread(target=_look, name="mlflow-outbox-rest", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no threads left: nothing can be put to rest, and nothing else is lost
            return
        _thread = thread


def _look() -> None:
    global _thread  # noqa: PLW0603 - one thread of the process
    while not _ended.wait(_LOOK):
        now = stopwatch.seconds()
        awake = sorted((one for one in list(_watched) if not one.rests), key=lambda one: one.used)
        for left, pulse in zip(range(len(awake), 0, -1), awake, strict=True):
            idle = now - pulse.used
            if idle >= pulse.timeout() or (left > _AWAKE and idle >= _LOOK):
                pulse.try_to_rest()
        with _lock:
            for pulse in [one for one in list(_watched) if one.is_gone()]:  # a list: stores are made without this lock
                _watched.discard(pulse)
            if all(one.rests for one in list(_watched)):
                _thread = None  # who wakes up from now on starts another, and waits for this lock before
                return


def end() -> None:
    """Put nothing to rest any more: the process is about to end."""
    _ended.set()


def _after_fork_in_child() -> None:
    global _thread, _lock  # the child's own: the thread, and who may have held the lock, are not there
    _thread, _lock = None, threading.RLock()
    for pulse in _watched:
        pulse.rests = True  # the parent has its threads and connections; where the child uses it, it is looked after


os.register_at_fork(after_in_child=_after_fork_in_child)
