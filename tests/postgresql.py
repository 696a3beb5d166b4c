"""A real PostgreSQL server of the tests' own, on loopback, where its programs are installed."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import eventually, unused_port

#: Where distributions put what is not for everybody's path.
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin")
#: Durability against a power cut costs the tests time and shows them nothing; what was committed must survive a kill.
_FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB"}


@functools.cache
def programs() -> Path | None:
    """Return the directory of PostgreSQL's programs, the newest ones, or None."""
    found = [Path(path).parent for name in ("initdb",) if (path := shutil.which(name))]
    for pattern in _PLACES:
        found += sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    return next((place for place in found if (place / "initdb").exists() and (place / "postgres").exists()), None)


@functools.cache
def missing() -> str:
    """Return what would be needed for tests with a real PostgreSQL, or "" when it is there."""
    if programs() is None:
        return "PostgreSQL's programs initdb and postgres"
    if os.geteuid() == 0 and _user() is None:
        return "a user postgres or nobody, because PostgreSQL does not run as root"
    return ""


def _user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


class PostgreSQL:
    """One server; ``start`` and ``kill`` may be called again and again.

    Args:
        directory: an empty one, which its own user may enter.
        template: a directory of another server, stopped, whose data are copied; None begins with none.
    """

    def __init__(self, directory: Path, template: Path | None = None) -> None:
        self._directory = directory
        self._data = directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = unused_port()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _user()
            assert user is not None, missing()
            os.chown(directory, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        if template is not None:
            subprocess.run(["cp", "-a", str(template / "data"), str(self._data)], check=True)
            return
        options = ["--no-sync", "--wal-segsize=1"]  # in MB: there is less to copy
        self._run("initdb", "-D", str(self._data), "-U", "mlflow", "--auth", "trust", "-E", "UTF8", *options)

    @property
    def uri(self) -> str:
        """The tracking URI of its one database."""
        return f"postgresql://mlflow@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = {**_FAST, "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": ""}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program("postgres"), "-D", str(self._data), *settings],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as,
            )
        eventually(self._answers, 60, f"PostgreSQL answers; see {self._directory / 'log'}")

    def _answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri).close()
        except psycopg2.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """End it at once, as a crash does: all its connections break."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(30)

    def stop(self) -> None:
        """End it in order, so that its data may be copied."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait(30)

    def _program(self, name: str) -> str:
        place = programs()
        assert place is not None, missing()
        return str(place / name)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._program(name), *arguments], cwd=self._directory, check=True, capture_output=True, **self._as
        )


def make_template(directory: Path) -> None:
    """Make a server's directory with MLflow's tables and nothing in them, for others to be copied from.

    Args:
        directory: an empty one.
    """
    from mlflow.store.db import utils

    server = PostgreSQL(directory)
    server.start()
    try:
        engine = utils.create_sqlalchemy_engine(server.uri)
        utils._initialize_tables(engine)
        engine.dispose()
    finally:
        server.stop()


@contextlib.contextmanager
def running(template: Path) -> Iterator[PostgreSQL]:
    """Start a server on a copy of a template, and end it and delete what it kept afterwards."""
    with tempfile.TemporaryDirectory(prefix="mlflow-outbox-postgresql-") as directory:
        server = PostgreSQL(Path(directory), template)
        try:
            server.start()
            yield server
        finally:
            server.kill()
