"""Tracking URIs: where an outbox delivers to, without the credentials that open it.

A destination is what identifies an outbox, so two spellings of one place must give one destination: relative paths
are made absolute against the current directory, user names, passwords and secret query arguments are taken off. What
was taken off stays in memory, and reaches a process that delivers through a pipe or a socket; it is never written,
logged or shown.

A workspace of a tracking server is a place of its own: what was logged for one must not arrive in another because a
later process, which delivers it, has no ``MLFLOW_WORKSPACE``. It is a part of the URI here, ``#workspace=NAME``, which
MLflow does not know; ``place_of`` is the URI without it.

The default follows MLflow: ``MLFLOW_TRACKING_URI``, else the local ``mlruns`` directory. Since MLflow 3.13 that
directory holds a SQLite store (``mlruns/mlflow.db``, artifacts beside it) unless it already holds a file store's
experiments.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from types import NoneType
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode, urlsplit, urlunsplit

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import DestinationError

_SQL: Final = frozenset({"sqlite", "postgresql", "mysql", "mssql"})
_SECRET: Final = re.compile(r"pass|pwd|secret|token|key|cred|^(user(name| ?id)?|uid)$", re.IGNORECASE)
#: The parts of ODBC's own form of an address, which is one argument of a URI; a value in braces may hold a ";".
_ODBC: Final = re.compile(r"([^=;]+)=(\{(?:[^}]|\}\})*\}[^;]*|[^;]*)")
_PREFIX: Final = "outbox+"
_PORTS: Final = {"http": 80, "https": 443}
#: User and password as SQLAlchemy reads them: the password ends at the first "@", whatever is in it.
_USER: Final = re.compile(r"//[^:/]*(?::[^@]*)?@")
#: What stands behind the "#" of a tracking server's URI; any other words there say nothing, and may be a secret.
_WORKSPACE: Final = re.compile(r"workspace=([\w.~%\-]+)", re.ASCII)
#: Characters of a slug before its digest.
_SLUG_CHARS: Final = 48


@dataclasses.dataclass(frozen=True)
class Destination:
    """A tracking store.

    Attributes:
        uri: the tracking URI without credentials, absolute.
        artifact_root: where an embedded store puts artifacts, as a path; "" lets the store decide.
        secret_uri: the URI as it was given, with credentials; not part of repr or comparison.
    """

    uri: str
    artifact_root: str = ""
    secret_uri: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def scheme(self) -> str:
        """The URI's scheme, for instance "http", "sqlite", "file" or "databricks"."""
        return self.uri.split(":", 1)[0].split("+", 1)[0]

    @property
    def slug(self) -> str:
        """A directory name for the destination: readable, and unique by a digest of the whole URI."""
        words = re.sub(r"[^A-Za-z0-9]+", " ", unquote(self.uri)).split()
        while len(words) > 2 and len("-".join(words)) > _SLUG_CHARS:  # noqa: PLR2004 - the scheme and the last word stay
            del words[1]
        return f"{'-'.join(words)[:_SLUG_CHARS]}-{hashlib.sha256(self.uri.encode()).hexdigest()[:8]}"


def resolve(
    tracking_uri: str | os.PathLike[str] | None, *, default: str | None = None, workspace: str | None = None
) -> Destination:
    """Return the destination that a tracking URI names.

    Args:
        tracking_uri: what MLflow takes as a tracking URI; None means default.
        default: the tracking URI of the environment; None or "" means the local ``mlruns`` directory.
        workspace: the one of the environment, for a tracking server whose URI names none.

    Raises:
        DestinationError: the URI has no scheme that MLflow knows, or what it names depends on the current directory,
            which is gone, or has a name that is no UTF-8, or it is no URI at all.
    """
    if not isinstance(tracking_uri, (str, os.PathLike, NoneType)):
        msg = f"the tracking URI is a {type(tracking_uri).__name__}; give a text or a path"
        raise DestinationError(msg)
    try:
        found = _resolved(tracking_uri, default)
        if workspace and workspace.strip() and found.scheme in _PORTS and not workspace_of(found.uri):
            found = _in_workspace(found, workspace.strip())
        found.uri.encode()
    except FileNotFoundError as error:
        msg = (
            f"the tracking URI cannot be used, as where it keeps its files depends on the current directory, which is "
            f"gone ({error.strerror}); change to one that exists"
        )
        raise DestinationError(msg) from None
    except UnicodeEncodeError as error:
        msg = f"the tracking URI cannot be used, as the name {printable(error.object, 300)!r} is no UTF-8; give another"
        raise DestinationError(msg) from None
    except DestinationError:
        raise
    except RuntimeError as error:  # of a "~" that is nobody's
        msg = f"the tracking URI begins in a home that is not known ({error}); give a whole path"
        raise DestinationError(msg) from None
    except ValueError:  # of ``urlsplit``, whose words may hold the password
        msg = "the tracking URI names no host as URIs do; write special characters of a user or password as %XX"
        raise DestinationError(msg) from None
    return found


def _resolved(tracking_uri: str | os.PathLike[str] | None, default: str | None) -> Destination:
    is_given = bool(tracking_uri.strip()) if isinstance(tracking_uri, str) else tracking_uri is not None
    given = tracking_uri if is_given else (default or None)
    if given is None:
        return _local_default(Path.cwd() / "mlruns")
    if isinstance(given, os.PathLike):
        return _file_store(Path(given))
    text = given.strip().removeprefix(_PREFIX)
    scheme, colon, rest = text.partition(":")
    if scheme.lower() in {"http", "https", "file"}:
        scheme = scheme.lower()
    if scheme == "databricks" and not rest.strip("/"):  # with a colon for MLflow, which else takes it for a path
        return Destination(scheme)
    if scheme == "databricks" and rest.startswith("//"):
        return Destination(text)
    if not colon or os.path.isabs(text):
        return _file_store(Path(text or "mlruns"))
    if scheme == "file":
        return _file_store(Path(unquote(urlsplit(text).path) or "mlruns"))
    if scheme in {"http", "https"}:
        return _server(text)
    if scheme.split("+", 1)[0] == "sqlite":
        return _sqlite(text)
    if scheme.split("+", 1)[0] in _SQL:
        return _database(text)
    msg = (
        f"the tracking URI has the scheme {printable(scheme)!r}; "
        "use http(s)://, sqlite:///, postgresql://, file:, a directory, or databricks"
    )
    if rest[:1].isdigit():  # a host and its port
        msg += "; a server's address begins with http:// or https://"
    raise DestinationError(msg)


def _local_default(directory: Path) -> Destination:
    if holds_file_store(directory):
        return _file_store(directory)
    uri = f"sqlite:///{quote(str(directory / 'mlflow.db'), safe='/')}"
    return Destination(uri, str(directory), uri)


def holds_file_store(directory: Path) -> bool:
    """Return whether a directory already holds experiments of MLflow's file store."""
    try:
        with os.scandir(directory) as entries:
            return any(entry.name.isdigit() and os.path.lexists(f"{entry.path}/meta.yaml") for entry in entries)
    except OSError:
        return False


def _file_store(path: Path) -> Destination:
    uri = Path(os.path.abspath(path.expanduser())).as_uri()
    return Destination(uri, "", uri)


def _server(text: str) -> Destination:
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or "@" in parts.path + parts.fragment:
        # What was given is not shown: of a password with a "/" or "#" in it, some may be left.
        msg = f"the {parts.scheme} tracking URI names no host with a valid port; write special characters as %XX"
        raise DestinationError(msg)
    netloc = f"[{host}]" if ":" in host else host
    netloc = f"{netloc}:{port}" if port and port != _PORTS[parts.scheme] else netloc
    path = parts.path.rstrip("/")
    workspace = parts.fragment if _WORKSPACE.fullmatch(parts.fragment) else ""
    uri, secret = (urlunsplit((parts.scheme, place, path, "", workspace)) for place in (netloc, parts.netloc))
    return Destination(uri, "", secret)


def workspace_of(uri: str) -> str:
    """Return the workspace in the URI of a tracking server; "" when it names none."""
    found = _WORKSPACE.fullmatch(uri.partition("#")[2])
    return unquote(found[1]) if found is not None else ""


def place_of(uri: str) -> str:
    """Return the URI as MLflow knows it: that of a tracking server without a workspace."""
    return uri.partition("#")[0] if workspace_of(uri) else uri


def as_mlflow_reads(uri: str) -> str:
    """Return the URI of a destination as MLflow is to be given it: without a workspace, an SQLite file's path as it is.

    MLflow makes the directory of that file by the text of the URI, and SQLAlchemy decodes it since 2.1 only: of
    ``My%20Runs`` they made an empty database beside ``My Runs``. A path with a "%" or "?" has no other form.
    """
    scheme, begin, path = place_of(uri).partition(":///")
    plain = unquote(path)
    is_plain = scheme.partition("+")[0] == "sqlite" and "%" not in plain and "?" not in plain
    return f"{scheme}{begin}{plain}" if is_plain else place_of(uri)


def _in_workspace(found: Destination, workspace: str) -> Destination:
    end = f"#workspace={quote(workspace, safe='')}"
    return dataclasses.replace(found, uri=found.uri + end, secret_uri=found.secret_uri + end)


def _sqlite(text: str) -> Destination:
    scheme, _, path = text.partition("///")
    scheme = "sqlite:" if scheme == "sqlite+pysqlite:" else scheme  # the driver that is taken without a name
    path, _, query = path.partition("?")
    path = unquote(path)
    if not path or ":memory:" in path or "mode=memory" in query:
        msg = (
            f"the tracking URI {printable(text)!r} is a database in memory, which ends with its program, and nothing "
            "that waits can be delivered to it; use sqlite:///path/to/mlflow.db"
        )
        raise DestinationError(msg)
    absolute = os.path.abspath(os.path.expanduser(path))
    uri = f"{scheme}///{quote(absolute, safe='/')}"
    local = Path.cwd() / "mlruns"  # MLflow's default for an embedded database, which depends on the current directory
    root = Path(absolute).parent if Path(absolute).parent == local else local
    return Destination(uri, str(root), uri)


def _database(text: str) -> Destination:
    user = _USER.search(text)
    begin, rest = (text[: user.end() - 1], text[user.end() :]) if user is not None else ("", "")
    parts = urlsplit(_USER.sub("//", text, count=1))  # a "#" or "/" in a password would end the host here
    if "@" in parts.path + parts.fragment:
        msg = f"the {parts.scheme} tracking URI names no host; write special characters of a password as %XX"
        raise DestinationError(msg)
    more, at, _ = parts.netloc.rpartition("@")
    if at:  # of the password too: left as it is, it would be taken for a part of the host, and be told with it
        text = f"{begin}%40{more.replace('@', '%40')}{rest[len(more) :]}"
    query = urlencode([(key, _bare(key, value)) for key, value in parse_qsl(parts.query) if not _SECRET.search(key)])
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))
    return Destination(bare, str(Path.cwd() / "mlruns"), text)


def _bare(key: str, value: str) -> str:
    """Return the value of an argument of a database's URI without the login that ODBC's own form of an address has."""
    if key.lower() != "odbc_connect":
        return value
    held = _ODBC.findall(unquote_plus(value))  # once more, as SQLAlchemy reads it
    bare = ";".join(f"{name.strip()}={text}" for name, text in held if not _SECRET.search(name.strip()))
    return bare.replace("%", "%25").replace("+", "%2B")  # for it is read so again


def with_credentials(destination: Destination, environment_uri: str | None) -> Destination:
    """Return the destination with the credentials of ``MLFLOW_TRACKING_URI``, when that names the same place.

    Args:
        destination: as read from an outbox, so without credentials.
        environment_uri: the value of ``MLFLOW_TRACKING_URI``, in whichever workspace.
    """
    if not environment_uri:
        return destination
    try:
        candidate = resolve(environment_uri)
    except DestinationError:
        return destination
    # Its artifact root depends on where this process was started.
    if place_of(candidate.uri) != place_of(destination.uri):
        return destination
    workspace = destination.uri[len(place_of(destination.uri)) :]
    return dataclasses.replace(destination, secret_uri=place_of(candidate.secret_uri) + workspace)


def named_for(recorded: Destination | None, given: Destination) -> Destination:
    """Return where what an outbox holds is to go; a server that is named without a workspace is the outbox's own.

    Args:
        recorded: where the outbox delivers to, if that is known.
        given: what a person has named.
    """
    if recorded is None or workspace_of(given.uri) or given.uri != place_of(recorded.uri):
        return given
    return with_credentials(recorded, given.secret_uri or given.uri)
