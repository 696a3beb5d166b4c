"""The size of an outbox, as the last process that walked through it found it: for the others that write to it.

Without it each of many processes walked through the outbox for itself: 256 that logged to one, with a run each, kept
two processors busy with nothing else. The file is called ``size`` and holds one line of 72 bytes,

    used free took at crc

in decimal, the bytes of the outbox, those free on its disk, the microseconds of the walk, the wall-clock milliseconds
since the epoch when it began, and the CRC-32 of all that in hexadecimal. Its length never changes, so that writing it
takes no room of a full disk. It is a hint: a line that is damaged, of the future or too old is as good as none, and
nobody waits for another's.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.spool.private import read_regular

_NAME: Final = "size"
_LINE: Final = re.compile(rb"(\d{18}) (\d{18}) (\d{10}) (\d{13}) ([0-9a-f]{8})\n", re.ASCII)
#: The largest that fit into the line.
_BYTES, _MICROSECONDS, _MILLISECONDS = 10**18 - 1, 10**10 - 1, 10**13 - 1


class Measurement(NamedTuple):
    """What a walk through an outbox found.

    Attributes:
        used: bytes of all its files.
        free: bytes free on its disk when it was asked for.
        took: seconds of the walk.
        at: wall-clock seconds since the epoch when it began.
    """

    used: int
    free: int
    took: float
    at: float


def read(outbox: Path) -> Measurement | None:
    """Return the last measurement of an outbox by any process, None when there is none to be trusted."""
    try:
        found = _LINE.fullmatch(read_regular(outbox / _NAME))
    except (OSError, OutboxUnusable):
        return None
    if found is None or zlib.crc32(found[0][:-9]) != int(found[5], 16):
        return None
    used, free, took, at = map(int, found.groups()[:4])
    return Measurement(used, free, took / 1e6, at / 1e3)


def write(outbox: Path, measured: Measurement) -> bool:
    """Tell the others of a measurement; return whether the file system took it."""
    line = b"%018d %018d %010d %013d " % (
        min(measured.used, _BYTES),
        min(measured.free, _BYTES),
        min(int(measured.took * 1e6), _MICROSECONDS),
        min(max(0, int(measured.at * 1e3)), _MILLISECONDS),
    )
    try:
        fd = os.open(outbox / _NAME, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.pwrite(fd, line + b"%08x\n" % zlib.crc32(line), 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
