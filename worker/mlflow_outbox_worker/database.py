"""The ledger's database: its connections, locks and errors, around diskcache.

``dbfile`` has the rules for its files, ``ledger`` decides what is in it. Here stands how it is used safely.

Design constraints
------------------
* **Nothing of the file is believed before it was checked.** diskcache reads its options from the table Settings,
  puts some of them into PRAGMA statements, and by its defaults deletes the oldest rows. So the names of all tables,
  indexes and triggers, and every setting, are compared with what is written here *before* diskcache sees the file,
  on each new connection, and rows are judged by ``BytesDisk``. No setting of the file ever reaches a PRAGMA.
* **The path is not diskcache's business.** It expands ``$VARS`` in absolute paths too, and would make and use
  another directory. Connections are therefore opened here, and diskcache is given none but these.
* **Nothing waits without a bound.** diskcache repeats "database is locked" every millisecond for a minute, and with
  ``retry=True`` any error for ever. Here SQLite's own wait is the only one: ``timeout`` seconds, once, idle.
* **A connection that reported an error is closed,** and the next use opens a new one. It may be in the middle of a
  transaction that diskcache could not end, or behind a sync that failed.
* **A file that was removed or replaced is not written on.** SQLite would, without a word; so each use looks first.
* **Creating is one transaction.** A process killed in it, or a full disk, leaves a file without tables, which is
  made use of.
* **No memory-mapped database** (``mmap_size`` 0; diskcache maps 64 MB). Reading a mapped page that the disk cannot
  give, or that was cut off, is no error but SIGBUS, which kills the experiment. Measured: death by signal 7 with a
  map, "database disk image is malformed" without. The ``-shm`` that WAL mode maps (32 KB) remains.

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
is then read as immutable, and read again when it changed meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import diskcache

from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import dbfile
from mlflow_outbox_worker.disk import BytesDisk

#: Every setting that diskcache keeps in the file; a file with any other value is not used.
SETTINGS: Final[dict[str, str | int]] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "none",
    "size_limit": 2**62,
    "cull_limit": 0,
    "sqlite_auto_vacuum": 2,  # incremental: a checkpoint gives space back, a commit never moves pages
    "sqlite_cache_size": 512,  # pages: 2 MiB
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,  # NORMAL: a commit does not wait for the disk, a checkpoint does
    "disk_min_file_size": 2**40,  # all values in their rows; diskcache never syncs side files
    "disk_pickle_protocol": 0,  # unused; fixed, because diskcache's default differs between Pythons
}
_COUNTERS: Final = frozenset({"count", "size", "hits", "misses"})
_SCHEMA: Final = frozenset(
    {("table", "Settings"), ("table", "Cache")}
    | {("index", name) for name in ("sqlite_autoindex_Settings_1", "Cache_key_raw", "Cache_expire_time")}
    | {("trigger", f"Settings_count_{event}") for event in ("insert", "delete")}
    | {("trigger", f"Settings_size_{event}") for event in ("insert", "update", "delete")}
)
#: What SQLite says of a database that will not get better by waiting.
_DAMAGED: Final = ("malformed", "not a database", "no such table", "no such column", "unsupported file format")

#: Seconds that a fork waits for a use of the database to end; a commit takes less than a millisecond.
FORK_PATIENCE: Final = 1.0
#: Seconds that a checkpoint waits for readers; their queries take milliseconds.
CHECKPOINT_PATIENCE: Final = 0.5
#: Pages given back by one checkpoint: 4 MB, a few milliseconds.
_VACUUM_PAGES: Final = 1000
#: Attempts of a Reader to see the same file before and after a query.
_READ_ATTEMPTS: Final = 8
#: Seconds between two of them: a writer opens or closes the file in about a millisecond.
_READ_PAUSE: Final = 0.002

Row = tuple[Any, ...]


class LedgerCorrupt(LedgerUnavailable):
    """Raised when the database turns out to be damaged, foreign or altered; open it again, which sets it aside."""


class Database:
    """One database, for one writing process; ``open`` makes it. All methods may be called from several threads."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._path = directory / dbfile.NAME
        self._timeout = timeout
        self._lock = threading.RLock()
        self._usable = True
        with _translated(self._path):
            _close_inherited()
            self._cache = Cache(self._path, timeout)
        _DATABASES.add(self)

    @classmethod
    def open(cls, directory: Path, *, timeout: float, report: Callable[[str], None]) -> Database:
        """Open the database of a directory; make it, or a new one beside a damaged one, as needed.

        Args:
            directory: absolute path; made with mode 0700 when it is missing.
            timeout: seconds to wait for a lock that another process holds.
            report: told in one sentence about each file that is set aside.

        Raises:
            OutboxUnusable: the directory or a file in it cannot be made, or is not safe to use.
            LedgerUnavailable: the database is locked, or the disk fails.
        """
        path = directory / dbfile.NAME
        with _translated(path):
            dbfile.make_directory(directory)
            found = dbfile.look(directory)
            if what := dbfile.ruin(found):
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
            with _translated(self._path):
                _close_inherited()
                self._cache.keep_up()
                yield self._cache
        except BaseException:
            if self._usable:
                self._cache.disconnect()
            raise
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Cache]:
        """Hold the database for one transaction, which happens wholly or not at all.

        Raises:
            LedgerUnavailable: as ``guarded``; nothing was written.
        """
        with self.guarded() as cache, cache.transact(retry=False):
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
        with self.guarded() as cache:
            cache.give_back(_VACUUM_PAGES)
            cache.query(f"PRAGMA busy_timeout = {int(min(self._timeout, CHECKPOINT_PATIENCE) * 1000)}")
            ((_, logged, copied),) = cache.query("PRAGMA wal_checkpoint(TRUNCATE)")
            cache.query(f"PRAGMA busy_timeout = {int(self._timeout * 1000)}")
            # "busy" may mean no more than that a reader kept the log from being cut; what was copied is what counts.
            return bool(logged == copied >= 0)

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
        with _translated(self._path):
            _close_inherited()
            attempts = _READ_ATTEMPTS
            while True:
                before = dbfile.look(self._directory)
                if "" not in before:
                    return []
                shared = "-wal" in before and "-shm" in before
                attempts -= 1
                try:
                    if not shared and "-wal" in before and before["-wal"].size:
                        msg = f"the ledger {self._path} cannot be read before the worker has opened it again"
                        raise LedgerUnavailable(msg)
                    rows = self._query_once(sql, arguments, shared=shared)
                    if shared or dbfile.look(self._directory) == before:
                        return rows
                except (sqlite3.Error, LedgerUnavailable) as error:
                    # Tried again when the writer came, went or began anew meanwhile, or is just about to.
                    passing = isinstance(error, sqlite3.OperationalError) or dbfile.look(self._directory) != before
                    if not attempts or not passing:
                        raise
                    time.sleep(_READ_PAUSE)
                if not attempts:
                    msg = f"the ledger {self._path} changes too fast to be read"
                    raise LedgerUnavailable(msg)

    def _query_once(self, sql: str, arguments: Row, *, shared: bool) -> list[Row]:
        # readonly_shm: SQLite would make a -shm of its own, and could not take it away again.
        options = "mode=ro&readonly_shm=1" if shared else "mode=ro&immutable=1"
        with contextlib.closing(_connect(self._path, options, self._timeout)) as connection:
            return connection.execute(sql, arguments).fetchall() if _verified(connection, self._path) else []

    def close(self) -> None:
        """Do nothing: nothing is held between two queries."""


class Cache(diskcache.Cache):  # type: ignore[misc]
    """diskcache on the one connection of this module, without its path handling, its PRAGMAs and its retries."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._seconds = timeout
        self._held: sqlite3.Connection | None = None
        self._inode = 0
        try:
            ((found,), *_) = self.query("PRAGMA quick_check(1)")
            if found != "ok":
                msg = f"the ledger {path} is damaged: {found}"
                raise LedgerCorrupt(msg)
            self.query("BEGIN IMMEDIATE")
            # The directory in which diskcache makes directories and files. It makes none here; the root always exists.
            super().__init__(os.sep, timeout=timeout, disk=BytesDisk, **SETTINGS)
            self.query("COMMIT")
            if (self.eviction_policy, self.cull_limit) != ("none", 0):  # pragma: no cover - as it was just told
                msg = f"the ledger {path} would delete rows of its own accord"
                raise LedgerCorrupt(msg)
        except BaseException:
            self.disconnect()
            raise
        self._directory = str(path.parent)

    def query(self, sql: str, arguments: Row = ()) -> list[Row]:
        """Return all rows of one SQL statement."""
        return self._con.execute(sql, arguments).fetchall()

    def change(self, sql: str, arguments: Row = ()) -> int:
        """Execute one SQL statement and return the number of rows that it changed."""
        return self._con.execute(sql, arguments).rowcount

    def give_back(self, pages: int) -> None:
        """Return up to so many unused pages to the file system."""
        # execute() would take one step of the statement, which is one page; executescript() takes all.
        self._con.executescript(f"PRAGMA incremental_vacuum({pages})")

    def keep_up(self) -> None:
        """Leave a file that was removed or replaced, which SQLite would go on writing to without a word."""
        if self._held is not None and _inode(self._path) != self._inode:
            self.disconnect()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._held is not None and self._held.in_transaction

    def disconnect(self) -> None:
        """Close the connection, which undoes an open transaction; the next use opens another."""
        connection, self._held, self._txn_id = self._held, None, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # what was wrong has been reported by the call that failed
                connection.close()

    # What diskcache itself calls, under its names.

    @property
    def _con(self) -> sqlite3.Connection:
        if self._held is None:
            self._held = _connect_to_write(self._path, self._seconds)
            self._inode = _inode(self._path)
        return self._held

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        return self._con.execute

    def reset(self, key: str, value: Any = diskcache.core.ENOVAL, update: bool = True) -> Any:  # noqa: FBT001, FBT002 - diskcache's signature
        """Set an option as diskcache does, except for PRAGMAs, which were set when the connection was opened."""
        return None if key.startswith("sqlite_") else super().reset(key, value, update)

    def close(self) -> None:
        """Do nothing: diskcache calls this to connect anew with another timeout; ``disconnect`` closes."""


def _inode(path: Path) -> int:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0


def _connect(path: Path, options: str, timeout: float) -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path))}?{options}"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
    # A text that is no UTF-8 must reach BytesDisk, which refuses it, instead of failing the query.
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    return connection


def _connect_to_write(path: Path, timeout: float) -> sqlite3.Connection:
    """Open the file, which must be there, and check that it is empty or one of ours."""
    if "" not in dbfile.look(path.parent):
        msg = f"the ledger {path} is gone"
        raise LedgerCorrupt(msg)
    connection = _connect(path, "mode=rw", timeout)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        if not _verified(connection, path):  # setting it needs the lock, and has an effect before the first table only
            connection.execute(f"PRAGMA auto_vacuum = {SETTINGS['sqlite_auto_vacuum']}")
        for name in ("cache_size", "mmap_size", "synchronous"):
            connection.execute(f"PRAGMA {name} = {SETTINGS[f'sqlite_{name}']}").fetchall()
        ((mode,),) = connection.execute("PRAGMA journal_mode = wal").fetchall()
        if mode != "wal":
            dbfile.refuse(path, "lies on a file system that cannot share memory between processes (set ledger_dir)")
    except BaseException:
        connection.close()
        raise
    return connection


def _verified(connection: sqlite3.Connection, path: Path) -> bool:
    """Return whether the file holds a ledger; False when it holds nothing yet."""
    schema = set(connection.execute("SELECT type, name FROM sqlite_master LIMIT 100").fetchall())
    if not schema:
        return False
    if schema != _SCHEMA:
        names = sorted(repr(name) for _, name in schema ^ _SCHEMA)
        msg = f"the ledger {path} is not as it was made: {', '.join(names[:5])}"
        raise LedgerCorrupt(msg)
    settings = dict(connection.execute("SELECT key, value FROM Settings LIMIT 100").fetchall())
    if {key: value for key, value in settings.items() if key not in _COUNTERS} != SETTINGS:
        names = sorted({repr(key) for key, _ in settings.items() ^ SETTINGS.items() if key not in _COUNTERS})
        msg = f"the ledger {path} has other settings than it was made with: {', '.join(names[:5])}"
        raise LedgerCorrupt(msg)
    return True


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The one boundary at which errors of SQLite, diskcache and the file system become ours."""
    try:
        yield
    except (OutboxUnusable, LedgerUnavailable):
        raise
    except (PermissionError, NotADirectoryError) as error:
        msg = f"the ledger {path} cannot be made or used: {error}"
        raise OutboxUnusable(msg) from error
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        cause: BaseException = error
        # diskcache hides whatever kept a transaction from beginning behind Timeout, and SQLite's first error
        # behind that of a ROLLBACK which came too late.
        while isinstance(cause.__context__, sqlite3.Error):
            cause = cause.__context__
        if isinstance(cause, sqlite3.DatabaseError) and any(words in str(cause) for words in _DAMAGED):
            msg = f"the ledger {path} is damaged: {cause}"
            raise LedgerCorrupt(msg) from error
        msg = f"the ledger {path} cannot be used now: {cause}"
        raise LedgerUnavailable(msg) from error


_DATABASES: weakref.WeakSet[Database] = weakref.WeakSet()
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
    _FORKING[threading.get_ident()] = [(database, database.hold_for_fork()) for database in list(_DATABASES)]


def _after_fork_in_parent() -> None:
    for database, held in _FORKING.pop(threading.get_ident(), ()):
        if held:
            database.release_after_fork()


def _after_fork_in_child() -> None:
    for database, held in _FORKING.pop(threading.get_ident(), ()):
        database.become_child(held=held)
    _FORKING.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
