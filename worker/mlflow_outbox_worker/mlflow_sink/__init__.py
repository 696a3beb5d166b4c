"""MLflow as a sink. Of the worker, nothing else imports mlflow; besides, only the plugin does, which MLflow loads.

``import mlflow`` costs seconds and hundreds of megabytes, so importing this package does not: ``open_sink`` and
``open_client`` import it when they are called, in the worker.

Rooms: ``stores`` opens the store of a URI, ``rest`` is the store of a tracking server with one attempt per request,
``transport`` makes that attempt within a deadline, with what ``rebound`` makes of MLflow's own function, ``artifacts``
moves files, ``recorder`` is the ``Sink`` made of them. Foreign exceptions become ``SinkError`` in ``boundary``; what a
request without an answer means, ``failures`` knows.

What the host of this library is spared: the environment, the global tracking URI and the logging configuration stay
as they are. MLflow's own loggers are silenced for the calling thread during a call, by the switch that MLflow's
handlers have for that; a host that replaced those handlers sees MLflow's messages, as it chose to. What ``import
mlflow`` itself does is not undone: it gives its own loggers handlers, and some versions set a variable of their own in
the environment.

Nothing is imported later than in ``prepare``, where MLflow is part of the program: a thread that looks for a module
while the program calls ``mlflow.autolog()`` would wait for it for ever, and it for the thread (``rebound``).

What MLflow keeps of special values: SQL stores, also behind a server, hold NaN as NaN, and plus and minus infinity
as plus and minus 1.7976931348623157e308; a file store holds all three as they are. Reading back returns what the
store holds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

from mlflow_outbox.errors import TrackingUnavailable
from mlflow_outbox_worker.forking import importing
from mlflow_outbox_worker.sink import Sink, SinkError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from mlflow import MlflowClient

__all__ = ["open_client", "open_sink", "prepare", "prepare_artifacts"]

#: What MLflow's repositories of artifacts import at their first use, by the scheme of the artifact URI.
_CLIENTS = {
    "s3": ("boto3", "botocore.client", "botocore.config"),
    "r2": ("boto3", "botocore.client", "botocore.config"),
    "b2": ("boto3", "botocore.client", "botocore.config"),
    "gs": ("google.auth", "google.cloud.storage"),
    "wasbs": ("azure.identity", "azure.storage.blob"),
    "wasb": ("azure.identity", "azure.storage.blob"),
    "abfss": ("azure.identity", "azure.storage.filedatalake"),
    "hdfs": ("pyarrow.fs",),
    "viewfs": ("pyarrow.fs",),
    "sftp": ("pysftp",),
    "dbfs": ("databricks.sdk",),
}


def prepare(uri: str) -> None:
    """Import in this thread what is used for a destination, so that no other thread has to.

    Args:
        uri: as for ``open_sink``.
    """
    _import_mlflow()
    from mlflow_outbox_worker.mlflow_sink import rebound, stores  # imports mlflow

    with importing():
        rebound.of_databricks()
        scheme = stores.scheme_of(uri)
        if scheme == "databricks":
            _import_if_there("databricks.sdk")
        elif scheme in {"http", "https"}:
            _prepare_authentication(uri)
        elif scheme != "file":
            _prepare_database(uri)


@functools.cache
def prepare_artifacts(scheme: str) -> None:
    """Import in this thread what files are stored with where their URI has this scheme."""
    with importing():
        for name in _CLIENTS.get(scheme, ()):
            _import_if_there(name)


def _prepare_authentication(uri: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds

    from mlflow_outbox_worker.mlflow_sink import credentials  # imports mlflow

    try:
        creds = credentials.found(lambda: get_default_host_creds(uri))
    except SinkError:  # the first request says what is wrong with them
        return
    if creds.aws_sigv4:
        _import_if_there("requests_auth_aws_sigv4")
    if getattr(creds, "auth", None):
        _import_if_there("mlflow.tracking.request_auth.registry")


def _prepare_database(uri: str) -> None:
    import sqlalchemy.exc
    from mlflow.store import db
    from sqlalchemy.engine import make_url

    importlib.import_module("mlflow_outbox_worker.mlflow_sink.database")
    for name in ("alembic.command", "alembic.config", *(f"{db.__name__}.{m.name}" for m in _modules(db))):
        _import_if_there(name)  # what migrations of its tables use
    with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, ImportError):  # opening it will say what is missing
        make_url(uri).get_dialect().import_dbapi()


def _modules(package: ModuleType) -> Iterable[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(package.__path__)


def _import_if_there(name: str) -> None:
    """Import a module; one that is missing is missed, and named, where it is used."""
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


def open_sink(
    uri: str,
    *,
    artifact_root: str | None = None,
    timeout: float = 30.0,
    username: str | None = None,
    password: str | None = None,
) -> Sink:
    """Open the tracking store of a URI; no request is made yet to a tracking server, an embedded store is opened.

    Args:
        uri: ``http(s)://``, a database URL, ``file:`` or a path, ``databricks`` or ``databricks://profile``. Relative
            paths are taken from the working directory now.
        artifact_root: where an embedded store keeps the artifacts of experiments it creates; None means what MLflow
            means: ``./mlruns`` for a database, the store's own directory for a file store.
        timeout: seconds that one request to a tracking server may take in all; an upload may take longer by the
            time that its size needs.
        username: user for basic authentication; None means the one in the URI, else MLflow's own sources.
        password: password that belongs to ``username``.

    Raises:
        DestinationError: the URI has no form that MLflow knows.
        SinkError: an embedded store cannot be opened now; ``outcome.classify(error, "open")`` tells what that means.
    """
    _import_mlflow()
    from mlflow_outbox_worker.mlflow_sink import recorder, stores  # imports mlflow

    opened = stores.open_store(uri, artifact_root=artifact_root, timeout=timeout, username=username, password=password)
    return recorder.Recorder(opened)


def open_client(
    uri: str,
    *,
    artifact_root: str | None = None,
    timeout: float = 5.0,
    username: str | None = None,
    password: str | None = None,
) -> MlflowClient:
    """Return MLflow's own client for the same store, after one request has shown that the store answers.

    The client is MLflow's: its calls retry for minutes when the server goes away later. A username given here, and
    not in MLflow's own sources, is put into the client's URI, because the client has no other place for it.

    Args:
        uri: as for ``open_sink``.
        artifact_root: as for ``open_sink``.
        timeout: seconds that the one request may take.
        username: as for ``open_sink``.
        password: as for ``open_sink``.

    Raises:
        DestinationError: the URI has no form that MLflow knows.
        TrackingUnavailable: the store cannot be reached or opened now.
    """
    _import_mlflow()
    from mlflow_outbox_worker.mlflow_sink import stores  # imports mlflow

    try:
        return stores.open_client(
            uri, artifact_root=artifact_root, timeout=timeout, username=username, password=password
        )
    except SinkError as error:
        msg = f"MLflow cannot be reached: {error}"
        raise TrackingUnavailable(msg) from None


def _import_mlflow() -> None:
    """Import mlflow and what lies under it, quietly: some of it announces itself to MLflow's loggers.

    A module inside of a package that another thread is importing may be imported beside that (Python waits for the
    package only where it is named itself), and then both threads can meet halves of modules, and fail. So whoever is
    at it is waited for, and not with forks held back, because that import may fork.
    """
    if "mlflow" in sys.modules:
        importlib.import_module("mlflow")
    with importing():
        from mlflow_outbox_worker.mlflow_sink.boundary import quiet  # imports mlflow

        with quiet():
            importlib.import_module("mlflow_outbox_worker.mlflow_sink.recorder")
