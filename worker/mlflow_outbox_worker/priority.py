"""How a process of ours stands back behind the experiment, which may want every processor there is.

A process that wakes up for an event would by the kernel's rules often take the processor from whoever is computing
on it. One of the class SCHED_BATCH does not: it waits until there is room, a few milliseconds at most, and its share
is then the same. Its niceness makes that share about a quarter of the experiment's where processors are short.
Neither needs a privilege. What the process starts inherits both.

Not for the threads of an experiment's own process: one that held the interpreter's lock while it waited for a processor
would hold up the rest.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

#: Steps of niceness; each makes the share of a contended processor about 1.25 times smaller.
_NICENESS: Final = 5


def stand_back() -> None:
    """Let this process wait for its turn on the processors; where the system knows no such thing, nothing happens."""
    with contextlib.suppress(AttributeError, OSError):  # no such class here, or forbidden by a sandbox
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
