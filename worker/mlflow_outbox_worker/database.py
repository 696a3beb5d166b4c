"""The ledger's database: how threads, forks and other processes use it safely.

``dbfile`` has the rules for its files, ``dbconnection`` those for a connection, ``ledger`` decides what is in it.

Design constraints
------------------
* **Nothing waits without a bound.** diskcache repeats "database is locked" every millisecond for a minute, and with
  ``retry=True`` any error for ever. Here SQLite's own wait is the only one: ``timeout`` seconds, once, idle.
* **A full disk is met with the reserve** (``mlflow_outbox.spool.reserve``): it is given back before a transaction that
  finds little room, and once it is gone the log is cut before each transaction, so that it never needs more.
* **A connection that reported an error is closed,** and the next use opens a new one. It may be in the middle of a
  transaction that diskcache could not end, or behind a sync that failed.
* **Damage that was met in use is believed,** whatever the checks say when the file is opened again: they do not see
  everything (a flipped bit in the name of a column, for one), and a worker that opens, fails and opens again would do
  so for ever. Such a file is set aside as one that does not pass them.

Threads and forks
-----------------
One connection and one lock for all threads of a process. SQLite must not be forked in the middle of anything: the
child would own locked mutexes, and the connections of its parent's dead threads would be closed while they are in
use. So a fork waits for the lock (at most ``FORK_PATIENCE``). What the child inherited while it was idle it closes,
which makes SQLite forget the locks that the parent holds and the child does not, and opens a connection of its own
when it needs one. It closes it then and not in the fork: other code of the parent, an embedded MLflow store above
all, may have been inside of SQLite, whose process-wide locks then never open in the child. That may cost the child
its worker, but never its logging calls. A child of a fork that could not wait leaves the connection alone and finds
the database unavailable.

Reading beside a writer
-----------------------
``Reader`` opens the file for one query, read-only, and closes it: nothing is held between two queries, nothing is
created, checkpointed or repaired, and a database that was set aside is not read on. While a ``-wal`` and a ``-shm``
are there SQLite gives a consistent view and the writer notices nothing. Without them all is in the main file, which
is then read as immutable, and read again when it changed meanwhile. The same goes for a ``-wal`` that is a header and
nothing else, as a process leaves it that is killed between its first sync and its first frame. In the writer's own
process both go through ``dbdoor``.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.living import Living
from mlflow_outbox.spool import reserve
from mlflow_outbox_worker import dbconnection, dbfile
from mlflow_outbox_worker.dbconnection import Cache, LedgerCorrupt, Row, translated
from mlflow_outbox_worker.dbdoor import FORK_PATIENCE, door, is_written
from mlflow_outbox_worker.forking import using_store

#: Seconds that a checkpoint waits for readers; their queries take milliseconds.
CHECKPOINT_PATIENCE: Final = 0.5
#: Pages given back by one checkpoint: 4 MB, a few milliseconds.
_VACUUM_PAGES: Final = 1000
#: Attempts of a Reader to see the same file before and after a query.
_READ_ATTEMPTS: Final = 8
#: Seconds between two of them: a writer opens or closes the file in about a millisecond.
_READ_PAUSE: Final = 0.002
#: What SQLite and the kernel say of a disk or a quota without room; some of it may have other reasons too.
_NO_ROOM: Final = ("full", "disk I/O error", "unable to open", "No space left", "quota")


class Database:
    """One database, for one writing process; ``open`` makes it. All methods may be called from several threads."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._path = directory / dbfile.NAME
        self._timeout = timeout
        self._lock = threading.RLock()
        self._usable = True
        with translated(self._path), using_store():  # no fork can wait for what is not in _DATABASES yet
            _close_inherited()
            self._cache = Cache(self._path, timeout)
            _DATABASES.add(self)

    @classmethod
    def open(cls, directory: Path, *, timeout: float, report: Callable[[str], object]) -> Database:
        """Open the database of a directory; make it, or a new one beside a damaged one, as needed.

        Args:
            directory: absolute path; made with mode 0700 when it is missing.
            timeout: seconds to wait for a lock that another process holds.
            report: told in one sentence about each file that is set aside.

        Raises:
            OutboxUnusable: the directory or a file in it cannot be made, or is not safe to use.
            LedgerUnavailable: the database is locked, or the disk fails.
        """
        try:
            opened = cls._opened(directory, timeout, report)
        except LedgerUnavailable as error:
            if not _is_full(error) or not reserve.release(directory):
                raise
            opened = cls._opened(directory, timeout, report)
        reserve.make(directory)
        return opened

    @classmethod
    def _opened(cls, directory: Path, timeout: float, report: Callable[[str], object]) -> Database:
        path = directory / dbfile.NAME
        with translated(path):
            dbfile.make_directory(directory)
            if reserve.free(directory) < reserve.LOW:
                reserve.release(directory)
            found = dbfile.look(directory)
            if what := dbfile.ruin(found) or _condemned(path, found):
                report(f"the ledger {path} {what}; it is kept as {dbfile.set_aside(directory)} and a new one is begun")
                found = {}
            dbfile.make(directory)
            try:
                opened = cls(directory, timeout)
            except LedgerCorrupt as error:
                report(f"{error}; it is kept as {dbfile.set_aside(directory)} and a new one is begun")
                dbfile.make(directory)
                return cls(directory, timeout)
            if "" in found and found[""].size == 0:
                report(f"the ledger {path} was empty; a new one is begun")
            return opened

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Cache]:
        """Hold the database for one use by one thread, translating every error; not to be nested.

        Raises:
            LedgerCorrupt: the database is damaged.
            LedgerUnavailable: it is locked, closed, or the disk fails; the message says which.
        """
        if not self._lock.acquire(timeout=self._timeout):
            msg = f"the ledger {self._path} has been in use by another thread for {self._timeout:g} s"
            raise LedgerUnavailable(msg)
        try:
            if not self._usable:
                msg = f"the ledger {self._path} is closed, or was in use when this process was forked"
                raise LedgerUnavailable(msg)
            with translated(self._path), using_store():  # a fork that began before it was made does not hold its lock
                _close_inherited()
                self._cache.keep_up()
                yield self._cache
        except BaseException as error:  # raised again: what such a connection is in the middle of, nobody knows
            if isinstance(error, LedgerCorrupt) and self._cache.is_in_place():  # one that is gone may come back
                _CONDEMNED[self._path] = self._cache.inode
            if self._usable:
                self._cache.disconnect()
            if _is_full(error):
                reserve.release(self._path.parent)  # the next try has it
            raise
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Cache]:
        """Hold the database for one transaction, which happens wholly or not at all.

        Raises:
            LedgerUnavailable: as ``guarded``; nothing was written.
        """
        with self.guarded() as cache:
            self._make_way(cache)
            with cache.transact(retry=False):
                yield cache

    def query(self, sql: str, arguments: Row = ()) -> list[Row]:
        """Return all rows of one SQL statement.

        Raises:
            LedgerUnavailable: as ``guarded``.
        """
        with self.guarded() as cache:
            return cache.query(sql, arguments)

    def checkpoint(self) -> bool:
        """Bring everything committed so far into the main file, synced; return whether that was possible now.

        Raises:
            LedgerUnavailable: as ``guarded``.
        """
        reserve.make(self._path.parent)
        with self.guarded() as cache:
            cache.give_back(_VACUUM_PAGES)
            return self._cut_log(cache)

    def _cut_log(self, cache: Cache) -> bool:
        cache.query(f"PRAGMA busy_timeout = {int(min(self._timeout, CHECKPOINT_PATIENCE) * 1000)}")
        ((_, logged, copied),) = cache.query("PRAGMA wal_checkpoint(TRUNCATE)")
        cache.query(f"PRAGMA busy_timeout = {int(self._timeout * 1000)}")
        # "busy" may mean no more than that a reader kept the log from being cut; what was copied is what counts.
        return bool(logged == copied >= 0)

    def _make_way(self, cache: Cache) -> None:
        """Find room for a transaction on a disk that has little."""
        if reserve.free(self._path.parent) >= reserve.LOW or reserve.release(self._path.parent):
            return
        try:
            self._cut_log(cache)
        except sqlite3.Error:  # no room even for that; the transaction may need none
            cache.disconnect()

    def close(self) -> None:
        """Close the connection; every later use finds the database unavailable."""
        with self._lock:
            if self._usable:
                self._cache.disconnect()
            self._usable = False
        _DATABASES.discard(self)

    def hold_for_fork(self) -> bool:
        """Wait until no thread uses the database; return whether that came true in time."""
        return self._lock.acquire(timeout=FORK_PATIENCE)

    def release_after_fork(self) -> None:
        """Let the threads of the parent go on."""
        self._lock.release()

    def become_child(self, *, held: bool) -> None:
        """Give up the parent's connection: close it if it is idle, else leave it untouched for good."""
        self._lock = threading.RLock()
        if held and not self._cache.in_transaction:
            _INHERITED.append(self._cache)
        else:
            self._usable = False
            _ABANDONED.append(self._cache)


def _condemned(path: Path, found: dict[str, dbfile.FileState]) -> str:
    """Return that a file turned out to be damaged when it was used last; "" for all others."""
    inode = _CONDEMNED.pop(path, 0)
    return "was damaged where it was used" if "" in found and found[""].inode == inode else ""


def _is_full(error: BaseException) -> bool:
    return isinstance(error, LedgerUnavailable) and any(words in str(error) for words in _NO_ROOM)


class Reader:
    """The same file, read by any process beside the one that writes it; a missing file reads as empty."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._directory = directory
        self._path = directory / dbfile.NAME
        self._timeout = timeout

    def query(self, sql: str, arguments: Row = ()) -> list[Row]:
        """Return all rows of one SQL statement; none when there is no database yet.

        Raises:
            OutboxUnusable: the directory or a file in it is not safe to use.
            LedgerCorrupt: the database is damaged; the worker will set it aside.
            LedgerUnavailable: it cannot be read now.
        """
        with translated(self._path):
            _close_inherited()
            # Where one wait was in vain none is made until a read succeeds: a program asks many times as it starts.
            patience = 0.0 if self._path in _IN_VAIN else self._timeout
            attempts, deadline = _READ_ATTEMPTS, stopwatch.seconds() + patience
            while True:
                before = dbfile.look(self._directory)
                attempts -= 1
                try:
                    with door(self._path, patience):
                        before = dbfile.look(self._directory)
                        rows = self._attempted(before, sql, arguments, patience)
                        if rows is not None:
                            _IN_VAIN.discard(self._path)
                            return rows
                except (sqlite3.Error, LedgerUnavailable) as error:
                    # Tried again when the writer came, went or began anew meanwhile, or is just about to. One attempt
                    # can take SQLite ten seconds (dbdoor), so they are not all made whatever they take.
                    passing = isinstance(error, sqlite3.OperationalError) or dbfile.look(self._directory) != before
                    late = stopwatch.seconds() >= deadline
                    if late:
                        _IN_VAIN.add(self._path)
                    if late or not attempts or not passing:
                        raise
                    time.sleep(_READ_PAUSE)
                if not attempts:
                    msg = f"the ledger {self._path} changes too fast to be read"
                    raise LedgerUnavailable(msg)

    def _attempted(
        self, before: dict[str, dbfile.FileState], sql: str, arguments: Row, patience: float
    ) -> list[Row] | None:
        """Return all rows, or None when the files, which were as before says, changed meanwhile."""
        if "" not in before:
            return []
        logged = before["-wal"].size if "-wal" in before else 0
        # Where a log was begun and no more, and nobody has it open, SQLite compares its header with an index that has
        # none, for ten seconds. The locks of a writer of this process, which does have it open, are to be left alone.
        begun = logged == dbfile.LOG_HEADER and not is_written(self._path)
        shared = "-wal" in before and "-shm" in before and not begun
        if not shared and not begun and logged:
            msg = f"the ledger {self._path} cannot be read before the worker has opened it again"
            raise LedgerUnavailable(msg)
        rows = self._query_once(sql, arguments, patience, shared=shared)
        return rows if shared or dbfile.look(self._directory) == before else None

    def _query_once(self, sql: str, arguments: Row, patience: float, *, shared: bool) -> list[Row]:
        # readonly_shm: SQLite would make a -shm of its own, and could not take it away again.
        options = "mode=ro&readonly_shm=1" if shared else "mode=ro&immutable=1"
        with contextlib.closing(dbconnection.connect(self._path, options, patience)) as connection:
            return (
                connection.execute(sql, arguments).fetchall() if dbconnection.verified(connection, self._path) else []
            )

    def close(self) -> None:
        """Do nothing: nothing is held between two queries."""


#: By path: the inode of the file in which a use has met damage.
_CONDEMNED: dict[Path, int] = {}
#: The files that a Reader has waited for in vain.
_IN_VAIN: set[Path] = set()
_DATABASES: Living[Database] = Living()
#: Idle connections that this process inherited, to be closed before it uses SQLite itself.
_INHERITED: list[Cache] = []
#: Connections that a fork caught in use: closing one could wait for ever for a thread that the child does not have.
_ABANDONED: list[Cache] = []
#: By the thread that forks: its databases, and whether each one was idle.
_FORKING: dict[int, list[tuple[Database, bool]]] = {}


def _close_inherited() -> None:
    while _INHERITED:
        _INHERITED.pop().disconnect()


def _before_fork() -> None:
    _FORKING[threading.get_ident()] = [(database, database.hold_for_fork()) for database in _DATABASES.members()]


def _after_fork_in_parent() -> None:
    for database, held in _FORKING.pop(threading.get_ident(), ()):
        if held:
            database.release_after_fork()


def _after_fork_in_child() -> None:
    for database, held in _FORKING.pop(threading.get_ident(), ()):
        database.become_child(held=held)
    _FORKING.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
