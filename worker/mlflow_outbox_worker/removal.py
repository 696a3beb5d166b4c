"""Deleting a run of which nothing is needed any more, so that no half of it is ever taken for a run.

Deleting a directory takes one system call for each file, and a kill may come between any two. So the directory first
gets a name that no run has, in one step, and what a kill leaves under such a name is deleted by the next round.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox.spool.directory import OutboxDirectory

#: Begins the names; shorter than most runs' own, so that a directory that is full has room for it.
_GONE: Final = ".gone-"
#: What a disk says that is full, of bytes or of names, and one of which a user has had his share.
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def remove_run(path: Path) -> None:
    """Delete a run's directory in ``delivered``, or one of ``leftovers``.

    Raises:
        OSError: something of it cannot be deleted. Where it has its other name already, it is one of the leftovers.
    """
    aside = path
    if not path.name.startswith(_GONE):
        aside = path.with_name(f"{_GONE}{secrets.token_hex(6)}")
        try:
            os.rename(path, aside)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            aside = path  # a full disk may have no room for a name, and this makes some
    shutil.rmtree(aside)


def leftovers(directory: OutboxDirectory) -> list[Path]:
    """Return what is left of runs whose deletion was begun.

    Raises:
        OSError: what is there cannot be listed.
    """
    try:
        names = sorted(name for name in os.listdir(directory.delivered) if name.startswith(_GONE))
    except FileNotFoundError:
        return []
    return [directory.delivered / name for name in names]


def sweep(directory: OutboxDirectory, failed: Callable[[OSError], None]) -> None:
    """Delete what is left of runs whose deletion was begun.

    Args:
        directory: the outbox, whose lease is held.
        failed: told of each that cannot be deleted; the others are all the same.

    Raises:
        OSError: what is there cannot be listed.
    """
    for path in leftovers(directory):
        try:
            with contextlib.suppress(FileNotFoundError):  # another thread deletes it just now
                remove_run(path)
        except OSError as error:
            failed(error)
