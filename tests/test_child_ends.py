"""The two ends of the socket between a program and the child that delivers for it, and who else could have one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from contents import numbered, points, the_run
from mlflow_outbox.counters import Counters
from mlflow_outbox_worker import interpreter, process
from mlflow_outbox_worker.child.process import Child
from servers import eventually
from spools import make_outbox, warnings

_DAEMON = """
import os, sys
from mlflow_outbox import MLflowTracker
from servers import eventually

tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3])
run = tracker.start_run("daemon")
eventually(lambda: tracker.flush(0).delivered, 60)
for stream in range(3):
    try:
        os.write(stream, b"a library's warning\\n")
    except OSError:
        pass
run.log_metric("loss", 0.0, step=0)
run.end()
left, counters = tracker.close(60), tracker.counters
os._exit(0 if left and not counters.get("children_lost") else 3)
"""


def test_no_socket_to_a_child_takes_the_place_of_a_standard_stream_that_is_closed(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """What the libraries of a daemon print would be told to the child, which ends at what it does not understand."""
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", _DAEMON]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([*command, experiment_name, sqlite_uri, str(tmp_path)], timeout=280, check=False, env=found)
    assert 0 == ended.returncode
    assert numbered(1) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


_WAITING = """
import json, socket
said = socket.socket(fileno=0)
said.sendall(json.dumps({"ready": "mlflow-outbox"}).encode() + bytes([10]))
while said.recv(4096):
    pass
"""


def test_a_process_that_is_forked_while_the_child_is_started_does_not_hide_the_child_s_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a data loader's may be, by another thread: with a copy of the child's end it would keep the socket open."""
    start, forked = subprocess.Popen, list[int]()

    def forks(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        started = start(*arguments, **named)
        forked.append(os.fork())
        if not forked[-1]:
            signal.pause()
        return started

    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", forks)
        child = Child([sys.executable, "-c", _WAITING], tmp_path, lock)
    stopped, heard = threading.Event(), list[dict[str, Any]]()
    heeds = threading.Thread(target=lambda: heard.extend(child.messages(stopped)))
    heeds.start()
    try:
        eventually(lambda: heard, message="the child is there")
        os.kill(child._process.pid, signal.SIGKILL)
        eventually(lambda: not heeds.is_alive(), message="the death of the child is noticed")
    finally:
        stopped.set()
        heeds.join()
        child.close()
        os.close(lock)
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)


def test_a_signal_handler_that_stops_the_process_while_it_is_told_something_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that closes the tracker during a flush; the pipe is closed once nothing more is written to it."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as told:
        assert told.stdin is not None
        assert told.stdout is not None
        worker, handled = process.ProcessWorker(told, told.stdin, None, {}), list[bool]()

        def stop(_number: int, _frame: object) -> None:
            worker.stop(0)
            handled.append(worker._pipe.closed)

        def changed() -> dict[str, str]:
            signal.raise_signal(signal.SIGUSR1)
            return {"MLFLOW_TRACKING_TOKEN": "new"}

        monkeypatch.setattr(process, "environment_for_child", changed)
        before = signal.signal(signal.SIGUSR1, stop)
        try:
            worker.look()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert ([False], True) == (handled, worker._pipe.closed)
        assert [process.line_of({}, {"MLFLOW_TRACKING_TOKEN": "new"})] == told.stdout.readlines()


_LOST = """
import sys
from pathlib import Path
from mlflow_outbox_worker import process
from mlflow_outbox_worker.delivery import Delivery

def fails(_):
    raise MemoryError

Delivery.run = fails
process.serve(Path(sys.argv[1]), sys.stdin.buffer)
"""


def test_a_process_whose_loop_has_ended_ends_too(tmp_path: Path) -> None:
    """Its program sees no more of it than that it is there, and would wait for it for as long as it runs itself."""
    outbox = make_outbox(tmp_path)
    with subprocess.Popen([sys.executable, "-c", _LOST, str(outbox.path)], stdin=subprocess.PIPE) as lost:
        assert lost.stdin is not None
        try:
            lost.stdin.write(b"{}\n")
            lost.stdin.flush()
            assert 70 == lost.wait(60)
        finally:
            lost.kill()


@pytest.mark.parametrize("again", [False, True])
def test_a_process_for_an_outbox_that_is_not_safe_to_use_says_so_in_a_line_once(again: bool, tmp_path: Path) -> None:
    """No traceback; those that are started after it, for as long as the outbox stays so, say nothing."""
    outbox = make_outbox(tmp_path)
    outbox.path.chmod(0o755)
    done = subprocess.run(
        [*interpreter.command("mlflow_outbox_worker"), str(outbox.path)],
        input=b'{"again": true}\n' if again else b"{}\n",
        stderr=subprocess.PIPE,
        env=interpreter.environment(),
        check=False,
        timeout=60,
    )
    assert (1, 0 if again else 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr
    assert done.stderr.startswith(b"" if again else b"mlflow-outbox: delivery: ")


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_process_that_has_no_thread_for_delivery_waits_for_one(
    is_gone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Data loaders take all there are for a while; it says so in a sentence, and ends with the program."""
    start, tried, begun = threading.Thread.start, list[int](), threading.Event()

    def refuse(thread: threading.Thread) -> None:
        tried.append(1)
        if is_gone:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        if is_gone or len(tried) < 3:
            msg = "can't start new thread"
            raise RuntimeError(msg)
        start(thread)

    monkeypatch.setattr(process, "_AGAIN", 0.001)
    monkeypatch.setattr(os, "getppid", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    counters = Counters()
    assert process.started(threading.Thread(target=begun.set), counters) is not is_gone
    assert is_gone or begun.wait(60)
    assert (1 if is_gone else 3) == len(tried)
    assert (1 if is_gone else 2) == counters["threads_not_started"]
    assert 1 == sum("waits for a thread" in said for said in warnings(caplog))
