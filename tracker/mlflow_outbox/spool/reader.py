"""Reading the journals of one run: all its writers, from where reading stopped last time.

A reader never opens a file for writing, takes no lock that a writer could meet, and keeps no descriptor: it may run
in another process, on another machine, on read-only media, while the run is still being written. The segments of a
writer are read in the order of their first number (see ``window``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from mlflow_outbox.spool.disk import is_there
from mlflow_outbox.spool.events import Event, RunStarted
from mlflow_outbox.spool.frame import SegmentHeader
from mlflow_outbox.spool.listing import Broken, Listing, SegmentFile, first_event, number_behind
from mlflow_outbox.spool.window import Budget, Cursor, Window, WriterPass
from mlflow_outbox.spool.writer import is_closed, is_gone

E = TypeVar("E", bound=Event)


class RunReader:
    """Reads one run's directory, or several that together hold one run.

    Of files of one name the longest is read: segments are only ever appended to, so the others are older copies.

    Args:
        path: the run's directory.
        others: further directories with segments and files of the same run; a segment may move to a later one
            meanwhile.
        settle: seconds without growth after which a segment without a lock counts as left by its writer.
        whole: what precedes a writer's first segment is missing, not delivered before.
    """

    def __init__(self, path: Path, *others: Path, settle: float = 60.0, whole: bool = False) -> None:
        self.path = path
        self.paths = (path, *others)
        self._settle = settle
        self._whole = whole
        self._listing = Listing(self.paths)

    def segments(self) -> dict[str, list[SegmentFile]]:
        """Return the segments by writer, each writer's in reading order; see ``bad_headers`` for unreadable ones."""
        return self._listing.by_writer()

    def complete_segments(self) -> dict[str, list[SegmentFile]]:
        """Return the segments by writer, as ``segments`` does, if the disk gives them all.

        Raises:
            OSError: one cannot be read at present.
        """
        found = self.segments()
        for error in self._listing.unread.values():
            raise error
        return found

    def bad_headers(self) -> list[Broken]:
        """Return the files that ``segments`` could not use."""
        return list(self._listing.bad.values())

    def file(self, name: str) -> Path:
        """Return where a file of the run is, or would be; names come from ``is_digest``.

        Raises:
            OSError: the disk does not tell.
        """
        places = [folder / "files" / name for folder in self.paths]
        return next((place for place in places if is_there(place)), places[0])

    def started(self) -> tuple[RunStarted | None, SegmentHeader | None]:
        """Return how the run began, by its first writer that says so, and the header of its first segment."""
        first: SegmentHeader | None = None
        for held in self.segments().values():
            first = first or held[0].header
            if held[0].header.first_seq != 0:
                continue
            event = first_event(held[0])
            if isinstance(event, RunStarted) and not event.resumed:
                return event, held[0].header
        return None, first

    def first(self, kind: type[E]) -> E | None:
        """Return the first event of a kind with which a writer begins, or None."""
        for held in self.segments().values():
            if held[0].header.first_seq != 0:
                continue
            event = first_event(held[0])
            if isinstance(event, kind):
                return event
        return None

    def window(
        self,
        cursors: Mapping[str, Cursor],
        *,
        points: int = 1000,
        items: int = 2000,
        size: int = 4 * 1024 * 1024,
        after: str = "",
    ) -> Window:
        """Read events behind the cursors until there are enough for a few requests.

        Args:
            cursors: where to begin, by writer; a writer without one is read from its beginning.
            points: metric points to stop at.
            items: events to stop at.
            size: bytes to stop at.
            after: the writer that has used up the window before this one; the others have their turn first.

        Raises:
            OSError: a segment cannot be read at present. What is in it would be passed by for good.
        """
        budget = Budget(points, items, size)
        events: list[tuple[str, Event]] = []
        ends = dict(cursors)
        broken: list[Broken] = []
        begun: dict[str, int] = {}
        gaps: dict[str, list[tuple[int, int]]] = {}
        missing = 0
        live = waits = False
        last = ""
        for writer, held in self._in_turn(after):
            part = WriterPass(writer, held, ends.get(writer), budget, self._settle, self.paths, whole=self._whole)
            part.read()
            events += part.events
            broken += part.broken
            missing += part.missing
            gaps |= {writer: part.gaps} if part.gaps else {}
            live = live or part.live
            waits = waits or part.waits
            if part.cursor is not None:
                if writer not in ends:
                    begun[writer] = held[0].header.first_seq
                ends[writer] = part.cursor
            if budget.spent:
                last = writer
                break
        return Window(events, ends, broken, missing, budget.spent, live or budget.spent, last, begun, waits, gaps)

    def _in_turn(self, after: str) -> list[tuple[str, list[SegmentFile]]]:
        """Return the writers in the order in which they began, or, behind one that used up a window, by turns.

        Else one that writes faster than is delivered would keep the others' events back for as long as it does. One
        that writes no more will come to its end, and goes first: another may have gone on with the run from there.
        """
        writers = list(self.complete_segments().items())
        at = next((place for place, (writer, _) in enumerate(writers, 1) if writer == after), 0)
        if not at or len(writers) == 1:
            return writers
        ended = [writer for writer, held in writers if self._has_ended(held[-1])]
        first = [one for one in writers if one[0] in ended]
        return first + [one for one in writers[at:] + writers[:at] if one[0] not in ended]

    def _has_ended(self, last: SegmentFile) -> bool:
        return is_closed(last.path, last.header) or is_gone(last.path, last.header, self._settle)

    def each(self, kind: type[E], cursors: Mapping[str, Cursor]) -> Iterator[tuple[str, E]]:
        """Yield all (writer, event) pairs of a kind behind the cursors, of a writer in their order; see ``window``."""
        more = True
        while more:
            window = self.window(cursors, points=100_000, items=100_000)
            yield from ((writer, event) for writer, event in window.events if isinstance(event, kind))
            cursors, more = window.cursors, window.more

    def number_of(self, gaps: Mapping[str, list[tuple[int, int]]]) -> int:
        """Return how many of the events that are missing elsewhere are in the segments of this run.

        Args:
            gaps: as in a ``Window``.

        Raises:
            OSError: a segment cannot be read at present.
        """
        number = 0
        for writer, held in self.complete_segments().items():
            for segment, later in itertools.zip_longest(held, held[1:]):
                begin = segment.header.first_seq
                end = number_behind(segment, segment.body, begin) if gaps.get(writer) else begin
                end = end if later is None else min(end, later.header.first_seq)
                number += sum(max(0, min(end, at + many) - max(begin, at)) for at, many in gaps.get(writer, ()))
        return number

    def next_numbers(
        self,
        cursors: Mapping[str, Cursor] | None = None,
        segments: Mapping[str, list[SegmentFile]] | None = None,
    ) -> dict[str, int]:
        """Return, for every writer, the number that its next event will have; nothing is decoded.

        Args:
            cursors: where to begin counting; makes it faster, not different.
            segments: what ``complete_segments`` has just returned; None looks for them.

        Raises:
            OSError: a segment cannot be read at present.
        """
        result: dict[str, int] = {}
        for writer, held in (self.complete_segments() if segments is None else segments).items():
            last = held[-1]
            cursor = (cursors or {}).get(writer)
            seq, offset = last.header.first_seq, last.body
            if cursor is not None and cursor.ordinal == last.header.ordinal and cursor.offset > offset:
                seq, offset = cursor.seq, cursor.offset
            result[writer] = number_behind(last, offset, seq)
        return result
