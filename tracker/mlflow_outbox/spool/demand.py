"""What a program has no room for: it says so, and what is delivered gives way for the next such file, or event.

A file that is larger than what the disk has free is refused before anything of it is copied, and the disk has as much
room as before: nothing shows the worker that there is need of any. So the program leaves the size in the file
``wanted`` of the outbox, 18 digits and a line break, and the worker takes that away when there is as much room, or when
no room can be made (``mlflow_outbox_worker.room``). A hint: one that cannot be written, or is old, is as good as none.

Whoever delivers may be a service, or another program, with settings of its own. Where these allow the outbox more than
the program does, nothing would give way, and the program would refuse all events until the retention time is over. So
one that refuses events leaves what it allows, ``outbox_bytes`` and ``free_bytes`` in 18 digits each, in the file
``budget``, and for a day the worker keeps to that too.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Final

from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.spool.private import read_regular

_NAME: Final = "wanted"
_LINE: Final = re.compile(rb"(\d{18})\n", re.ASCII)
_BUDGET: Final = "budget"
_LIMITS: Final = re.compile(rb"(\d{18}) (\d{18})\n", re.ASCII)
_MOST: Final = 10**18 - 1
#: Seconds after which nobody wants it any more.
_STALE: Final = 3600.0
#: Seconds for which a program that refused events is expected to reach its limits again.
_HOLDS: Final = 24 * 3600.0


def tell(outbox: Path, size: int) -> None:
    """Say that a file of so many bytes has found no room in an outbox."""
    _write(outbox / _NAME, b"%018d\n" % min(size, _MOST))


def told(outbox: Path) -> int:
    """Return the bytes of the file that has found no room in an outbox last; 0 when there is none of late."""
    found = _read(outbox / _NAME, _LINE, _STALE)
    return int(found[1]) if found is not None else 0


def forget(outbox: Path) -> None:
    """Take away what was said of an outbox."""
    with contextlib.suppress(OSError):
        os.unlink(outbox / _NAME)


def tell_budget(outbox: Path, outbox_bytes: int, free_bytes: int) -> None:
    """Say what a program allows that refuses events for it: settings of its own."""
    _write(outbox / _BUDGET, b"%018d %018d\n" % (min(outbox_bytes, _MOST), min(free_bytes, _MOST)))


def told_budget(outbox: Path) -> tuple[int, int]:
    """Return the bytes that an outbox may take and those to be left free, by a program that refused events of late."""
    found = _read(outbox / _BUDGET, _LIMITS, _HOLDS)
    return (int(found[1]), int(found[2])) if found is not None else (_MOST, 0)


def _write(path: Path, line: bytes) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, line, 0)
        finally:
            os.close(fd)


def _read(path: Path, line: re.Pattern[bytes], stale: float) -> re.Match[bytes] | None:
    try:
        age = time.time() - os.stat(path, follow_symlinks=False).st_mtime
        return line.fullmatch(read_regular(path)) if age < stale else None
    except (OSError, OutboxUnusable):
        return None
