"""Databases as tracking stores: MLflow's own store, opened in one attempt, and shared where it is an SQLite file."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import sqlalchemy.engine
import sqlalchemy.event
import sqlalchemy.pool
from mlflow.store.db import utils as database
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mlflow_outbox_worker.mlflow_sink import limits, new_database
from mlflow_outbox_worker.mlflow_sink.migrations import one_transaction_each, take_turns
from mlflow_outbox_worker.mlflow_sink.point_rows import PointRows
from mlflow_outbox_worker.sink import SinkError

#: SQLAlchemy reads "%41" in the path of a database as "A", which it does since 2.1.
_DECODES: Final = sqlalchemy.engine.make_url("sqlite:///%41").database == "A"
#: Stores of SQLite files that are in use, by URI, artifact root and file: worker and plugin share them, because
#: building one (or, for a new file, the tables) takes long.
_in_use: weakref.WeakValueDictionary[tuple[str, str, int, int], PointRows] = weakref.WeakValueDictionary()
#: For how long a thread waits for a file that is locked; where it does not say, as long as MLflow does.
_patience = threading.local()
#: SQLite files that this process opens.
_ours: set[Path] = set()
#: Those that it has opened.
_opened: set[Path] = set()
#: The file of each store, and which one it was when the store was opened.
_files: weakref.WeakKeyDictionary[SqlAlchemyStore, tuple[Path, tuple[int, int]]] = weakref.WeakKeyDictionary()
#: What holds the connections of the stores that were opened; MLflow keeps one for each URL.
_engines: weakref.WeakSet[sqlalchemy.engine.Engine] = weakref.WeakSet()
#: What PostgreSQL and MySQL say of writes where a node only reads, or a session that began while the database did.
_ONLY_READS: Final = re.compile(r"read[ -]only (?:transaction|option|mode)", re.IGNORECASE)
#: Connections of parents, which go on with them: to collect one would close it.
_parents: list[sqlalchemy.pool.Pool] = []


def _after_fork_in_child() -> None:
    global _in_use  # noqa: PLW0603 - the child's own: connections are those of the parent's threads
    _in_use = weakref.WeakValueDictionary()
    for engine in _engines:  # two processes at one connection read each other's answers, or wait for one for ever
        _parents.append(engine.pool)
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_after_fork_in_child)


def open_store(uri: str, root: str, timeout: float = 30.0) -> tuple[str, PointRows, bool]:
    """Open the store of a database URL; calls must not overlap.

    Args:
        uri: the URL.
        root: where experiments that it creates keep their artifacts.
        timeout: seconds for which a database that has a server may be silent, see ``limits``.

    Returns:
        The URL with an absolute path; the store; whether several requests may be under way at once.

    Raises:
        SinkError: the database was there and is gone.
        Exception: whatever SQLAlchemy and MLflow raise, for ``boundary`` to translate.
    """
    url = _absolute(uri)
    uri = _text(url)
    file = _file(url)
    has_server = url.get_backend_name() != "sqlite"
    store = _in_use.get((uri, root, *_identity(file))) if file else None
    if store is None:
        take_turns()
        if file:
            _ours.add(file)
            _prepare(file)
            new_database.make(url, file)
        # MLflow would try for a minute to connect. One attempt is enough here, and a second process may be
        # creating the tables.
        engine = database.create_sqlalchemy_engine(uri)
        limits.put(engine, timeout, statements=False)
        if not has_server:
            one_transaction_each(engine)
        try:
            with engine.connect():
                pass
            _bring_up_to_date(engine)
        finally:
            engine.dispose()
        store = _with_limits(uri, root, timeout) if has_server else PointRows(uri, root)
        _engines.add(store.engine)
        if file:
            _opened.add(file)
            key = (uri, root, *_identity(file))
            _in_use[key] = store
            sqlalchemy.event.listen(store.engine, "before_cursor_execute", _bounded, retval=True)
            _files[store] = file, _identity(file)
    return uri, store, has_server


def _bring_up_to_date(engine: sqlalchemy.engine.Engine) -> None:
    """Make the tables that this version of MLflow has, one process of this machine at a time."""
    try:
        database._safe_initialize_tables(engine)  # noqa: SLF001 - what MLflow's own server does at its start
    except PermissionError:  # its lock is a file for all users, and only who made it may open it
        if not database._all_tables_exist(engine):  # noqa: SLF001 - what MLflow's clients do, which take no lock
            database._initialize_tables(engine)  # noqa: SLF001 - as above


def _with_limits(uri: str, root: str, timeout: float) -> PointRows:
    """Open a store over an engine of its own: MLflow's is the program's, too, and takes ten attempts to be made."""
    engine = database.create_sqlalchemy_engine(uri)
    _engines.add(engine)
    limits.put(engine, timeout)
    try:
        store = PointRows(uri, root, engine=engine)
    except BaseException:  # raised again: nobody else knows of its connections
        engine.dispose()
        raise
    weakref.finalize(store, engine.dispose).atexit = False  # as the end of the process closes them
    return store


def as_mlflow_reads(uri: str) -> str:
    """Return the URL of a database, with an absolute path, as MLflow has to be given it.

    Raises:
        SinkError: there is no such form.
    """
    return _text(_absolute(uri))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Have this thread wait for no longer than that for an SQLite file which somebody else has locked."""
    before = getattr(_patience, "seconds", None)
    _patience.seconds = seconds
    try:
        yield
    finally:
        _patience.seconds = before


def _bounded(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    """Put a shorter time in the place of the twenty seconds that MLflow gives SQLite at the beginning of each use."""
    seconds = getattr(_patience, "seconds", None)
    if seconds is not None and statement.startswith("PRAGMA busy_timeout"):
        statement = f"PRAGMA busy_timeout = {int(seconds * 1000)}"
    return statement, parameters


def _let_go_of_readers(context: Any) -> None:
    """Have connections opened anew that can only read, though the file, or another node of a database, can be written.

    Where SQLite cannot open a file for writing, be it once, it opens it for reading and says nothing; such a connection
    would come from the pool for ever. The error says then that it was invalidated, see ``boundary``. So would one that
    led, after a failover, to the node that only reads now: it answers each question, but the address leads elsewhere.
    """
    if "readonly database" in str(context.original_exception) and context.engine is not None:
        file = _file(context.engine.url)
        if file in _ours and all(os.access(place, os.W_OK) for place in (file, file.parent)):
            context.is_disconnect = True
    elif context.engine in _engines and _ONLY_READS.search(str(context.original_exception)):
        context.is_disconnect = True


#: Of all engines: MLflow writes with that of a store before anybody else has it.
sqlalchemy.event.listen(sqlalchemy.engine.Engine, "handle_error", _let_go_of_readers)


def check(store: SqlAlchemyStore) -> None:
    """Look whether the file of a store is still the one that was opened; if not, let its connections go.

    SQLite goes on with a file that was taken away, or that another one replaced: it refuses writes with "attempt to
    write a readonly database", or, in WAL mode, takes them for nobody ever to read.

    Raises:
        SinkError: it is not.
    """
    file, before = _files.get(store, (None, (0, 0)))
    if file is None or (now := _identity(file)) == before:
        return
    let_go(store)
    if now == (0, 0):
        msg = f"the database {file} was there and is gone; what was logged waits for it to come back"
    else:
        _files[store] = file, now
        msg = f"the database {file} was replaced by another one"
    raise SinkError(msg, kind="connection", sent=False)


def places(store: SqlAlchemyStore) -> tuple[Path, ...]:
    """Return the file of a store and its directory, in which SQLite keeps a journal; nothing for other databases."""
    file, _ = _files.get(store, (None, (0, 0)))
    return (file, file.parent) if file is not None else ()


def let_go(store: SqlAlchemyStore) -> None:
    """Close the connections of a store, those that another thread uses when it gives them back; it can be used again.

    SQLAlchemy closes only those that nobody uses. The others come back to a pool that nobody has any more, and stay
    open until the garbage collector finds it.
    """
    pool = store.engine.pool
    store._dispose_engine()  # noqa: SLF001 - MLflow has no public way to do it
    sqlalchemy.event.listen(pool, "checkin", _closed)


def _closed(connection: Any, _: object) -> None:
    if connection is not None:  # it was invalidated
        connection.close()


def _absolute(uri: str) -> sqlalchemy.engine.URL:
    """Return a database URL whose file, if any, does not depend on the working directory."""
    scheme, _, rest = uri.partition(":")
    # A destination that is reached by a socket of this machine names no host, and is written without its slashes.
    url = sqlalchemy.engine.make_url(uri if rest.startswith("//") else f"{scheme}://{rest}")
    file = _file(url)
    if file is None:
        return url
    return url.set(database=str((file if _DECODES else Path(unquote(str(file)))).absolute()))


def _text(url: sqlalchemy.engine.URL) -> str:
    """Return a database URL as text, the path of a file as it is where that is read so: MLflow makes its directory.

    Raises:
        SinkError: this version of SQLAlchemy has no way to write it.
    """
    file = _file(url)
    text = url.render_as_string(hide_password=False)
    if file is None:
        return text
    for spelling in (f"{url.drivername}:///{file}", text):
        if sqlalchemy.engine.make_url(spelling) == url:
            return spelling
    msg = f"the database {file} has a name that SQLAlchemy {sqlalchemy.__version__} cannot be given; 2.1 can"
    raise SinkError(msg, kind="not_mlflow", sent=False)


def _file(url: sqlalchemy.engine.URL) -> Path | None:
    """Return the file of an SQLite database that is an ordinary one."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name == ":memory:" or name.startswith("file:"):
        return None
    return Path(name)


def _identity(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _prepare(file: Path) -> None:
    """Create the directory of a new database.

    Raises:
        SinkError: the database was there and is gone. Whoever took it away did not ask for an empty one, and a disk
            that is not mounted now would hide it later.
    """
    if file in _opened and not file.exists():
        msg = f"the database {file} was there and is gone"
        raise SinkError(msg, kind="connection", sent=False)
    file.parent.mkdir(parents=True, exist_ok=True)
