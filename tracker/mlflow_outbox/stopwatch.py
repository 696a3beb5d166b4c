"""The clock by which everything here waits, as long as it said it would.

Tests of a program may stop its clocks. freezegun puts a function of its own in the place of ``time.monotonic``, in all
modules: a flush that waits for a server would never be over, and a pause that ends at a time of such a clock would not
end for decades of the real one. ``time.clock_gettime`` is left alone. Times *of events* are asked of ``time.time_ns``,
which may well be stopped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final

#: Return seconds of a clock that never goes back, since a moment that says nothing.
seconds: Final[Callable[[], float]] = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
#: Return seconds of processor time that the calling thread has used: what others wait for the interpreter is not in it.
processor_seconds: Final[Callable[[], float]] = functools.partial(time.clock_gettime, time.CLOCK_THREAD_CPUTIME_ID)
