"""Which experiments the journals of an outbox mention: all that a new process can know of one while the server is away.

A journal's header has the experiment's name, and the id is in the name of a room or in the event with which a run
begins. No more than that is read of a journal, and of none twice; the newest come first, because a program that is
started again goes on with what it did last, and an experiment may have been renamed since an older one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlflow_outbox.errors import CorruptSegment, NewerFormat
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import is_run_id
from mlflow_outbox.spool.events import RunStarted
from mlflow_outbox.spool.frame import unpack, unpack_header
from mlflow_outbox.spool.listing import SegmentFile, decoded, first_event, read_bytes

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.spool.events import Event

#: Bytes of a segment that are read at first: its header, which is there twice, and as a rule the event behind it.
_BEGINNING: Final = 8 * 1024


class Mentions:
    """The server's ids of experiments by their names, as far as journals on this disk have them.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._directory = outbox.directory
        #: When each experiment was mentioned last, by what name; by its id.
        self._names: dict[str, tuple[int, str]] = {}
        #: Runs and rooms that were read.
        self._read: set[str] = set()

    def of(self, name: str) -> Iterator[str]:
        """Yield the ids of experiments that had a name when they were mentioned last, the newest mention first."""
        known = sorted(((time, number) for number, (time, held) in list(self._names.items()) if held == name))
        yield from (number for _, number in reversed(known))
        for folder in self._unread():
            found = self._mention_in(folder)
            if found is None:
                continue
            number, time, held = found
            is_new = number not in self._names
            if is_new or self._names[number][0] < time:
                self._names[number] = time, held
            if is_new and held == name:
                yield number

    def _unread(self) -> Iterator[Path]:
        """Yield the directories of runs and rooms that were not read, the last changed first; each is read then."""
        found: list[tuple[int, str]] = []
        for parent in (self._directory.runs, self._directory.delivered):
            try:
                with os.scandir(parent) as entries:
                    found += [
                        (entry.stat(follow_symlinks=False).st_mtime_ns, entry.path)
                        for entry in entries
                        if entry.name not in self._read and is_run_id(entry.name)
                    ]
            except OSError:  # gone in this moment, or not readable: what the disk does not give is not known
                continue
        for _, path in sorted(found, reverse=True):
            yield Path(path)

    def _mention_in(self, folder: Path) -> tuple[str, int, str] | None:
        """Return the experiment that a run or room is for, when that was written and its name; None if none is named.

        What cannot be read, or is of a newer version, is for the worker to say; it is looked at again the next time.
        """
        is_room = provisional.is_room(folder.name)
        number = provisional.experiment_of(folder.name) if is_room else ""
        if is_room and (not number or provisional.is_provisional(number)):
            self._read.add(folder.name)
            return None
        try:
            paths = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".log")]
        except OSError:
            return None
        for path in paths:
            try:
                time, experiment, started = _beginning(path, with_event=not is_room)
            except (OSError, CorruptSegment, NewerFormat):
                continue
            self._read.add(folder.name)
            number = number or (started.experiment_id if isinstance(started, RunStarted) else "")
            if provisional.is_provisional(number):
                return None
            # A name that was not known is not written, or the id stands in its place.
            if number and experiment not in {"", number}:
                return number, time, experiment
        return None


def _beginning(path: Path, *, with_event: bool) -> tuple[int, str, Event | str | None]:
    """Return when a segment was begun, for which experiment, and its first event if it begins a journal.

    Raises:
        OSError: it cannot be read.
        CorruptSegment: it has no header.
        NewerFormat: a newer version wrote it.
    """
    data = read_bytes(path, 0, _BEGINNING)
    header, body = unpack_header(data)
    event: Event | str | None = None
    if with_event and header.first_seq == 0:
        found = unpack(data, body, header.seed)
        event = decoded(found.payload) if found is not None else first_event(SegmentFile(path, header, body))
    return header.created_ms, header.experiment, event
