"""What a file needs that found no room: the program says so, and what is delivered gives way for the next such file.

A file that is larger than what the disk has free is refused before anything of it is copied, and the disk has as much
room as before: nothing shows the worker that there is need of any. So the program leaves the size in the file
``wanted`` of the outbox, 18 digits and a line break, and the worker takes that away when there is as much room, or when
no room can be made (``mlflow_outbox_worker.room``). A hint: one that cannot be written, or is old, is as good as none.
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
_MOST: Final = 10**18 - 1
#: Seconds after which nobody wants it any more.
_STALE: Final = 3600.0


def tell(outbox: Path, size: int) -> None:
    """Say that a file of so many bytes has found no room in an outbox."""
    with contextlib.suppress(OSError):
        fd = os.open(outbox / _NAME, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, b"%018d\n" % min(size, _MOST), 0)
        finally:
            os.close(fd)


def told(outbox: Path) -> int:
    """Return the bytes of the file that has found no room in an outbox last; 0 when there is none of late."""
    path = outbox / _NAME
    try:
        age = time.time() - os.stat(path, follow_symlinks=False).st_mtime
        found = _LINE.fullmatch(read_regular(path))
    except (OSError, OutboxUnusable):
        return 0
    return int(found[1]) if found is not None and age < _STALE else 0


def forget(outbox: Path) -> None:
    """Take away what was said of an outbox."""
    with contextlib.suppress(OSError):
        os.unlink(outbox / _NAME)
