"""What programs refused and lost, written down beside their events for whoever looks at the outbox from outside.

A refused event is nowhere, so only the program that refused it can tell; its counters end with it. So each program
that has refused something keeps one small file, ``refused/<token>.json``, counts by reason, written in the background
and at its end, never by a logging call. A program that refuses nothing writes nothing. On a disk without room the file
comes when there is some again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from mlflow_outbox.counters import Counters
from mlflow_outbox.living import Living
from mlflow_outbox.spool.private import create_private, make_private, read_regular

_FOLDER: Final = "refused"
_COUNTED: Final = ("refused", "lost")
#: Seconds after which what was refused is of no interest any more.
_KEPT: Final = 30 * 24 * 3600.0

_decoder = msgspec.json.Decoder(dict[str, int])


class Tally:
    """Writes down what one process refuses and loses.

    Args:
        outbox: its directory.
        counters: of the process.
    """

    def __init__(self, outbox: Path, counters: Counters) -> None:
        self._folder = outbox / _FOLDER
        self._counters = counters
        self._inherited: Counter[str] = Counter()
        self._noted: dict[str, int] = {}
        self._pid, self._token = os.getpid(), secrets.token_hex(8)
        _tallies.add(self)

    def __repr__(self) -> str:
        return f"<Tally of process {self._pid}: {self._noted}>"

    def forked(self) -> None:
        """Begin anew in a forked child, which has its parent's counts in its own."""
        self._counters.renew_lock()
        self._inherited, self._noted = Counter(self._counters.snapshot()), {}
        self._pid, self._token = os.getpid(), secrets.token_hex(8)

    def note(self) -> None:
        """Write the counts down when they have changed; where that is not possible now, the next call does it."""
        found = {
            reason: number - self._inherited[reason]
            for reason, number in self._counters.snapshot().items()
            if reason.startswith(_COUNTED) and number > self._inherited[reason]
        }
        if found == self._noted:
            return
        with contextlib.suppress(OSError):
            if not self._noted:
                make_private(self._folder)
                self._remove_old()
            draft = self._folder / f".{self._token}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            with os.fdopen(create_private(draft), "wb") as file:
                file.write(msgspec.json.encode(found))
            os.replace(draft, self._folder / f"{self._token}.json")
            self._noted = found

    def _remove_old(self) -> None:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - _KEPT:
                        os.unlink(entry.path)


#: All tallies of this process.
_tallies: Living[Tally] = Living()


def _after_fork_in_child() -> None:
    for tally in _tallies.members():
        tally.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


def refused(outbox: Path) -> dict[str, int]:
    """Return what programs have refused and lost lately, by reason.

    Args:
        outbox: its directory.
    """
    total: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for name in os.listdir(outbox / _FOLDER):
            if name.endswith(".json"):
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    total.update(_decoder.decode(read_regular(outbox / _FOLDER / name)))
    return dict(total)
