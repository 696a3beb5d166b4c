"""Journals and segments for the tests of the spool: made, damaged and read back."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.run import Run
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import SystemDisk
from mlflow_outbox.spool.events import Artifact, Event, Metric, SegmentClosed, encode
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.listing import Broken
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.recovery import Cut, Damage, frames
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.testing import FailingDisk

if TYPE_CHECKING:
    import pytest

RUN = "a" * 32
#: Python 3.12 and later say on stderr that a fork beside threads may end in a deadlock; that it does not is the test.
FORKS = ("-W", "ignore:This process (pid=:DeprecationWarning")


def metric(number: int, key: str = "loss") -> Metric:
    """An event that tells its number: value and step are the same."""
    return Metric(key, float(number), 1_700_000_000_000 + number, number)


def open_files(below: Path) -> list[str]:
    """Return the files below a directory that this process has open; one that is closed meanwhile is none of them."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(str(below))]


def make_outbox(path: Path) -> OutboxDirectory:
    """An outbox of a server that nobody contacts."""
    return OutboxDirectory.create(path, resolve("http://127.0.0.1:9"), now_ms=1)


def make_journal(
    directory: OutboxDirectory, disk: SystemDisk | None = None, *, run: str = RUN, **given: Any
) -> Journal:
    """A journal without background sync; options of ``Settings`` and of ``Journal`` by name."""
    names = ("registry", "wake", "refuse", "clock_ms")
    extra = {name: given.pop(name) for name in names if name in given}
    counters = given.pop("counters", None) or Counters()
    return Journal(directory, RunIdentity(run, "exp"), Settings(**given), counters, disk=disk, **extra)


class Everything:
    """All that a reader finds in a run, read window by window.

    Attributes:
        events: of all writers, each writer's in order.
        by_writer: the same by writer.
        broken: damage met.
        missing: events that the numbers say are not there.
    """

    def __init__(
        self, path: Path, cursors: dict[str, Cursor] | None = None, *, settle: float = 60.0, **limits: int
    ) -> None:
        reader = RunReader(path, settle=settle)
        self.cursors = dict(cursors or {})
        self.by_writer: dict[str, list[Event]] = {}
        self.broken: list[Broken] = []
        self.missing = 0
        for _ in itertools.count():
            window = reader.window(self.cursors, **limits)
            for writer, event in window.events:
                self.by_writer.setdefault(writer, []).append(event)
            self.broken += window.broken
            self.missing += window.missing
            self.cursors = window.cursors
            self.live = window.live
            if not window.more:
                break
        self.broken += reader.bad_headers()
        self.numbers = reader.next_numbers()

    @property
    def events(self) -> list[Event]:
        """The events of all writers."""
        return [event for events in self.by_writer.values() for event in events]

    @property
    def steps(self) -> list[int]:
        """The steps of all metric events."""
        return [event.step for event in self.events if isinstance(event, Metric)]


def read(outbox: OutboxDirectory, run: str = RUN) -> Everything:
    """Everything in a run."""
    return Everything(outbox.run(run))


def header(**given: Any) -> frame.SegmentHeader:
    """A segment's header, as another boot of some machine wrote it."""
    values: dict[str, Any] = {"run_id": RUN, "experiment": "exp", "writer": "w" * 16, "ordinal": 0, "first_seq": 0}
    values |= {"seed": 0x12345678, "created_ms": 1_700_000_000_000}
    return frame.SegmentHeader(**(values | given))


def packed(events: Iterable[Event], head: frame.SegmentHeader, first: int | None = None) -> list[bytes]:
    """The frames of some events, numbered from the header's first number, or another."""
    begin = head.first_seq if first is None else first
    return [frame.pack(encode(event), begin + at, head.seed) for at, event in enumerate(events)]


def closing(number: int, head: frame.SegmentHeader, *, rotated: bool = False) -> bytes:
    """The closing frame of a segment whose next event would have a number."""
    return frame.pack(encode(SegmentClosed(rotated)), number, head.seed)


def write_segment(folder: Path, head: frame.SegmentHeader, frames: Iterable[bytes]) -> Path:
    """Write a segment as a writer that is gone has left it; return its path."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{head.writer}-{head.ordinal:06d}.log"
    path.write_bytes(frame.pack_header(head) + b"".join(frames))
    return path


class Written(NamedTuple):
    """The frames of a segment as they were written, the last of which may be its closing frame."""

    seed: int
    payloads: list[bytes]
    frames: list[bytes]
    ends: list[int]
    body: bytes


def written(payloads: Iterable[bytes], seed: int, first: int = 0) -> Written:
    """Frame some payloads, numbered from some number on."""
    held = list(payloads)
    made = [frame.pack(payload, number, seed) for number, payload in enumerate(held, first)]
    return Written(seed, held, made, list(itertools.accumulate(map(len, made))), b"".join(made))


def numbers(data: bytes, whole: Written, *, first: int = 0, final: bool = True) -> list[int]:
    """Numbers of the frames found in damaged data; each is checked to hold what was written under it.

    Frames and damage together are checked to cover every byte once and in order, unless more may be written.

    Args:
        data: bytes from some frame's beginning on.
        whole: what was written, before the damage.
        first: number of that frame.
        final: nothing will be appended.
    """
    at, found = 0, []
    for item in frames(data, 0, whole.seed, next_seq=first, final=final):
        assert not isinstance(item, Cut), "data that is complete was cut off"
        if isinstance(item, Damage):
            assert at == item.start, "bytes were passed over, or read twice"
        else:
            assert whole.payloads[item.seq] == item.payload, f"{item.seq}: a payload that was never written"
            found.append(item.seq)
        at = item.end
    assert at == len(data) or not final, "the end is neither event nor damage"
    return found


class Kit:
    """A run with all that is around it."""

    def __init__(self, path: Path, **given: Any) -> None:
        self.settings = Settings(**given)
        self.counters = Counters()
        self.disk = FailingDisk()
        self.outbox: OutboxDirectory = make_outbox(path)
        self.journal = make_journal(self.outbox, self.disk, counters=self.counters, **given)
        self.run = Run(self.journal, RUN, self.settings, self.counters)

    @property
    def events(self) -> list[Event]:
        """What the journal holds."""
        return Everything(self.outbox.run(RUN)).events

    def content(self, path: str) -> bytes:
        """The last content of an artifact."""
        found = [event for event in self.events if isinstance(event, Artifact) and event.path == path]
        data = (self.outbox.run(RUN) / "files" / found[-1].sha256).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (found[-1].sha256, found[-1].size)
        return data


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said."""
    return [record.getMessage() for record in caplog.records]


class Mute(Exception):
    """An error that has no words."""

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


class AllShared(dict[int, bool]):
    """What is known of file systems where all are the network's: a test's directory is on one of them only."""

    def __contains__(self, device: object) -> bool:
        return True

    def __getitem__(self, device: int) -> bool:
        return True
