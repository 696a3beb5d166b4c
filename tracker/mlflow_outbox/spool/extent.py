"""How many bytes an outbox takes: a walk through all its directories, here or in a process of its own.

Each name and each file is a system call, for which the interpreter is given away and taken back. Beside a program that
logged every 0.2 ms, a walk through 10,000 runs took more than a minute instead of 0.2 s, and slowed half of the calls
down meanwhile. So this module is also a program that imports nothing of the package: ``python extent.py DIRECTORY``
prints the bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: The file that is kept to be given back when the disk is full, and no part of what the outbox takes; see ``reserve``.
RESERVE: Final = "reserve"
#: Runs that are walked in a few milliseconds, and bytes that the name of one takes in a directory.
_MANY: Final = 200
_NAME: Final = 80
#: Seconds for the other process; what calls itself Python may be something else.
_LONGEST: Final = 600.0
#: Bytes of its answer, at most: one number.
_ANSWER: Final = 64


def sizes(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yield the bytes of each file of an outbox, its reserve aside."""
    for folder, _, files in os.walk(path):
        for name in files:
            if name == RESERVE:
                continue
            try:
                size = os.stat(os.path.join(folder, name), follow_symlinks=False).st_size
            except OSError:
                continue
            yield size


def is_large(path: Path) -> bool:
    """Return whether a directory has so many entries, by what the file system says of it, that another process walks.

    Directories count their subdirectories as links (ext4, XFS, tmpfs) or grow with their names (ext4, Btrfs); where
    they do neither, nothing is known.
    """
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return found.st_nlink > _MANY or found.st_size > _MANY * _NAME


def measured_apart(path: str | os.PathLike[str]) -> int | None:
    """Return the bytes as another process counts them; None where none can be started."""
    import subprocess  # here, for only large outboxes need it, and it takes some milliseconds

    if not sys.executable or getattr(sys, "frozen", False):
        return None
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, os.fspath(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C is for the program
        )
    except OSError:
        return None
    with process.stdout as answer:  # type: ignore[union-attr]  # it is a pipe
        try:
            # Not to the end of the pipe, which a child that the program forks meanwhile holds open too.
            return int(os.read(answer.fileno(), _ANSWER)) if process.wait(_LONGEST) == 0 else None
        except (OSError, ValueError):
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


if __name__ == "__main__":
    os.nice(10)
    sys.stdout.write(str(sum(sizes(sys.argv[1]))))
