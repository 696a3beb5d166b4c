"""The ledger: what has been delivered, as what, and what went wrong. This docstring is its design.

The journal is the truth about what was logged; the ledger only says how far it has been delivered. It is kept in
diskcache, where the experiment never waits for it. ``database`` has the rules for using the file safely, ``dbfile``
those for the files on disk, ``rows`` and ``disk`` those for its rows. Nothing here is a pickle, and nothing is ever
evicted or expires.

What is stored
--------------
::

    key                  value                            written by
    run/<run id>         RunRecord, MessagePack map       commit
    view/<run id>        RunView, MessagePack map         commit
    remote/<MLflow id>   the run id, UTF-8                commit (follows RunRecord.remote_id)
    gone/<run id>        what ids need, MessagePack       retire, in place of record and view (``retired``)
    dead/<12 digits>     DeadLetter, MessagePack map      commit; the digits are its id, given in order and never again
    next/dead            the next such number, ASCII      commit
    settled/<12 digits>  DeadLetter, MessagePack map      settle_dead_letter: what a person dropped or replaced
    meta/<name>          bytes                            set_meta
    bad/<random>         a quarantined row's value        whoever finds it; its former columns are in the column "tag"

Each value is sealed with a checksum (``rows``). SQLite has none of its own in the main file, and a cursor with a
flipped bit would be a cursor that nobody ever committed.

What one transaction covers
---------------------------
``commit`` stores a run's record (with its cursors), its view, the reverse map and the dead letters of one window
**in one transaction**: either the window was delivered, folded into the view and its refusals kept, or none of it.
``forget`` removes record, view and reverse map in one; dead letters stay until they are dropped by name. ``retire``
puts a small row in the place of record and view, and adds what they counted to a sum, in one. One commit
is a few tens of kilobytes and does not wait for the disk (WAL, synchronous=NORMAL): a killed process loses nothing,
a power cut may take the newest commits, in whole transactions, from the end.

Going back in time is harmless
------------------------------
SQLite cuts its log silently at the first bad frame, a power cut takes unsynced commits, and a damaged file is
replaced by an empty one. So a ledger may be older than what it once said, without a word. Each thing it holds bears
that:

* **A cursor that is behind** makes the worker send events again that MLflow has. That changes nothing: the time
  stamps come from the journal, SQL stores keep equal points once, params and tags are the same, and other stores are
  reconciled through the run's history. A cursor *ahead* would lose events; nothing here ever makes one, and so a
  cursor is only committed after MLflow's answer.
* **A cursor that is not there** stands at the first segment that is there; earlier ones were reclaimed because they
  had been delivered.
* **A run id that is not known yet** is searched for in MLflow by the run's tag before anything is created.
* **A view** is folded again from the segments that are there, and MLflow has the rest; **the reverse map** is
  written again by the run's next commit.
* **A dead letter** of the lost time is refused by MLflow again and comes again, as long as its segment is there.

The last words are why ``checkpoint`` exists. **A segment may be unlinked only after ``checkpoint()`` has returned
True** since the commit that moved the cursor past it: then all of that is in the main file, and synced. Dead letters
of reclaimed segments, and only these, have no other copy; when the database is set aside they are in
``cache.db.corrupt-<n>``, which SQLite can open.

What is damaged is moved, not believed and not deleted
------------------------------------------------------
* A **row** that this module would not write (a pickle, a file name, an expiry time, other types), or that does not
  decode, is moved to ``bad/`` and is as if it had never been there. All rows are checked for their form when the
  ledger is opened, each is checked in full when it is read. ``quarantined_rows`` counts them.
* A **database** that is damaged, foreign, or has other settings raises LedgerCorrupt; opening it again sets it
  aside.
* A database that is **locked**, or a disk that fails or is full, raises LedgerUnavailable after ``timeout`` seconds
  with SQLite's own reason. Nothing was written; try again later.

What this module does not guess: it never mends a record, and never takes anything from a database that was set
aside.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from mlflow_outbox.counters import say
from mlflow_outbox.errors import OutboxError
from mlflow_outbox.views import RunView
from mlflow_outbox_worker import retired, rows
from mlflow_outbox_worker.database import Database, Reader
from mlflow_outbox_worker.dbconnection import Cache, LedgerCorrupt, Row
from mlflow_outbox_worker.disk import RowRefused
from mlflow_outbox_worker.records import DeadLetter, RunRecord

__all__ = ["Ledger", "LedgerCorrupt"]

#: Rows read at once by records(): short reads, so that a checkpoint never waits for one.
_RECORDS_PAGE: Final = 500
#: Rows read at once by dead_letters(): each may have a payload of 16 MiB.
_LETTERS_PAGE: Final = 16
#: Keys in one statement, of which SQLite takes 999 everywhere; all those of a run are in the same one.
_KEYS: Final = 900

_LETTER_COUNTS: Final = "SELECT tag, COUNT(*) FROM Cache WHERE key > ? AND key < ? AND raw = 1 GROUP BY tag"
_ROWIDS: Final = "SELECT rowid FROM Cache WHERE key > ? AND key < ? "

_encode = msgspec.msgpack.Encoder().encode
_T = TypeVar("_T")


class _Remote(msgspec.Struct):
    remote_id: str = ""


_remote_decoder = msgspec.msgpack.Decoder(_Remote)
_record_decoder = msgspec.msgpack.Decoder(RunRecord)
_view_decoder = msgspec.msgpack.Decoder(RunView)
_letter_decoder = msgspec.msgpack.Decoder(DeadLetter)


class Ledger:
    """What has been delivered; ``open`` makes it. All methods may be called from several threads.

    Every method raises LedgerUnavailable when the database cannot be used now, and LedgerCorrupt, which is one, when it
    is to be opened again.
    """

    def __init__(self, source: Database | Reader) -> None:
        self._source = source
        self._skipped: set[int] = set()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        timeout: float = 5.0,
        report: Callable[[str], object] = say,
        read_only: bool = False,
    ) -> Ledger:
        """Open the ledger of a directory; make it, or a new one beside a damaged one, as needed.

        Args:
            directory: the database's own directory; made with mode 0700 when it is missing.
            timeout: seconds to wait for a lock that another process holds.
            report: told in one sentence about each database that is set aside.
            read_only: for a process beside the worker: makes, mends and locks nothing; no database reads as empty.

        Raises:
            OutboxUnusable: the directory or a file in it cannot be made, or is not safe to use.
            LedgerUnavailable: the database is locked, or the disk fails.
        """
        directory = Path(os.path.abspath(directory))
        if read_only:
            return cls(Reader(directory, timeout))
        try:
            database, moved = cls._opened(directory, timeout, report)
        except LedgerCorrupt:  # which its first use has shown
            database, moved = cls._opened(directory, timeout, report)
        if moved:
            report(f"{moved} rows of the ledger in {directory} were not written by it; they were put aside unread")
        return cls(database)

    @staticmethod
    def _opened(directory: Path, timeout: float, report: Callable[[str], object]) -> tuple[Database, int]:
        database = Database.open(directory, timeout=timeout, report=report)
        try:
            with database.transaction() as cache:
                return database, rows.quarantine_all(cache)
        except BaseException:  # raised again: nobody would know of the database
            database.close()
            raise

    def record(self, run_id: str) -> RunRecord | None:
        """Return the delivery state of a run, or None; of a retired one, what is left of it."""
        return self.held((run_id,))[run_id][0]

    def held(
        self, run_ids: Iterable[str], *, views: bool = False
    ) -> dict[str, tuple[RunRecord | None, RunView | None]]:
        """Return what ``record`` and, if wanted, ``view`` do of several runs, each run's of one moment.

        For each statement a reader opens the file and checks it, which takes a millisecond.
        """
        ids = list(dict.fromkeys(run_ids))
        found = self._rows_of([key for run_id in ids for key in _keys_of(run_id, views=views)])
        return {run_id: (self._record_in(found, run_id), self._view_in(found, run_id)) for run_id in ids}

    def _record_in(self, found: dict[str, list[Row]], run_id: str) -> RunRecord | None:
        record = next(self._decoded(found.get(f"run/{run_id}", []), _record_decoder.decode), None)
        if record is not None:
            return record
        rest = found.get(retired.key_of(run_id), [])
        return next(self._decoded(rest, lambda value: retired.record_of(run_id, value)), None)

    def _view_in(self, found: dict[str, list[Row]], run_id: str) -> RunView | None:
        return next(self._decoded(found.get(f"view/{run_id}", []), _view_decoder.decode), None)

    def records(self) -> Iterator[RunRecord]:
        """Yield the delivery state of every run, by run id; each is whole, though not all are of one moment.

        Those of retired runs are not among them; their counts are in ``totals``.
        """
        for page in self._pages("run", _RECORDS_PAGE):
            yield from self._decoded(page, _record_decoder.decode)

    def view(self, run_id: str) -> RunView | None:
        """Return what a reader of a run sees of the events delivered so far, or None."""
        return next(self._decoded(self._rows_at(f"view/{run_id}"), _view_decoder.decode), None)

    def local_id(self, remote_id: str) -> str | None:
        """Return the id in this outbox of the run that has an id in MLflow, or None."""
        return next(self._decoded(self._rows_at(f"remote/{remote_id}"), bytes.decode), None)

    def commit(self, record: RunRecord, *, view: RunView | None = None, dead: Sequence[DeadLetter] = ()) -> None:
        """Store what one window of a run has come to, wholly or not at all.

        Args:
            record: replaces the run's record.
            view: replaces the run's view; None leaves it as it is.
            dead: new dead letters; each is given its id once it is stored.
        """
        encoded = _encode(record)
        encoded_view = None if view is None else _encode(view)
        numbers: list[int] = []
        with self._writing() as cache:
            self._map_remote(cache, record.run_id, record.remote_id)
            rows.put(cache, f"run/{record.run_id}", encoded)
            if encoded_view is not None:
                rows.put(cache, f"view/{record.run_id}", encoded_view)
            if dead:
                numbers = _add_letters(cache, dead)
        for letter, number in zip(dead, numbers, strict=True):
            letter.id = _letter_id(number)

    def forget(self, run_id: str) -> None:
        """Remove a run's record, view and reverse map; its dead letters stay."""
        with self._writing() as cache:
            self._map_remote(cache, run_id, "")
            for key in (f"run/{run_id}", f"view/{run_id}", retired.key_of(run_id)):
                rows.delete(cache, key)

    def retire(self, run_ids: Collection[str], is_gone: Callable[[str], bool]) -> int:
        """Keep of done runs only what their ids need and what was counted of them; return how many there were.

        Args:
            run_ids: the runs.
            is_gone: says of each, inside the transaction, whether still nothing of it is on disk.
        """
        with self._writing() as cache:
            return sum(is_gone(run_id) and retired.retire(cache, run_id) for run_id in run_ids)

    def expire(self, before: float, is_gone: Callable[[str], bool]) -> None:
        """Drop what is left of runs that were retired before a time in wall-clock seconds and that MLflow can name.

        Args:
            before: wall-clock seconds since the epoch.
            is_gone: as for ``retire``.
        """
        with self._database().guarded() as cache:
            ids = retired.old(cache, before)
        if ids:
            with self._writing() as cache:
                for run_id in filter(is_gone, ids):
                    retired.expire(cache, run_id)

    def totals(self) -> retired.Totals:
        """Return what was counted of all retired runs."""
        return retired.decoded_totals(self.meta("retired") or b"")

    def dead_letters(self, run_id: str | None = None) -> Iterator[DeadLetter]:
        """Yield dead letters in the order in which they were stored.

        Args:
            run_id: only those of this run; None means all.
        """
        for page in self._pages("dead", _LETTERS_PAGE, run_id):
            yield from self._decoded(page, _letter_decoder.decode)

    def dead_letter(self, letter_id: str) -> DeadLetter | None:
        """Return one dead letter, or None."""
        return next(self._decoded(self._rows_at(f"dead/{letter_id}"), _letter_decoder.decode), None)

    def drop_dead_letter(self, letter_id: str) -> bool:
        """Remove one dead letter for good; return whether there was one."""
        with self._writing() as cache:
            return rows.delete(cache, f"dead/{letter_id}")

    def dead_letter_counts(self) -> dict[str, int]:
        """Return how many dead letters each run has, without reading them."""
        return dict(self._source.query(_LETTER_COUNTS, ("dead/", "dead0")))

    def settle_dead_letter(self, letter: DeadLetter) -> bool:
        """Take one dead letter out of the queue for good; return whether it was there.

        It is remembered that a person did so: MLflow is not expected to hold its event.
        """
        encoded = _encode(letter)
        with self._writing() as cache:
            if not rows.delete(cache, f"dead/{letter.id}"):
                return False
            rows.put(cache, f"settled/{letter.id}", encoded, tag=letter.run_id)
            return True

    def settled_letters(self, run_id: str) -> Iterator[DeadLetter]:
        """Yield the dead letters of a run that a person has dropped or replaced."""
        for page in self._pages("settled", _LETTERS_PAGE, run_id):
            yield from self._decoded(page, _letter_decoder.decode)

    def meta(self, name: str) -> bytes | None:
        """Return the bytes stored under a name, or None."""
        return next(self._decoded(self._rows_at(f"meta/{name}"), bytes), None)

    def metas(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes stored under names, of those that there are."""
        found = self._rows_of([f"meta/{name}" for name in names])
        return {key.removeprefix("meta/"): value for key, held in found.items() for value in self._decoded(held, bytes)}

    def set_meta(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        with self._writing() as cache:
            rows.put(cache, f"meta/{name}", value)

    def checkpoint(self) -> bool:
        """Bring all that was committed so far into the main file, synced; segments may be unlinked only after True.

        False means that a reader was in the way: try again later.
        """
        return self._database().checkpoint()

    @property
    def quarantined_rows(self) -> int:
        """How many rows lie in quarantine or, read-only, were passed over; asks the database."""
        return len(self._source.query(_ROWIDS, ("bad/", "bad0"))) + len(self._skipped)

    def close(self) -> None:
        """Close the database; every later use finds it unavailable."""
        self._source.close()

    def _database(self) -> Database:
        if isinstance(self._source, Reader):
            msg = "the ledger was opened read-only"
            raise OutboxError(msg)
        return self._source

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Cache]:
        with self._database().transaction() as cache:
            yield cache

    def _map_remote(self, cache: Cache, run_id: str, remote_id: str) -> None:
        """Let the id in MLflow lead to the run, and a former one no longer."""
        ours, former, stored = run_id.encode(), "", rows.stored(cache, f"run/{run_id}")
        if stored is None:
            stored = rows.stored(cache, retired.key_of(run_id))
            if stored is not None:  # it goes on after all
                former = retired.record_of(run_id, stored).remote_id
                rows.delete(cache, retired.key_of(run_id))
        else:
            former = _remote_decoder.decode(stored).remote_id
        if former and former != remote_id and rows.stored(cache, f"remote/{former}") == ours:
            rows.delete(cache, f"remote/{former}")
        if remote_id and rows.stored(cache, f"remote/{remote_id}") != ours:
            rows.put(cache, f"remote/{remote_id}", ours)

    def _rows_at(self, key: str) -> list[Row]:
        return self._source.query(rows.COLUMNS + "WHERE key = ?", (key,))

    def _rows_of(self, keys: list[str]) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for start in range(0, len(keys), _KEYS):
            some = tuple(keys[start : start + _KEYS])
            for row in self._source.query(rows.COLUMNS + f"WHERE key IN ({','.join('?' * len(some))})", some):
                found.setdefault(row[1], []).append(row)
        return found

    def _pages(self, kind: str, size: int, tag: str | None = None) -> Iterator[list[Row]]:
        """Yield the rows of a kind in the order of their keys: one scan of the index, then so many rows at once."""
        bounds = (f"{kind}/", f"{kind}0")
        condition, arguments = ("", bounds) if tag is None else ("AND tag = ? ", (*bounds, tag))
        rowids = self._source.query(_ROWIDS + condition + "ORDER BY key", arguments)
        for start in range(0, len(rowids), size):
            chosen = tuple(rowid for (rowid,) in rowids[start : start + size])
            marks = ",".join("?" * len(chosen))
            sql = rows.COLUMNS + f"WHERE rowid IN ({marks}) AND key > ? AND key < ? ORDER BY key"
            yield self._source.query(sql, (*chosen, *bounds))

    def _decoded(self, found: list[Row], decode: Callable[[bytes], _T]) -> Iterator[_T]:
        """Yield what sound rows hold; move the others out of the way."""
        for row in found:
            try:
                sound = decode(rows.sound(row))
            except (RowRefused, ValueError, RecursionError):  # no MessagePack, no UTF-8, nested too deeply
                self._put_aside(row)
                continue
            yield sound

    def _put_aside(self, row: Row) -> None:
        if isinstance(self._source, Reader):
            self._skipped.add(row[0])
            return
        with self._writing() as cache:
            rows.quarantine(cache, row)


def _keys_of(run_id: str, *, views: bool) -> tuple[str, ...]:
    keys = (f"run/{run_id}", retired.key_of(run_id))
    return (*keys, f"view/{run_id}") if views else keys


def _letter_id(number: int) -> str:
    return f"{number:012d}"


def _add_letters(cache: Cache, letters: Sequence[DeadLetter]) -> list[int]:
    """Store new dead letters, and return their numbers, which were never used before."""
    number = int(rows.stored(cache, "next/dead") or b"1")  # without it: begin at 1 and pass over those in use
    numbers: list[int] = []
    for letter in letters:
        while rows.exists(cache, f"dead/{_letter_id(number)}"):
            number += 1
        numbered = msgspec.structs.replace(letter, id=_letter_id(number))
        rows.put(cache, f"dead/{numbered.id}", _encode(numbered), tag=letter.run_id)
        numbers.append(number)
        number += 1
    rows.put(cache, "next/dead", str(number).encode())
    return numbers
