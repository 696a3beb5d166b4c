"""The worker as a process of its own, which outlives the experiment for as long as there is something to deliver.

The experiment starts ``python -m mlflow_outbox_worker DIRECTORY`` in a session of its own, so that neither ctrl-C nor
the killing of the experiment's process group ends it. Settings and credentials go through a pipe to its standard
input, never over a command line. The
pipe stays open: what changes in the experiment's environment comes over it, such as a token that is renewed, and its
end of file tells the worker that the experiment is gone, whichever way it went. The worker then
delivers what is left for at most ``linger`` seconds and exits. It shares the experiment's standard error, and lets go
of it then if that is a pipe: ``tee``, or a program that runs the experiment, would wait for it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import stat
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.settings import Settings, environment_for_child
from mlflow_outbox.spool import private
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import interpreter
from mlflow_outbox_worker.deputy import Deputy, Page, passed_on
from mlflow_outbox_worker.priority import stand_back

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox_worker.delivery import Delivery
    from mlflow_outbox_worker.thread import ThreadWorker

#: Seconds between two tries to start a thread.
_AGAIN: Final = 1.0
#: The exit code of a process whose loop has ended.
_LOST: Final = 70


class _Outliving(subprocess.Popen[bytes]):
    """A process that goes on when nobody here knows of it any more, for which Python's own class warns."""

    def __del__(self, _warn: Callable[..., object] = lambda *_args, **_named: None) -> None:
        """Leave it to ``subprocess`` to fetch its end, without a warning; the default is there to the very last."""
        super().__del__(_warn=_warn)  # type: ignore[call-arg]  # it has the argument; the stubs do not say so


class ProcessWorker:
    """A worker process, as the experiment sees it.

    Args:
        process: the process.
        pipe: its standard input.
        deputy: syncs for this process, by that one.
        environment: that it was started with.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], pipe: IO[bytes], deputy: Deputy | None, environment: dict[str, str]
    ) -> None:
        self._process = process
        self._pipe = pipe
        self._deputy = deputy
        self._environment = environment
        self._unsent = b""
        self._telling = threading.RLock()  # a signal handler may stop this while its thread is at it
        self._is_telling = self._is_over = False
        self._pid = os.getpid()
        os.set_blocking(pipe.fileno(), False)
        weakref.finalize(self, pipe.close).atexit = False  # of one that ended, and was replaced

    def __repr__(self) -> str:
        return f"<ProcessWorker {self._process.pid}, {'alive' if self.is_alive() else 'ended'}>"

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    @property
    def end(self) -> str:
        """How it ended."""
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def wake(self) -> None:
        """Do nothing: the process hears the doorbell by itself."""

    def look(self) -> None:
        """Tell the process what has changed in the environment."""
        if not self._telling.acquire(blocking=False):
            return  # another thread is at it
        is_within, self._is_telling = self._is_telling, True
        try:
            if is_within:  # a signal handler, in the middle of this
                return
            now, before = environment_for_child(), self._environment
            if now != before:
                self._unsent += line_of(before, now)
                self._environment = now
            if self._unsent:
                self._unsent = self._unsent[os.write(self._pipe.fileno(), self._unsent) :]
        except (OSError, ValueError):  # no room, and later; or it is gone; or this is the end, and the pipe is closed
            pass
        finally:
            self._is_telling = is_within
            if self._is_over:
                self._close()
            self._telling.release()

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether the process syncs these segments; have it do so from now on."""
        return self._deputy is not None and self._deputy.syncs(segments)

    def stop(self, timeout: float) -> None:  # noqa: ARG002 - the process decides by itself when it is done
        """Tell the process that this one is done; it goes on until everything is delivered or its time is up."""
        self._is_over = True
        with self._telling:
            self._close()
        if self._deputy is not None:
            self._deputy.close()

    def _close(self) -> None:
        if not self._is_telling:  # or its number may be another file's when it is written to
            with contextlib.suppress(OSError):
                self._pipe.close()


def start(outbox: Outbox, *, linger: float | None = None) -> ProcessWorker | ThreadWorker:
    """Start a worker process for an outbox; a thread of this one, which says so, where there is nothing to start.

    Args:
        outbox: what to deliver.
        linger: seconds that it goes on after this process; None means the setting.

    Raises:
        OSError: no process can be started.
        RuntimeError: no thread can be started any more.
    """
    if not interpreter.is_there():
        from mlflow_outbox_worker import thread  # here alone, for what the program does not need it does not import

        return thread.start(outbox)
    directory, error, environment = outbox.directory, interpreter.standard_error(), environment_for_child()
    with passed_on(outbox.settings, network=directory.network) as deputy, private.streams_taken():  # for the pipe
        process = _Outliving(
            [*interpreter.command("mlflow_outbox_worker"), str(directory.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=error,
            env=interpreter.environment(),
            pass_fds=deputy.numbers if deputy else (),
            start_new_session=True,
        )
        note = note_of(outbox, linger, deputy)
    pipe = process.stdin
    assert pipe is not None  # noqa: S101 - for the type checker: PIPE was asked for
    try:
        pipe.write(note)
        pipe.flush()
    except OSError:  # raised again: it is gone already
        with contextlib.suppress(OSError):
            pipe.close()
        raise
    return ProcessWorker(process, pipe, deputy, environment)


def note_of(outbox: Outbox, linger: float | None = None, deputy: Deputy | None = None) -> bytes:
    """Return what a process that delivers an outbox has to know of it, in one line, credentials included."""
    settings = {
        field.name: str(value) if isinstance(value, Path) else value
        for field in dataclasses.fields(outbox.settings)
        if (value := getattr(outbox.settings, field.name)) is not None
    }
    if linger is not None:
        settings["linger"] = linger
    note: dict[str, object] = {"settings": settings, "uri": outbox.destination.secret_uri}
    if outbox.restarts.are_vain:
        note["again"] = True
    if deputy is not None:
        note["substitute"] = deputy.numbers
    return json.dumps(note).encode() + b"\n"


def line_of(before: dict[str, str], now: dict[str, str]) -> bytes:
    """Return what a process of ours has to be told of a change of the environment, in one line."""
    changed: dict[str, str | None] = {name: None for name in before if name not in now}
    changed.update({name: value for name, value in now.items() if before.get(name) != value})
    return json.dumps({"environment": changed}).encode() + b"\n"


def take_over(line: bytes) -> None:
    """Make this process's environment what it was told of.

    Raises:
        ValueError: half of the line is missing.
    """
    for name, value in json.loads(line)["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Noted(NamedTuple):
    """What a note says."""

    directory: OutboxDirectory
    destination: Destination
    settings: Settings
    substitute: Sequence[int] = ()

    def substitute_for_the_program(self, counters: Counters) -> None:
        """Sync for the program from now on, if it has given this process a way to ask for that.

        To be called when all else has its threads: where there is none left the program does without this.

        Args:
            counters: where a sync that fails is counted, and that there can be none.
        """
        if not self.substitute:
            return
        try:
            self._begin_to_substitute(counters)
        except (OSError, RuntimeError):  # no memory, no thread; or what has started this gave no descriptors on
            counters.add("substitute_not_started")

    def _begin_to_substitute(self, counters: Counters) -> None:
        from mlflow_outbox_worker.substitute import Substitute  # what the program does not need it does not import

        for fd in self.substitute:
            os.set_inheritable(fd, False)  # noqa: FBT003 - its only argument
        with contextlib.ExitStack() as held:
            connection = held.enter_context(socket.socket(fileno=self.substitute[0]))
            answers = held.enter_context(contextlib.closing(Page(self.substitute[1])))
            Substitute(connection, answers, self.directory.runs, self.settings.sync_interval, counters).start()
            held.pop_all()
        answers.close()


def noted(path: Path, line: bytes) -> Noted:
    """Return what ``note_of`` wrote down.

    Args:
        path: the outbox.
        line: the note; empty when the starter was gone before it wrote one.

    Raises:
        OutboxUnusable: the outbox cannot be used any more.
    """
    note: dict[str, Any] = json.loads(line or b"{}")
    given = note.get("settings", {})
    for name in ("root", "ledger_dir"):
        if given.get(name) is not None:
            given[name] = Path(given[name])
    directory = OutboxDirectory.open(path)
    destination = dataclasses.replace(directory.destination, secret_uri=note.get("uri") or "")
    return Noted(directory, destination, Settings(**given), note.get("substitute", ()))


def started(thread: threading.Thread, counters: Counters) -> bool:
    """Start a thread once there is one left; return False if whoever started this process is gone before that.

    Args:
        thread: what is to run in it.
        counters: where each try in vain is counted, and said once.
    """
    parent = os.getppid()
    while True:
        try:
            thread.start()
        except RuntimeError as error:
            counters.add("threads_not_started")
            counters.warn_once("thread", f"mlflow-outbox: delivery waits for a thread ({error}); events stay on disk")
        else:
            return True
        time.sleep(_AGAIN)
        if os.getppid() != parent:
            return False


def deliver_or_end(delivery: Delivery) -> None:
    """Deliver in this thread; end the process if that ends unasked, as for want of memory to go on after an error.

    Its program, which hears of nothing but the end of the process, starts another one then.
    """
    try:
        delivery.run()
    finally:
        if not delivery.is_stopped():
            os._exit(_LOST)


def serve(path: Path, source: IO[bytes]) -> int:
    """Be the worker process: deliver until the starter is gone and nothing is left, or the time for that is up.

    Args:
        path: the outbox.
        source: the pipe from the starter.

    Returns:
        The exit code: 0 when everything was delivered.
    """
    # Here and not above: the experiment, which only starts the process, must not pay for it.
    from mlflow_outbox_worker.delivery import Delivery
    from mlflow_outbox_worker.flush import Watch
    from mlflow_outbox_worker.surroundings import open_sink

    stand_back()
    counters, line = Counters(), source.readline()
    try:
        found = noted(path, line)
    except OutboxUnusable as error:
        if not json.loads(line or b"{}").get("again"):  # those before this one have said so
            counters.warn_once("outbox", f"mlflow-outbox: delivery: {printable(str(error), 300)}")
        return 1
    directory, destination, settings, _ = found
    delivery = Delivery(directory, destination, settings, counters, kind="process", open_sink=open_sink)
    worker = threading.Thread(target=deliver_or_end, args=(delivery,), name="mlflow-outbox-worker", daemon=True)
    if not started(worker, counters):
        return 1
    found.substitute_for_the_program(counters)
    with contextlib.suppress(OSError, ValueError):  # it was killed in the middle of a line
        for line in source:
            take_over(line)
    _let_go_of_standard_error()
    last = stopwatch.seconds() + settings.linger
    result = Watch(directory, settings).until_delivered(settings.linger)
    while delivery.is_settling() and stopwatch.seconds() < last:
        time.sleep(0.1)
    delivery.stop()
    worker.join(1.0)
    return 0 if result else 1


def _let_go_of_standard_error() -> None:
    """Give back the starter's standard error if that is a pipe, whose reader may wait for the end of the program."""
    with contextlib.suppress(OSError):
        kind = os.fstat(2).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 2)
            os.close(nothing)
