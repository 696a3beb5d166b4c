"""Opens the store of a tracking URI, and says what kind it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking import file_store
from mlflow.utils.credentials import read_mlflow_creds
from mlflow.utils.databricks_utils import get_databricks_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path, path_to_local_file_uri

from mlflow_outbox.destination import workspace_of
from mlflow_outbox.errors import DestinationError
from mlflow_outbox.solelock import SoleLock
from mlflow_outbox_worker.forking import using_store
from mlflow_outbox_worker.mlflow_sink import credentials
from mlflow_outbox_worker.mlflow_sink.artifacts import Artifacts
from mlflow_outbox_worker.mlflow_sink.boundary import translated
from mlflow_outbox_worker.mlflow_sink.directory import Directory
from mlflow_outbox_worker.mlflow_sink.rest import DatabricksStore, Host, ServerStore
from mlflow_outbox_worker.mlflow_sink.transport import Transport
from mlflow_outbox_worker.mlflow_sink.workspace import WorkspaceTransport
from mlflow_outbox_worker.sink import SinkError

#: MLflow's migrations, and the replaced name below, are state of the whole process: one store is built at a time.
_building = SoleLock()


def _after_fork_in_child() -> None:
    global _building  # noqa: PLW0603 - the child's own: the lock may be held by a thread that is not there
    _building = SoleLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclasses.dataclass(frozen=True, repr=False)  # the URL of a database may hold a password
class OpenStore:
    """A store of MLflow and what delivery has to know about it.

    Attributes:
        uri: the tracking URI, with absolute paths; without credentials for a tracking server.
        deduplicates_metrics: the store keeps an identical metric point once.
        parallel: several requests may be under way at once.
        takes_repeats: points that the store has cost it no more than new ones.
        transport: the connections to a tracking server; None for an embedded store.
        checks: looks whether the store is what it was when it was opened; None when there is nothing to look at.
        places: what of this machine's disk nothing can be kept without.
    """

    uri: str
    store: Any
    artifacts: Artifacts
    deduplicates_metrics: bool
    parallel: bool
    takes_repeats: bool = False
    transport: Transport | None = None
    host: Host | None = None
    checks: Callable[[], None] | None = None
    places: tuple[Path, ...] = ()

    def check(self) -> None:
        """Look whether the store is what it was when it was opened.

        Raises:
            SinkError: it is not.
        """
        if self.checks is not None:
            self.checks()

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Have this thread wait for no longer than that for a file which somebody else has locked."""
        if self.checks is None:
            return contextlib.nullcontext()
        from mlflow_outbox_worker.mlflow_sink import database  # as below

        return database.within(seconds)

    def close(self) -> None:
        """Give back connections."""
        if self.transport is not None:
            self.transport.close()
        elif hasattr(self.store, "_dispose_engine"):
            from mlflow_outbox_worker.mlflow_sink import database  # as below

            database.let_go(self.store)


def open_store(
    uri: str,
    *,
    artifact_root: str | None,
    timeout: float,
    username: str | None,
    password: str | None,
    reads: bool = False,
) -> OpenStore:
    """Open the store of a tracking URI; the arguments are those of ``open_sink``, and of ``Transport``.

    Raises:
        DestinationError: the URI has no form that MLflow knows.
        SinkError: the store cannot be opened now.
    """
    scheme = scheme_of(uri)
    if scheme in {"http", "https"}:
        workspace = workspace_of(uri)
        transport = (
            WorkspaceTransport(timeout, workspace, reads=reads) if workspace else Transport(timeout, reads=reads)
        )
        return _server(uri, transport, username, password)
    with translated():
        if scheme == "databricks":
            transport = Transport(timeout, reads=reads)
            find = functools.partial(credentials.found, functools.partial(get_databricks_host_creds, uri))
            store = DatabricksStore(find, transport)
            return OpenStore(uri, store, Artifacts(uri), deduplicates_metrics=True, parallel=True, transport=transport)
        if scheme == "file":
            return _directory(uri, artifact_root)
        from mlflow_outbox_worker.mlflow_sink import database  # imports sqlalchemy, which the others do without

        # What is no file has no lock of SQLite's, and may let its opening wait, which no fork should.
        with _alone(), using_store() if scheme == "sqlite" else contextlib.nullcontext():
            uri, store, parallel = database.open_store(uri, artifact_root or str(Path("mlruns").absolute()), timeout)
        checks = functools.partial(database.check, store)
        return OpenStore(
            uri,
            store,
            Artifacts(uri),
            deduplicates_metrics=True,
            parallel=parallel,
            takes_repeats=store.takes_rows,
            checks=None if parallel else checks,
            places=database.places(store),
        )


def open_client(
    uri: str, *, artifact_root: str | None, timeout: float, username: str | None, password: str | None
) -> MlflowClient:
    """Return MLflow's client for a store that has answered one request; the arguments are those of ``open_sink``.

    Raises:
        DestinationError: the URI has no form that MLflow knows.
        SinkError: the store cannot be reached or opened now.
    """
    opened = open_store(uri, artifact_root=artifact_root, timeout=timeout, username=username, password=password)
    try:
        with translated():
            if opened.transport is not None:
                opened.store.search_experiments(max_results=1)
            with _file_store_allowed():  # the client builds its store when it is made, and keeps it
                return MlflowClient(tracking_uri=_client_uri(opened))
    finally:
        opened.close()


def scheme_of(uri: str) -> str:
    """Return "http", "https", "databricks", "file" or the name of a database.

    Raises:
        DestinationError: the URI has none of these forms.
    """
    if uri == "databricks":
        return uri
    scheme = uri.partition(":")[0].lower() if ":" in uri.partition("/")[0] else ""
    if len(scheme) <= 1:  # a path, on Windows with a drive
        return "file"
    if scheme in {"http", "https", "file", "databricks"}:
        return scheme
    if scheme.partition("+")[0] in DATABASE_ENGINES:
        return scheme.partition("+")[0]
    msg = f"a tracking URI that begins with {scheme!r} is not supported: use http(s), databricks, file or a database"
    raise DestinationError(msg)


def _server(uri: str, transport: Transport, username: str | None, password: str | None) -> OpenStore:
    try:
        host = Host(uri, username, password)
    except ValueError:  # its text may repeat the URI, and with it a password
        host = None
    if host is None or not host.netloc:
        msg = "the tracking URI names no host"
        raise DestinationError(msg)
    store = ServerStore(host.host_creds, transport)
    return OpenStore(
        host.uri,
        store,
        Artifacts(host.uri, host, store),
        deduplicates_metrics=True,
        parallel=True,
        transport=transport,
        host=host,
    )


def _directory(uri: str, artifact_root: str | None) -> OpenStore:
    place = Path(local_file_uri_to_path(uri)).absolute()
    root = path_to_local_file_uri(str(place))
    with _file_store_allowed():
        store = Directory(root, artifact_root or root)
    return OpenStore(root, store, Artifacts(root), deduplicates_metrics=False, parallel=False, places=(place,))


def _alone() -> AbstractContextManager[None]:
    """Build a store while no other thread does; a signal handler that builds one meanwhile gets a SinkError."""
    msg = "the call that was interrupted is still opening its store"
    return _building.held(lambda: SinkError(msg, kind="connection", sent=False))


@contextlib.contextmanager
def _file_store_allowed() -> Iterator[None]:
    """Let a FileStore be built although MLflow >= 3.13 asks for an environment variable first, and older ones warn.

    The variable is a question to the person who starts MLflow; who passes ``file:`` to this library has answered it.
    Setting it would change the environment of the host and of all its children, and a filter for the warning is
    state of the whole process too. So two names in the module of the store stand for something else while a store
    is built, under a lock, and for what they were right after.
    """
    with _alone():
        held = {name: getattr(file_store, name) for name in _STAND_INS if hasattr(file_store, name)}
        for name in held:
            setattr(file_store, name, _STAND_INS[name])
        try:
            yield
        finally:
            for name, value in held.items():
                setattr(file_store, name, value)


_STAND_INS = {
    "MLFLOW_ALLOW_FILE_STORE": types.SimpleNamespace(get=lambda: True),
    "warnings": types.SimpleNamespace(warn=lambda *_args, **_kwargs: None),
}


def _client_uri(opened: OpenStore) -> str:
    given = opened.host.credentials if opened.host is not None else None
    if given is None or given == tuple(read_mlflow_creds()):
        return opened.uri
    parts = urlsplit(opened.uri)
    userinfo = ":".join(quote(part, safe="") for part in given if part)
    return urlunsplit((parts.scheme, f"{userinfo}@{parts.netloc}", parts.path, "", ""))
