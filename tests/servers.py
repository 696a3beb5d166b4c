"""Real MLflow servers for tests, and the one way in which tests wait."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nursery import PORTS

T = TypeVar("T")

#: Seconds in which a forked server answers; the first one of a session waits for the import of MLflow before.
START_TIMEOUT = 60.0
#: Seconds in which the nursery answers: it does one thing at a time, and begins with importing MLflow and making
#: databases.
_ASK_TIMEOUT = 240.0


def eventually(condition: Callable[[], T], timeout: float = 60.0, message: str | Callable[[], str] = "") -> T:
    """Wait until a condition is true and return its value.

    Args:
        condition: called again and again, at first after milliseconds; its exceptions are the test's.
        timeout: seconds after which the test fails, from the end of the first look: that may be the one that imports
            MLflow, for half a minute where others do so too.
        message: what the test waited for, when the condition's name does not tell; or what says so at the end.

    Raises:
        AssertionError: the condition was still false at the end.
    """
    deadline = math.inf
    pause = 0.002
    never = threading.Event()
    while not (value := condition()):
        now = time.monotonic()
        deadline = min(deadline, now + timeout)
        if now > deadline:
            what = (message if isinstance(message, str) else message()) or getattr(
                condition, "__name__", repr(condition)
            )
            failure = f"not within {timeout} s: {what} (last value {value!r})"
            raise AssertionError(failure)
        never.wait(pause)
        pause = min(pause * 1.5, 0.05)
    return value


def unused_port() -> int:
    """Return a port on which nobody listens, and which no outgoing connection is given.

    Raises:
        OSError: there is none.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    message = f"no port could be bound, of {PORTS}"
    raise OSError(message)


class NurseryClient:
    """Asks the session's nursery (see ``nursery``) for servers; any process of the session can."""

    def __init__(self, address: str) -> None:
        self.address = address

    @classmethod
    def start(cls) -> tuple[NurseryClient, Callable[[], None]]:
        """Start the nursery; return a client and the function that ends the nursery with all its servers."""
        # Not pytest's own directory: the path of a Unix socket has room for about 100 characters.
        directory = Path(tempfile.mkdtemp(prefix="mlflow-outbox-tests-"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "nursery"))
        listener.listen(64)
        script = Path(__file__).with_name("nursery.py")
        with listener, (directory / "nursery.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(script), str(listener.fileno()), str(directory)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # an interrupt at the terminal is for pytest, which then ends the nursery
            )

        def end() -> None:
            if process.stdin:
                process.stdin.close()
            process.wait(120)

        return cls(str(directory / "nursery")), end

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and return the nursery's answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ASK_TIMEOUT)
            connection.connect(self.address)
            connection.sendall(json.dumps({"do": do, **request}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the nursery is gone"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def warm(self) -> None:
        """Let the nursery import MLflow and start the shared server, without waiting for it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
            connection.sendall(b'{"do": "warm"}\n')

    def shared_server(self) -> MlflowServer:
        """Return the server that all tests of the session share."""
        answer = self.ask("shared")
        server = MlflowServer(self, Path(answer["directory"]), answer["port"], answer["pid"])
        server.wait_until_ready()
        return server

    def postgresql(self) -> Path:
        """Return the directory of a PostgreSQL with MLflow's tables and nothing in them, to start copies of."""
        return Path(self.ask("postgresql")["path"])

    def empty_database(self, path: Path) -> Path:
        """Create an SQLite database with MLflow's tables, and nothing in them, at ``path``."""
        shutil.copyfile(self.ask("template")["path"], path)
        return path


class MlflowServer:
    """A real MLflow server with a database and artifacts of its own, in a process group of its own.

    Args:
        nursery: forks it.
        directory: where it keeps everything.
        port: where it listens; 0 picks one.
        pid: of the process, if it runs.
        users: whether it knows users and their rights.
    """

    def __init__(
        self, nursery: NurseryClient, directory: Path, port: int = 0, pid: int = 0, *, users: bool = False
    ) -> None:
        self.directory = directory
        self._users = users
        self.port = port
        self._nursery = nursery
        self._pid = pid

    @property
    def url(self) -> str:
        """The server's address, which is its tracking URI."""
        return f"http://127.0.0.1:{self.port}"

    uri = url

    @property
    def database_uri(self) -> str:
        """The store behind the server, for a look at what it has recorded without asking it."""
        return f"sqlite:///{self.directory / 'mlflow.db'}"

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "server.log").read_text()
        return ""

    def start(self, *, wait: bool = True) -> None:
        """Start the server, on the port and the database it had before if it was started before."""
        if not (self.directory / "mlflow.db").exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._nursery.empty_database(self.directory / "mlflow.db")
        answer = self._nursery.ask("serve", directory=str(self.directory), port=self.port, users=self._users)
        self._pid, self.port = answer["pid"], answer["port"]
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            AssertionError: it ended instead, or does not answer in time; with the server's log.
        """

        def answers() -> bool:
            assert self.is_alive(), f"the MLflow server ended:\n{self.log}"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        eventually(answers, START_TIMEOUT, f"the MLflow server answers\n{self.log}")

    def warm_up(self) -> None:
        """Have the server answer a first question about its database, which takes longer than all later ones."""
        url = f"{self.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        with urllib.request.urlopen(url, timeout=START_TIMEOUT) as answer:
            answer.read()

    def is_alive(self) -> bool:
        """Tell whether the process is there, paused or not."""
        return bool(self._nursery.ask("signal", pid=self._pid, signal=0)["alive"])

    def kill(self) -> None:
        """SIGKILL to the whole process group; returns when it is gone."""
        self._nursery.ask("end", pid=self._pid, signal=int(signal.SIGKILL), grace=5.0)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL five seconds later to one that does not end; returns when it is gone."""
        self._nursery.ask("end", pid=self._pid, signal=int(signal.SIGTERM), grace=5.0)

    def restart(self) -> None:
        """Kill the server if it runs and start it on the same port and database."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Kill the server and delete all it knows; ``start()`` then brings up an empty one at the same address."""
        self.kill()
        for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal"):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self.directory / "artifacts", ignore_errors=True)

    def pause(self) -> None:
        """SIGSTOP: connections are still accepted by the kernel, and nothing is answered."""
        self._nursery.ask("signal", pid=self._pid, signal=int(signal.SIGSTOP))

    def resume(self) -> None:
        """SIGCONT, after a pause."""
        self._nursery.ask("signal", pid=self._pid, signal=int(signal.SIGCONT))


def forget_mlflow_variables() -> None:
    """Remove every MLFLOW_* variable from this process, and MLflow's telemetry with them."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "_MLFLOW_"))]:
        del os.environ[name]
    os.environ["DO_NOT_TRACK"] = "true"
