"""Is an outbox sound? Looks at its directory, journals, ledger and destination, and mends what is safe to mend.

What is mended: modes that let others in, drafts of copies whose writers died, and a ledger that needs to be opened
and brought into its main file by a worker. Never mended: bytes of a journal. What is damaged in them is named, and
delivery passes around it, keeping it in ``quarantine``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.frame import SEQUENCE_MASK
from mlflow_outbox.spool.guard import used_bytes
from mlflow_outbox.spool.listing import Broken
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor, unread
from mlflow_outbox_worker import dbfile
from mlflow_outbox_worker.database import Reader
from mlflow_outbox_worker.host_lease import described, lease_of, worker_of
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.room import bytes_that_may_go
from mlflow_outbox_worker.wording import count, quoted, size

#: Events read at once.
_WINDOW: Final = 20_000
#: Seconds after which a draft is one whose writer died; a copy of many gigabytes changes its draft all the time.
_STALE_DRAFT: Final = 3600.0
#: Damaged places of one run that are named one by one.
_NAMED: Final = 5

#: "ok"; "note": no harm; "mended"; "bad": a person should act; "away": the destination is; "parked": it refuses.
Level = Literal["ok", "note", "mended", "bad", "away", "parked"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: "directory", "journals", "ledger", "worker" or "destination".
        text: one sentence.
    """

    level: Level
    about: str
    text: str


def check_modes(path: Path, *, repair: bool) -> Iterator[Finding]:
    """Look for files and directories that others can get at; before an outbox is opened, which would be refused.

    Args:
        path: the outbox.
        repair: take the rights of others away.
    """
    open_ones: list[str] = []
    try:
        for parent, folders, names in os.walk(path):
            for entry in [parent, *(os.path.join(parent, name) for name in names)]:
                with contextlib.suppress(FileNotFoundError):  # moved or reclaimed meanwhile
                    found = os.stat(entry, follow_symlinks=False)
                    if stat.S_ISLNK(found.st_mode):
                        yield Finding(
                            "bad", "directory", f"{entry} is a symbolic link, which is never followed; remove it"
                        )
                    elif found.st_uid != os.geteuid():
                        yield Finding(
                            "bad", "directory", f"{entry} belongs to user {found.st_uid}; remove it or give it back"
                        )
                    elif found.st_mode & 0o077:
                        open_ones.append(entry)
            for name in [name for name in folders if os.path.islink(os.path.join(parent, name))]:
                yield Finding(
                    "bad",
                    "directory",
                    f"{os.path.join(parent, name)} is a symbolic link, which is never followed; remove it",
                )
    except OSError as error:
        yield Finding("bad", "directory", f"{path} cannot be read: {error.strerror or error}")
        return
    if not open_ones:
        yield Finding("ok", "directory", "only you can enter it")
        return
    some = f"{open_ones[0]}" + (f" and {len(open_ones) - 1:,} more" if len(open_ones) > 1 else "")
    if not repair:
        yield Finding("bad", "directory", f"others can get at {some}; mend it with --repair")
        return
    for entry in open_ones:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # never through a link
            try:
                with contextlib.suppress(OSError):  # what some file systems say that keep no modes; others say nothing
                    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & 0o700)
                is_closed = not os.fstat(fd).st_mode & 0o077
            finally:
                os.close(fd)
            if not is_closed:
                sends = f"mlflow-outbox replay {quoted(path)} sends its runs, and only reads them"
                yield Finding("bad", "directory", f"others can get at {entry} whatever mode is set there; {sends}")
                return
    yield Finding("mended", "directory", f"others cannot get at {some} any more")


def check_outbox(
    directory: OutboxDirectory, settings: Settings, *, repair: bool, now: float | None = None
) -> Iterator[Finding]:
    """Look at everything of an outbox but its destination.

    Args:
        directory: the outbox.
        settings: its limits, and where its ledger is.
        repair: mend what is safe to mend.
        now: wall-clock seconds since the epoch; None is now.
    """
    yield from _space(directory, settings)
    yield from _drafts(directory, repair=repair, now=time.time() if now is None else now)
    holder = worker_of(directory)
    yield Finding(
        "ok", "worker", f"{described(holder)} delivers" if holder is not None else "nobody delivers at present"
    )
    path = directory.ledger_in(settings.ledger_dir)
    if repair:
        yield from _mend_ledger(directory, path)
    records: dict[str, RunRecord] = {}
    yield from _ledger(directory, path, records)
    yield from _journals(directory, records)


def _space(directory: OutboxDirectory, settings: Settings) -> Iterator[Finding]:
    used = used_bytes(directory)
    found = os.statvfs(directory.path)
    free = found.f_bavail * found.f_frsize
    if free < settings.free_bytes and found.f_blocks:
        yield Finding(
            "bad",
            "directory",
            f"{size(free)} are free there and free_bytes keeps {size(settings.free_bytes)}: new events are refused",
        )
    elif used >= settings.outbox_bytes:
        yield Finding(
            "bad",
            "directory",
            f"it holds {size(used)} and outbox_bytes allows {size(settings.outbox_bytes)}: new events are refused",
        )
    else:
        yield Finding("ok", "directory", f"it holds {size(used)}, {size(free)} are free")
    if directory.network:
        yield Finding("note", "directory", f"it is on a network file system; the ledger is in {directory.ledger}")
    with contextlib.suppress(FileNotFoundError):
        number = len(os.listdir(directory.quarantine))
        if number:
            yield Finding(
                "note", "directory", f"{count(number, 'damaged piece')} of journals kept in {directory.quarantine}"
            )


def _drafts(directory: OutboxDirectory, *, repair: bool, now: float) -> Iterator[Finding]:
    stale: list[Path] = []
    places = [directory.path]
    for parent, ids in ((directory.runs, directory.run_ids()), (directory.delivered, directory.delivered_ids())):
        places += [parent / run_id / "files" for run_id in ids]
    for place in places:
        with contextlib.suppress(OSError):
            for name in os.listdir(place):
                if not name.startswith((".draft-", ".outbox.json-", ".host.lease-")):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if now - os.stat(place / name, follow_symlinks=False).st_mtime > _STALE_DRAFT:
                        stale.append(place / name)
    if not stale:
        return
    if not repair:
        yield Finding(
            "note", "directory", f"{count(len(stale), 'draft')} left by programs that died; --repair removes such"
        )
        return
    for path in stale:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    yield Finding("mended", "directory", f"{count(len(stale), 'draft')} of programs that died removed")


# -- the ledger


def _mend_ledger(directory: OutboxDirectory, path: Path) -> Iterator[Finding]:
    """Open the ledger as a worker does, which sets a damaged one aside, and bring it into its main file."""
    lease = lease_of(directory, "command")
    if not lease.acquire():
        yield Finding("ok", "ledger", "it is left to the worker that has it open")
        return
    try:
        said: list[str] = []
        with contextlib.closing(Ledger.open(path, report=said.append)) as ledger:
            whole = ledger.checkpoint()
        for text in said:
            yield Finding("mended", "ledger", text)
        if not whole:
            yield Finding("note", "ledger", "somebody reads it, so it was not brought into its main file; try again")
    except (LedgerUnavailable, OutboxUnusable) as error:
        yield Finding("bad", "ledger", str(error))
    finally:
        lease.release()


def _ledger(directory: OutboxDirectory, path: Path, records: dict[str, RunRecord]) -> Iterator[Finding]:
    try:
        if "" not in dbfile.look(path):
            yield Finding("ok", "ledger", "there is none yet; the first delivery makes it")
            return
        for (found,) in Reader(path, 5.0).query("PRAGMA integrity_check(5)"):
            if found != "ok":
                yield Finding(
                    "bad",
                    "ledger",
                    f"its database is damaged ({found}); --repair sets it aside, and it is rebuilt from the journals",
                )
                return
        with contextlib.closing(Ledger.open(path, read_only=True)) as ledger:
            records.update({record.run_id: record for record in ledger.records()})
            letters, delivered = sum(1 for _ in ledger.dead_letters()), 0
            bad = ledger.quarantined_rows
            with contextlib.suppress(OSError):  # moved or reclaimed meanwhile
                delivered = bytes_that_may_go(directory, ledger)
    except (LedgerUnavailable, OutboxUnusable) as error:
        yield Finding("bad", "ledger", f"{error}; try --repair when no worker runs")
        return
    yield Finding("ok", "ledger", f"it knows {count(len(records), 'run')} and {count(letters, 'dead letter')}")
    if delivered:
        yield Finding("ok", "directory", f"{size(delivered)} of it are delivered: gc gives them back, and want of room")
    if bad:
        yield Finding(
            "note",
            "ledger",
            f"{count(bad, 'damaged row')} of it kept aside; what was said there is rebuilt from the journals",
        )
    with contextlib.suppress(OSError):
        aside = sorted(name for name in os.listdir(path) if ".corrupt-" in name and not name.endswith(("-wal", "-shm")))
        if aside:
            yield Finding("note", "ledger", f"damaged databases are kept beside it: {', '.join(aside[:5])}")


# -- the journals


def _journals(directory: OutboxDirectory, records: dict[str, RunRecord]) -> Iterator[Finding]:
    runs = dict.fromkeys([*directory.run_ids(), *directory.delivered_ids()])
    events = segments = 0
    sound = True
    for run_id in runs:
        reader = RunReader(directory.run(run_id), directory.delivered / run_id)
        record = records.get(run_id)
        found = _Journal(reader, record.cursors if record is not None else {})
        try:
            found.read()
        except OSError as error:  # the others are read all the same
            sound = False
            yield Finding("bad", "journals", f"run {run_id} cannot be read: {printable(error, 300)}")
        events += found.events
        segments += found.segments
        for finding in found.findings(run_id):
            sound = sound and finding.level != "bad"
            yield finding
    if sound:
        yield Finding(
            "ok",
            "journals",
            f"{count(events, 'event')} in {count(segments, 'segment')} of {count(len(runs), 'run')} are intact",
        )


class _Journal:
    """The journals of one run, read through.

    Args:
        reader: of all its directories.
        cursors: how far each writer was delivered.
    """

    def __init__(self, reader: RunReader, cursors: dict[str, Cursor]) -> None:
        self._reader = reader
        self._cursors = cursors
        self.events = 0
        self.segments = 0
        self._missing = 0
        self._broken: list[Broken] = []
        self._ahead: list[Path] = []
        #: Byte offsets up to which segments were delivered.
        self._delivered: dict[Path, int] = {}

    def read(self) -> None:
        """Read everything."""
        held_by = self._reader.segments()
        self.segments = sum(len(held) for held in held_by.values())
        for writer, held in held_by.items():
            first, cursor = held[0].header, self._cursors.get(writer, Cursor())
            here = [segment for segment in held if segment.header.ordinal == cursor.ordinal]
            if not here or writer not in self._cursors:
                # Reclaimed segments are no gap: what they held is behind the cursor.
                gap = (first.first_seq - cursor.seq) & SEQUENCE_MASK
                self._missing += gap if gap < 1 << 31 else 0
            for segment in here:
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(segment.path).st_size < cursor.offset:
                        self._ahead.append(segment.path)
            if writer in self._cursors:
                passed = held[: len(held) - len(unread(held, cursor))]
                self._delivered.update(dict.fromkeys((segment.path for segment in passed), sys.maxsize))
                self._delivered.update(dict.fromkeys((segment.path for segment in here), cursor.offset))
        at = {writer: Cursor(held[0].header.ordinal, 0, held[0].header.first_seq) for writer, held in held_by.items()}
        try:
            self._read_events(at)
        except OSError:
            if not self._reader.bad_headers():  # which say of which file
                raise
        self._broken += self._reader.bad_headers()

    def _read_events(self, at: dict[str, Cursor]) -> None:
        while True:
            window = self._reader.window(at, points=_WINDOW, items=_WINDOW)
            self.events += len(window.events)
            self._missing += window.missing
            self._broken += window.broken
            if not window.more:
                break
            at = window.cursors

    def findings(self, run_id: str) -> Iterator[Finding]:
        """Yield what is wrong."""
        for broken in self._broken[:_NAMED]:
            yield Finding(self._level(broken), "journals", f"{broken.path}: {_in_words(broken)}")
        rest = self._broken[_NAMED:]
        if rest:
            worst: Level = "bad" if any(self._level(broken) == "bad" for broken in rest) else "note"
            yield Finding(worst, "journals", f"run {run_id}: {count(len(rest), 'more damaged place')}")
        if self._missing:
            verb = "is" if self._missing == 1 else "are"
            text = f"run {run_id}: {count(self._missing, 'event')} must have existed and {verb} not there"
            yield Finding("bad", "journals", text)
        for path in self._ahead:
            yield Finding(
                "bad", "journals", f"{path} is shorter than what was delivered of it: it was cut off or replaced"
            )

    def _level(self, broken: Broken) -> Level:
        """Return how bad it is: a torn end is what a crash leaves, and what was passed is in quarantine."""
        if broken.kind in {"torn", "unknown", "newer"}:
            return "note"
        return "note" if broken.start < self._delivered.get(broken.path, 0) else "bad"


def _in_words(broken: Broken) -> str:
    where = f"bytes {broken.start:,} to {broken.end:,}"
    return {
        "torn": f"{where} are the beginning of an event whose writer died; everything before it is intact",
        "corrupt": f"{where} are damaged; delivery sets them aside and goes on behind them",
        "header": f"its beginning is damaged ({broken.reason}), so it is not read; keep it for a person to look at",
        "unread": f"the disk does not give it ({broken.reason}); its run waits for it: see to the disk, or its rights",
        "newer": f"a newer version wrote it ({broken.reason})",
        "unknown": f"{where} are {broken.reason}; upgrade mlflow-outbox",
    }.get(broken.kind, broken.reason)
