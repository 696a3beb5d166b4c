"""One connection to the ledger's file: opened by these rules alone, checked before diskcache sees it.

Design constraints
------------------
* **Nothing of the file is believed before it was checked.** diskcache reads its options from the table Settings,
  puts some of them into PRAGMA statements, and by its defaults deletes the oldest rows. So the names of all tables,
  indexes and triggers, and every setting, are compared with what is written here *before* diskcache sees the file,
  on each new connection, and rows are judged by ``BytesDisk``. No setting of the file ever reaches a PRAGMA.
* **An index is compared with its table,** which ``quick_check`` does not: a kill in the middle of a checkpoint, and
  then a log that is lost, leave pages of two times behind, each of them whole. Rows of which the index does not know
  would be stored and never found again. The whole check takes 0.04 s for 10,000 runs.
* **The schema is sealed:** a checksum of its text is kept in the header's user version. A flipped bit in it is no
  damage to any check of SQLite's: a trigger or a column of another name fails at each use only, so that a ledger that
  opened as sound would never be set aside, and another letter in PRIMARY KEY hides dead letters.
* **The path is not diskcache's business.** It expands ``$VARS`` in absolute paths too, and would make and use
  another directory. Connections are therefore opened here, and diskcache is given none but these.
* **A file that was removed or replaced is not written on.** SQLite would, without a word; so each use looks first.
* **Creating is one transaction.** A process killed in it, or a full disk, leaves a file without tables, which is
  made use of.
* **No memory-mapped database** (``mmap_size`` 0; diskcache maps 64 MB). Reading a mapped page that the disk cannot
  give, or that was cut off, is no error but SIGBUS, which kills the experiment. Measured: death by signal 7 with a
  map, "database disk image is malformed" without. The ``-shm`` that WAL mode maps (32 KB) remains.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import diskcache

from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import dbfile
from mlflow_outbox_worker.dbdoor import door, is_written, writer_came, writer_left
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
_DAMAGED: Final = (
    "malformed",
    "not a database",
    "no such table",
    "no such column",
    "has no column",
    "unsupported file format",
)

Row = tuple[Any, ...]


class LedgerCorrupt(LedgerUnavailable):
    """Raised when the database turns out to be damaged, foreign or altered; open it again, which sets it aside."""


class Cache(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """diskcache on the one connection of this module, without its path handling, its PRAGMAs and its retries.

    Attributes:
        inode: of the file that was opened last.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._seconds = timeout
        self._held: sqlite3.Connection | None = None
        self.inode = 0
        try:
            ((found,), *_) = self.query("PRAGMA integrity_check(1)")
            if found != "ok":
                msg = f"the ledger {path} is damaged: {found}"
                raise LedgerCorrupt(msg)
            self.query("BEGIN IMMEDIATE")
            # The directory in which diskcache makes directories and files. It makes none here; the root always exists.
            super().__init__(os.sep, timeout=timeout, disk=BytesDisk, **SETTINGS)
            if not _seal(self._con):
                self.query(f"PRAGMA user_version = {_checksum(self._con)}")
            self.query("COMMIT")
            if (self.eviction_policy, self.cull_limit) != ("none", 0):  # pragma: no cover - as it was just told
                msg = f"the ledger {path} would delete rows of its own accord"
                raise LedgerCorrupt(msg)
        except BaseException:  # raised again: nothing is to be read through it
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
        if self._held is not None and not self.is_in_place():
            self.disconnect()

    def is_in_place(self) -> bool:
        """Return whether the file that was opened last is still where it was."""
        return _inode(self._path) == self.inode

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
            writer_left(self._path)

    # What diskcache itself calls, under its names.

    @property
    def _con(self) -> sqlite3.Connection:
        if self._held is None:
            with door(self._path, self._seconds, writing=True):
                self._held = _connect_to_write(self._path, self._seconds)
                writer_came(self._path)
            self.inode = _inode(self._path)
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


def connect(path: Path, options: str, timeout: float) -> sqlite3.Connection:
    """Open the file as SQLite's URI options say; each statement is a transaction unless one is begun."""
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
    # Where a connection of this process writes to it, it can be written, and must not be opened beside that.
    if not is_written(path) and dbfile.is_marked_read_only(path):
        msg = f"the ledger {path} is damaged: by its header only a later version of SQLite may write it"
        raise LedgerCorrupt(msg)
    connection = connect(path, "mode=rw", timeout)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        if not verified(connection, path):  # setting it needs the lock, and has an effect before the first table only
            connection.execute(f"PRAGMA auto_vacuum = {SETTINGS['sqlite_auto_vacuum']}")
        for name in ("cache_size", "mmap_size", "synchronous"):
            connection.execute(f"PRAGMA {name} = {SETTINGS[f'sqlite_{name}']}").fetchall()
        ((mode,),) = connection.execute("PRAGMA journal_mode = wal").fetchall()
        if mode != "wal":
            dbfile.refuse(path, "lies on a file system that cannot share memory between processes (set ledger_dir)")
    except BaseException:  # raised again: nobody would know of the connection
        connection.close()
        raise
    return connection


def verified(connection: sqlite3.Connection, path: Path) -> bool:
    """Return whether the file holds a ledger; False when it holds nothing yet."""
    schema = set(connection.execute("SELECT type, name FROM sqlite_master LIMIT 100").fetchall())
    if not schema:
        return False
    if schema != _SCHEMA:
        names = sorted(repr(name) for _, name in schema ^ _SCHEMA)
        msg = f"the ledger {path} is not as it was made: {', '.join(names[:5])}"
        raise LedgerCorrupt(msg)
    if _seal(connection) not in {0, _checksum(connection)}:  # it has none while it is made
        msg = f"the ledger {path} is damaged: its schema does not have the checksum that it was made with"
        raise LedgerCorrupt(msg)
    settings = dict(connection.execute("SELECT key, value FROM Settings LIMIT 100").fetchall())
    if {key: value for key, value in settings.items() if key not in _COUNTERS} != SETTINGS:
        names = sorted({repr(key) for key, _ in settings.items() ^ SETTINGS.items() if key not in _COUNTERS})
        msg = f"the ledger {path} has other settings than it was made with: {', '.join(names[:5])}"
        raise LedgerCorrupt(msg)
    return True


def _seal(connection: sqlite3.Connection) -> int:
    ((number,),) = connection.execute("PRAGMA user_version").fetchall()
    return int(number)


def _checksum(connection: sqlite3.Connection) -> int:
    """Return a positive number of 31 bits for the text of the schema."""
    schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
    return zlib.crc32(repr(schema).encode()) >> 1 or 1


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """The one boundary at which errors of SQLite, diskcache and the file system become ours."""
    try:
        yield
    except (OutboxUnusable, LedgerUnavailable):
        raise
    except (PermissionError, NotADirectoryError) as error:
        msg = f"the ledger {path} cannot be made or used: {error}"
        raise OutboxUnusable(msg) from error
    except UnicodeDecodeError as error:  # of a text in the schema, of which sqlite3 makes no error of its own
        msg = f"the ledger {path} is damaged: {error}"
        raise LedgerCorrupt(msg) from error
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        cause: BaseException = error
        # diskcache hides whatever kept a transaction from beginning behind Timeout, and SQLite's first error
        # behind that of a ROLLBACK which came too late.
        while isinstance(cause.__context__, sqlite3.Error):
            cause = cause.__context__
        said = str(cause)
        # Python 3.10 says nothing where SQLite's message is no text, as with damage in a name that the schema holds.
        unsaid = type(cause) is sqlite3.DatabaseError and not said
        if isinstance(cause, sqlite3.DatabaseError) and (unsaid or any(words in said for words in _DAMAGED)):
            msg = f"the ledger {path} is damaged: {said or repr(cause)}"
            raise LedgerCorrupt(msg) from error
        msg = f"the ledger {path} cannot be used now: {cause}"
        raise LedgerUnavailable(msg) from error
