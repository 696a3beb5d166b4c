"""Where a logging call has put a file itself, besides handing it over for delivery: a directory of this machine.

Programs open what they have logged to a directory, and may go on writing to it there, as they may without an outbox.
So a call puts the file in its place before it appends the event, and the event says so. What a worker finds in such a
place is the file, or what the program made of it later, in a call or by itself; in either case it stays.

That holds while the machine runs. A power cut can take what was in a place, and a worker in another container or on
another machine sees other directories. So the event names the boot and the directory. Where these are not the same, the
worker compares contents, and makes good what differs unless the journal has a later content of the file.
"""

from __future__ import annotations

import os

from mlflow_outbox.spool.writer import boot_id


def identity(folder: str | os.PathLike[str]) -> str:
    """Return what tells a directory from all others until the next boot; "" where that cannot be told."""
    boot = boot_id()
    try:
        found = os.stat(folder)
    except OSError:
        return ""
    return f"{boot}:{found.st_dev}:{found.st_ino}" if boot else ""


def is_recent(placed: str) -> bool:
    """Return whether a directory was named under the present boot of this machine."""
    boot = boot_id()
    return bool(boot) and placed.startswith(f"{boot}:")
