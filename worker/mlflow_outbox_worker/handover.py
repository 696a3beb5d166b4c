"""Delivery for a program that has imported MLflow: in its thread, and by a child process once there is much to deliver.

Such a program has paid for MLflow already, so that delivery in its own thread begins at once and takes no memory of its
own: right for most, which log some points a second. But each event costs the program's interpreter some 30 us there (a
loop of 0.2 ms steps with a metric in each took 1.47 times as long, 1.2 times with a worker process), in pieces of
milliseconds that its other threads wait for. So a program that has ``BUSY`` events delivered a second, over ``WINDOW``
seconds, which is more than a percent of its interpreter, gets a child process (``child``): 170 MB, and a second of one
processor for its start, behind the program's own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters

if TYPE_CHECKING:
    from mlflow_outbox_worker.child import Loop

#: Events a second, over so many seconds, that are left to a child.
BUSY: Final = 500.0
WINDOW: Final = 10.0


class Load:
    """Tells whether much is delivered.

    Args:
        counters: in which delivered events are counted.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, counters: Counters, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._counters = counters
        self._clock = clock
        self._since, self._before = clock(), counters["delivered"]

    def is_high(self) -> bool:
        """Return whether so much was delivered since the last window began, if it is over."""
        now, delivered = self._clock(), self._counters["delivered"]
        seconds = now - self._since
        if seconds < WINDOW:
            return False
        rate = (delivered - self._before) / seconds
        self._since, self._before = now, delivered
        return rate >= BUSY


class Handover:
    """A loop that runs here until it leaves, and goes on elsewhere.

    Args:
        here: the loop that is left when there is much to deliver.
        elsewhere: makes the one after it; called in the thread.
        counters: where it is counted.
    """

    def __init__(self, here: Loop, elsewhere: Callable[[], Loop], counters: Counters) -> None:
        self._loop = here
        self._elsewhere = elsewhere
        self._counters = counters
        self._changing = threading.Lock()
        self._stopped = False

    def __repr__(self) -> str:
        return f"<Handover, now {self._loop!r}>"

    def run(self) -> None:
        """Deliver until stopped."""
        self._loop.run()
        with self._changing:
            if self._stopped:
                return
            self._loop = self._elsewhere()
        self._counters.add("deliveries_handed_over")
        self._loop.run()

    def wake(self) -> None:
        """Look for something new now."""
        self._loop.wake()

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether another process syncs these segments for this one; have it do so from now on."""
        return self._loop.syncs(segments)

    def stop(self) -> None:
        """Leave ``run`` soon."""
        with self._changing:
            self._stopped = True
            self._loop.stop()
