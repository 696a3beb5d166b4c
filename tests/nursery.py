"""A process that raises MLflow servers: it imports MLflow once, then forks a server in a fifth of a second when asked.

Started on its own, an MLflow server spends several seconds on importing MLflow and on creating its tables. The nursery
pays for both once per test session and serves all workers of the session. What it runs is MLflow's own application,
under uvicorn with the options of ``mlflow server --workers 1``, on SQLite, with artifacts served.

Requests arrive on a Unix socket, one JSON object on one line per connection, and are answered by one:

    {"do": "warm"}                            import, create the template and start the shared server
    {"do": "template"}                        -> {"path"}: a database with MLflow's tables and nothing in them
    {"do": "postgresql"}                      -> {"path"}: a stopped PostgreSQL with MLflow's tables and nothing in them
    {"do": "shared"}                          -> {"pid", "port", "directory"}: the server all tests share
    {"do": "serve", "directory", "port",      -> {"pid", "port"}: a server on ``directory``; port 0 picks one; with
     "users"}                                    MLflow's basic authentication if there are users
    {"do": "signal", "pid", "signal"}         -> {"alive"}: to the server's whole process group
    {"do": "end", "pid", "signal", "grace"}   -> {}: the same, SIGKILL after ``grace`` seconds; waits until it is gone

Standard input is the life line: when the session ends, however it ends, the nursery kills every server, removes
its directory and exits.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import select
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

#: Name and password of who may do everything on a server with users.
ADMINISTRATOR = ("admin", "the password of the tests")
#: Below the range that Linux and macOS give to outgoing connections, so that nobody takes the port of a killed server.
PORTS = range(20_000, 32_000)


class Nursery:
    """The servers of one test session and the process they are forked from."""

    def __init__(self, listener: socket.socket, directory: Path) -> None:
        self._listener = listener
        self._directory = directory
        self._template = directory / "template.db"
        self._postgresql: Path | None = None
        self._servers: set[int] = set()
        self._ports: set[int] = set()
        self._shared: dict[str, Any] | None = None

    def run(self) -> None:
        """Answer requests until standard input ends, then kill every server."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(sys.stdin, selectors.EVENT_READ)
            try:
                while all(key.fileobj is not sys.stdin for key, _ in selector.select()):
                    self._answer()
            finally:
                for pid in list(self._servers):
                    self.end(pid, signal.SIGKILL, 0)
                for directory in filter(None, (self._directory, self._postgresql)):
                    shutil.rmtree(directory, ignore_errors=True)

    def _answer(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            try:
                with connection.makefile("rb") as stream:
                    request = json.loads(stream.readline())
                answer = getattr(self, request.pop("do"))(**request)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the test that asked
                answer = {"error": repr(error)}
            # Who asks to warm up does not wait for the answer.
            with contextlib.suppress(ConnectionError):
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def warm(self) -> dict[str, Any]:
        """Have everything ready that tests with a server need."""
        self.shared()
        return {}

    def template(self) -> dict[str, Any]:
        """Create the template database once."""
        if not self._template.exists():
            _import_mlflow()
            pid = os.fork()
            if pid == 0:
                _become("migrations", self._directory)
                _migrate(self._template)
            os.waitpid(pid, 0)
        return {"path": str(self._template)}

    def postgresql(self) -> dict[str, Any]:
        """Create the PostgreSQL template once; beside the nursery's directory, which its user may not enter."""
        if self._postgresql is None:
            _import_mlflow()
            directory = Path(tempfile.mkdtemp(prefix="mlflow-outbox-postgresql-"))
            pid = os.fork()
            if pid == 0:
                _become("postgresql", self._directory)
                _make_postgresql(directory)
            if os.waitpid(pid, 0)[1]:
                shutil.rmtree(directory, ignore_errors=True)
                message = f"no PostgreSQL:\n{(self._directory / 'postgresql.log').read_text()}"
                raise RuntimeError(message)
            self._postgresql = directory
        return {"path": str(self._postgresql)}

    def shared(self) -> dict[str, Any]:
        """Start the shared server once."""
        if self._shared is None:
            directory = self._directory / "shared"
            directory.mkdir(mode=0o700)
            shutil.copyfile(self.template()["path"], directory / "mlflow.db")
            self._shared = self.serve(str(directory), 0) | {"directory": str(directory)}
        return self._shared

    def serve(self, directory: str, port: int, *, users: bool = False) -> dict[str, Any]:
        """Fork a server; it may take a moment until it answers."""
        _import_mlflow()
        listener = self._bind(port)
        port = listener.getsockname()[1]
        pid = os.fork()
        if pid == 0:
            _become("server", Path(directory), listener)
            _serve(listener, Path(directory), users=users)
        listener.close()
        self._servers.add(pid)
        return {"pid": pid, "port": port}

    def signal(self, pid: int, signal: int) -> dict[str, Any]:
        """Send a signal to a server that is still there."""
        if self._is_alive(pid):
            _send(pid, signal)
        return {"alive": self._is_alive(pid)}

    def end(self, pid: int, signal: int, grace: float) -> dict[str, Any]:
        """End a server and wait until the kernel has closed its connections."""
        if self.signal(pid, signal)["alive"]:
            _wait(pid, grace)
        if self._is_alive(pid):
            _send(pid, 9)
            os.waitpid(pid, 0)
            self._servers.discard(pid)
        return {}

    def _is_alive(self, pid: int) -> bool:
        # Only children not yet waited for count as servers, so a signal can never reach a stranger with an old number.
        if pid in self._servers and os.waitpid(pid, os.WNOHANG) != (0, 0):
            self._servers.discard(pid)
        return pid in self._servers

    def _bind(self, port: int) -> socket.socket:
        candidates = [port] if port else random.sample([one for one in PORTS if one not in self._ports], 100)
        for candidate in candidates:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", candidate))
            except OSError:
                listener.close()
            else:
                self._ports.add(candidate)
                return listener
        message = f"no port could be bound, of {candidates}"
        raise OSError(message)


def _import_mlflow() -> None:
    # One thread for linear algebra: nobody computes here, and threads do not survive a fork.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", DO_NOT_TRACK="true")
    for name in ("uvicorn", "mlflow.server.fastapi_app", "mlflow.store.tracking.sqlalchemy_store"):
        importlib.import_module(name)


def _send(pid: int, signal: int) -> None:
    try:
        os.killpg(pid, signal)
    except ProcessLookupError:  # forked a moment ago, not yet a group of its own
        os.kill(pid, signal)


def _wait(pid: int, seconds: float) -> None:
    """Wait until a child has ended, for so long at most."""
    ended = os.pidfd_open(pid)
    try:
        select.select([ended], [], [], seconds)
    finally:
        os.close(ended)


def _become(name: str, directory: Path, keep: socket.socket | None = None) -> None:
    """Turn a forked process into the leader of its own session, with a log and no socket of the nursery's."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    kept = keep.fileno() if keep else 2
    os.closerange(3, kept)
    os.closerange(kept + 1, 256)
    os.chdir(directory)


def _migrate(path: Path) -> NoReturn:
    try:
        from mlflow.store.db import utils

        unfinished = path.with_suffix(".unfinished")
        engine = utils.create_sqlalchemy_engine(f"sqlite:///{unfinished}")
        utils._initialize_tables(engine)
        engine.dispose()
        unfinished.rename(path)
    finally:
        os._exit(0)


def _make_postgresql(directory: Path) -> NoReturn:
    code = 1
    try:
        import postgresql

        postgresql.make_template(directory)
        code = 0
    except BaseException:
        traceback.print_exc()  # to the log
        raise
    finally:
        os._exit(code)


def _serve(listener: socket.socket, directory: Path, *, users: bool) -> NoReturn:
    try:
        import mlflow.server as names
        import uvicorn

        database = f"sqlite:///{directory / 'mlflow.db'}"
        os.environ.update(
            {
                names.BACKEND_STORE_URI_ENV_VAR: database,
                names.REGISTRY_STORE_URI_ENV_VAR: database,
                names.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
                names.ARTIFACTS_DESTINATION_ENV_VAR: str(directory / "artifacts"),
                names.SERVE_ARTIFACTS_ENV_VAR: "true",
            }
        )
        app = _with_users(directory) if users else importlib.import_module("mlflow.server.fastapi_app").app
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    finally:
        os._exit(0)


def _with_users(directory: Path) -> Any:
    """Return what ``mlflow server --app-name basic-auth`` runs; an administrator is made at its first start."""
    config = directory / "users.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{directory / 'users.db'}\n"
        f"admin_username = {ADMINISTRATOR[0]}\nadmin_password = {ADMINISTRATOR[1]}\n"
        "auth_cache_ttl_seconds = 60\n"  # else each request hashes a password, a quarter of a million times
    )
    os.environ.update(
        MLFLOW_AUTH_CONFIG_PATH=str(config), MLFLOW_FLASK_SERVER_SECRET_KEY="of tests", _MLFLOW_SGI_NAME="uvicorn"
    )
    from mlflow.server.auth import create_app

    return create_app()


if __name__ == "__main__":
    os.umask(0o077)
    Nursery(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])).run()
