"""The child process that delivers for a worker thread: it keeps what a worker promises, and ends with the program."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker, restarts
from mlflow_outbox.counters import Counters
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.destination import resolve
from mlflow_outbox.outbox import Outbox
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import handover, thread
from mlflow_outbox_worker.child import ChildDelivery, Loop, keeper
from mlflow_outbox_worker.child import process as child_process
from mlflow_outbox_worker.child.process import READY, Child
from mlflow_outbox_worker.child.server import Reporter
from mlflow_outbox_worker.host_lease import worker_of
from servers import MlflowServer, eventually
from spools import make_outbox, warnings


def is_running(pid: int) -> bool:
    """Return whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def deliverer(outbox: Path) -> int:
    """Return the process that holds the lease of the one outbox below a directory; 0 when it is this one or nobody."""
    places = list(outbox.glob("*/outbox.json"))
    found = worker_of(OutboxDirectory.open(places[0].parent)) if places else None
    return found.pid if found is not None and found.pid != os.getpid() else 0


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliver in a child, as in a program that has not imported mlflow."""
    monkeypatch.setattr(thread, "is_mlflow_imported", lambda: False)


@pytest.mark.usefixtures("apart")
def test_what_is_counted_and_logged_in_the_child_is_counted_and_logged_here(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers of delivered events, and the warning about a dead letter, through this program's own handlers."""
    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK) as tracker:
        run = tracker.start_run("r")
        run.log_param("same", "1")
        run.log_metric("loss", 0.0, step=0)
        assert tracker.flush(60)
        assert deliverer(tmp_path)
        run.log_param("same", "2")
        run.end()
    assert (4, 1) == (tracker.counters["delivered"], tracker.counters["dead_letters"])
    assert "it is kept as a dead letter" in caplog.text
    assert numbered(1) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")


@pytest.fixture
def default_timeout() -> Iterator[float]:
    """A time-out that this program has set for all sockets to come, so short that nobody can keep it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.001)
    yield 0.001
    socket.setdefaulttimeout(before)


@pytest.mark.usefixtures("apart", "default_timeout")
def test_a_default_timeout_of_the_program_is_not_the_childs(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Sockets that are made then do not wait, and the one that the child is given would be one of them."""
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK) as tracker:
        tracker.start_run("r").end()
        assert tracker.flush(60)
        assert deliverer(tmp_path)
    assert 0 == tracker.counters.get("children_lost", 0)


def test_counts_are_told_soon_at_first_and_then_twice_a_second() -> None:
    """Each message wakes a thread of the program up, which costs a logging call that waits for it 0.1 ms."""
    ours, theirs = socket.socketpair()
    now, slept = [100.0], list[float]()
    reporter = Reporter(theirs)

    def clock() -> float:
        reporter.counters.add("delivered", 10)  # there is always something new
        return now[0]

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))
        now[0] += seconds
        if len(slept) == 4:
            raise InterruptedError

    with ours, theirs:
        with pytest.raises(InterruptedError):
            reporter.go_on(clock, sleep)
        messages = ours.recv(65536).splitlines()
    assert [0.05, 0.5, 0.5, 0.5] == slept
    assert 3 == len(messages)
    assert all(json.loads(line)["counts"]["delivered"] >= 10 for line in messages)


def test_what_delivers_does_not_wait_for_a_program_that_does_not_listen() -> None:
    """Stopped by ctrl-Z it hears nothing for hours, while others log to its outbox; all is said to it later."""
    ours, theirs = socket.socketpair()
    reporter = Reporter(theirs)

    def says() -> None:
        for _ in range(5000):
            reporter.counters.add("delivered")
            reporter.tell_counts()
        reporter.tell({"log": [30, "the server is away"]})

    speaker = threading.Thread(target=says, daemon=True)
    counted, logged = 0, list[Any]()
    with theirs, ours:  # this end goes first: who waited for it ends
        speaker.start()
        speaker.join(60)
        assert not speaker.is_alive()
        ours.settimeout(60)
        heard = ours.makefile("rb")
        while counted < 5000 or not logged:
            reporter.tell_counts()
            message = json.loads(heard.readline())
            counted += message.get("counts", {}).get("delivered", 0)
            logged += [message["log"]] if "log" in message else []
    assert (5000, [[30, "the server is away"]]) == (counted, logged)


_SILENT = """
import json, socket, sys, time
said = socket.socket(fileno=0)
said.sendall(json.dumps({"ready": "mlflow-outbox"}).encode() + bytes([10]))
time.sleep(60)
"""


def test_a_child_that_hangs_is_given_up_a_while_after_it_was_told_to_end(tmp_path: Path) -> None:
    """However early that was; waiting for it takes no processor time, and none of the program's calls wait for it."""
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    child = Child([sys.executable, "-c", _SILENT], tmp_path, lock)
    stopped = threading.Event()
    stopped.set()
    used = time.thread_time()  # of other threads there may be some that other tests have left
    try:
        assert [READY] == list(child.messages(stopped))
    finally:
        child.close()
        os.close(lock)
    assert time.thread_time() - used < 1


_PROMPT = """
import json, socket
said = socket.socket(fileno=0)
said.sendall(json.dumps({"ready": "mlflow-outbox"}).encode() + bytes([10]))
print(said.makefile().readline())
said.sendall(json.dumps({"counts": {"delivered": 1}}).encode() + bytes([10]))
said.makefile().readline()
"""


@pytest.mark.parametrize("are_fast", [False, True])
def test_what_a_child_says_is_heeded_more_rarely_while_calls_follow_each_other_fast(
    are_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes the interpreter from two of them; whether there is a child at all is found soon all the same."""
    monkeypatch.setattr(child_process, "_HEED", 0.01)
    monkeypatch.setattr(child_process, "_HEED_RARELY", 0.04)
    monkeypatch.setattr(courtesy, "_gave", time.time_ns() + 3_600_000_000_000 if are_fast else 0)
    paused = list[float]()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            paused.append(timeout or 0.0)
            return super().wait(timeout)

    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    child = Child([sys.executable, "-c", _PROMPT], tmp_path, lock)
    try:
        messages = child.messages(Watched())
        assert READY == next(messages)
        assert {0.01} == set(paused)
        paused.clear()
        child.begin()
        assert {"counts": {"delivered": 1}} == next(messages)
        assert {0.04 if are_fast else 0.01} == set(paused)
    finally:
        child.close()
        os.close(lock)


@pytest.mark.usefixtures("apart")
def test_a_child_for_which_there_is_no_thread_ends(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was started by the call that could not start the thread; the next call tries again."""

    def refuse(_thread: threading.Thread) -> None:
        assert started[-1].poll() is None
        msg = "can't start new thread"
        raise RuntimeError(msg)

    start, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

    def noting(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **named))
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", noting)
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            thread.start(outbox)
    assert [True] == [child.returncode is not None for child in started]  # 0, or killed on a busy machine
    assert worker_of(outbox.directory) is None
    worker = thread.start(outbox)
    eventually(lambda: worker_of(outbox.directory))
    worker.stop(30)


@pytest.mark.usefixtures("apart")
def test_a_worker_that_is_stopped_at_once_leaves_no_child(outbox: Outbox) -> None:
    """Its child was there before its thread."""
    worker = thread.start(outbox)
    worker.stop(30)
    assert not worker.is_alive()
    assert worker_of(outbox.directory) is None


@pytest.mark.usefixtures("apart")
def test_a_new_token_in_the_environment_is_used(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long session renews its token in its own environment; the child must not go on with the old one."""
    with FaultProxy(mlflow_server.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "first")
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        run = tracker.start_run("r")

        def last_token() -> str | None:
            run.log_metric("loss", 0.0)
            assert tracker.flush(60)
            return dict(proxy.requests[-1].headers).get("Authorization")

        assert "Bearer first" == last_token()
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "second")
        eventually(lambda: last_token() == "Bearer second")
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        eventually(lambda: last_token() is None)
        run.end()
        tracker.close(30)


@pytest.mark.usefixtures("apart")
def test_of_several_workers_one_has_a_child_and_another_takes_over(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """The lock is handed down to the child; a second program's thread waits for it without a child of its own."""
    first = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK)
    first.start_run("first").end()
    assert first.flush(60)
    pid = deliverer(tmp_path)
    program = """
    for i in range(10):
        run.log_metric("loss", i / 2, step=i)
    run.end()
    print(bool(tracker.flush(200)), len(children()), flush=True)
    sys.stdin.readline()
    run = tracker.start_run("after")
    run.end()
    print(bool(tracker.flush(200)), len(children()), flush=True)
    tracker.close(10)
    """
    second = session(program, experiment_name, sqlite_uri, str(tmp_path))
    assert second.stdin is not None
    assert second.stdout is not None
    assert b"True 0\n" == second.stdout.readline()
    assert pid == deliverer(tmp_path)
    first.close(10)
    assert not is_running(pid)
    second.stdin.write(b"go on\n")
    second.stdin.flush()
    assert b"True 1\n" == second.stdout.readline()
    second.communicate(timeout=120)
    assert {"first", "held elsewhere", "after"} == {run.info.run_name for run in runs(sqlite_uri, experiment_name)}


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """An outbox with nothing in it."""
    outbox = Outbox(make_outbox(tmp_path), resolve("http://127.0.0.1:9"), QUICK, "thread")
    yield outbox
    outbox.close(0)


@pytest.mark.parametrize(
    "program",
    [["/no/such/python"], ["/bin/cat", "/dev/null"], [sys.executable, "-c", "print('something else')"], [""], None],
    ids=["none", "silent", "another", "unknown", "forbidden"],
)
def test_where_no_child_can_be_started_this_process_delivers(
    program: list[str] | None, outbox: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted, and said once; the lock is free for the other loop, which can be stopped like the child."""

    def forbid(*_arguments: object, **_named: object) -> None:
        msg = "no process is started in this sandbox"
        raise RuntimeError(msg)  # what an audit hook raises comes out of the call that it is told of

    if program is None:
        monkeypatch.setattr(subprocess, "Popen", forbid)
    ran, stopped = threading.Event(), threading.Event()

    class Here:
        def run(self) -> None:
            assert worker_of(outbox.directory) is None
            ran.set()
            stopped.wait(60)

        def wake(self) -> None:
            pass

        def stop(self) -> None:
            stopped.set()

    worker = thread.ThreadWorker(lambda: ChildDelivery(outbox, Here, program), outbox.counters)
    worker.start()
    assert ran.wait(60)
    worker.stop(60)
    assert not worker.is_alive()
    assert 1 == outbox.counters["children_not_started"]
    assert "delivery happens in this process instead" in caplog.text


_BROKEN = """
import json, socket
said = socket.socket(fileno=0)
for message in ({"ready": "mlflow-outbox"}, {"log": [40, "it is broken"]}):
    said.sendall(json.dumps(message).encode() + bytes([10]))
while said.recv(4096):
    pass
"""


def test_an_error_that_a_child_logs_is_logged_as_one(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    """A program may look at nothing less."""
    delivery = ChildDelivery(outbox, lambda: pytest.fail("not here"), [sys.executable, "-c", _BROKEN])
    worker = thread.ThreadWorker(lambda: delivery, outbox.counters)
    worker.start()
    eventually(lambda: "it is broken" in caplog.text, 60)
    worker.stop(60)
    assert ["ERROR"] == [record.levelname for record in caplog.records if "it is broken" in record.getMessage()]


_KILLED = """
import json, os, signal, socket
said = socket.socket(fileno=0)
for message in ({"ready": "mlflow-outbox"}, {"log": [30, "what each of them says"]}):
    said.sendall(json.dumps(message).encode() + bytes([10]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_that_end_again_and_again_are_said_and_started_more_rarely(
    outbox: Outbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for want of memory: to begin takes the program's processor for seconds, and nobody knew why nothing came."""
    monkeypatch.setattr(keeper, "_STAND_BY", 0.01)
    monkeypatch.setattr(restarts, "_PAUSE", 0.02)
    monkeypatch.setattr(child_process, "_HEED", 0.01)
    begun = list[float]()
    start = subprocess.Popen

    def noting(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        begun.append(time.monotonic())
        return start(*arguments, **named)

    monkeypatch.setattr(subprocess, "Popen", noting)
    delivery = ChildDelivery(outbox, lambda: pytest.fail("not here"), [sys.executable, "-c", _KILLED])
    worker = thread.ThreadWorker(lambda: delivery, outbox.counters)
    worker.start()
    eventually(lambda: outbox.counters["children_lost"] > 7, 60)
    worker.stop(60)
    assert begun[7] - begun[6] >= 0.01 * 2**5
    said = warnings(caplog)
    assert 1 == sum("what each of them says" in text for text in said)
    assert 1 == sum("ends again and again soon after its start (signal 9)" in text for text in said)


def test_who_asks_to_hurry_does_not_wait_for_the_pause_between_two_children(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a flush does, and a program's end, when the memory may be there that the children lacked."""
    monkeypatch.setattr(keeper, "_STAND_BY", 0.05)
    monkeypatch.setattr(restarts, "_PAUSE", 600.0)
    monkeypatch.setattr(restarts, "_PAUSE_MOST", 600.0)
    delivery = ChildDelivery(outbox, lambda: pytest.fail("not here"))
    for _ in range(3):
        delivery._restarts.begun()
        delivery._restarts.ended("signal 9")
    assert delivery._restarts.are_vain
    rests = threading.Thread(target=delivery._rest, daemon=True)
    rests.start()

    def goes_on() -> bool:
        outbox.directory.ask_hurry()
        return not rests.is_alive()

    eventually(goes_on)


def test_a_mistake_in_the_thread_does_not_end_it(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and said, and the thread goes on until it is told to stop."""

    def otherwise() -> Loop:
        msg = "nothing else can deliver either"
        raise RuntimeError(msg)

    worker = thread.ThreadWorker(lambda: ChildDelivery(outbox, otherwise, ["/no/such/python"]), outbox.counters)
    worker.start()
    eventually(lambda: outbox.counters["worker_crashes"] > 1)
    assert worker.is_alive()
    worker.stop(60)
    assert not worker.is_alive()
    assert "nothing else can deliver either" in caplog.text


_SESSION = """
import glob, os, signal, sys
from mlflow_outbox import MLflowTracker, Settings

def children():
    return [int(pid) for file in glob.glob("/proc/self/task/*/children") for pid in open(file).read().split()]

quick = Settings(batch_points=50, poll_interval=0.02, retry_initial=0.02, retry_max=0.2)
tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], settings=quick)
run = tracker.start_run("held elsewhere")
"""


def session(body: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a program that logs through a worker thread and has not imported mlflow."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", _SESSION + textwrap.dedent(body)]
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_delivery_by_a_thread_imports_nothing_and_survives_the_death_of_its_child(
    file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Killed in the middle of batches, into a store that keeps points twice: each point is there once."""
    child = session(
        """
        killed = []
        for i in range(20_000):
            run.log_metric("loss", i / 2, step=i)
        names = {"mlflow", "sqlalchemy", "requests", "numpy", "diskcache", "tenacity"} & set(sys.modules)
        while not killed:
            left = tracker.flush(0)
            assert left.pending, "all was delivered before the child could be killed"
            if left.delivered > 500:
                killed += children()
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
        run.end()
        print(bool(tracker.flush(200)), len(killed) > 0, tracker.counters["children_lost"], sorted(names))
        """,
        experiment_name,
        file_uri,
        str(tmp_path / "outbox"),
    )
    said, complained = child.communicate(timeout=280)
    assert "True True 1 []" == said.decode().strip(), complained.decode()
    assert numbered(20_000) == points(file_uri, the_run(file_uri, experiment_name).info.run_id, "loss")


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child that lives on"])
def test_the_child_ends_with_the_program_whatever_ends_it(
    forked: bool, own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """SIGKILL of the program leaves nobody behind who goes on delivering, forked children or not."""
    server = own_mlflow_server(start=False)
    child = session(
        """
        run.log_metric("loss", 1.0)
        never = __import__("threading").Event()
        while not children():
            never.wait(0.01)
        print(*children(), flush=True)
        if sys.argv[4] == "True" and os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
        print("ready", flush=True)
        never.wait()
        """,
        experiment_name,
        server.url,
        str(tmp_path / "outbox"),
        str(forked),
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert b"ready\n" == child.stdout.readline()
    assert is_running(pid)
    child.send_signal(signal.SIGKILL)
    eventually(lambda: not is_running(pid), message="the process that delivers ends")
    child.communicate(timeout=60)  # its standard input ends, and with it the forked child


def test_a_program_with_mlflow_hands_over_to_a_child_when_there_is_much_to_deliver(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then its own thread delivers; nothing is lost or doubled on the way, and it is counted."""
    monkeypatch.setattr(thread, "is_mlflow_imported", lambda: True)
    monkeypatch.setattr(handover, "WINDOW", 0.2)
    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK) as tracker:
        run = tracker.start_run("r")
        monkeypatch.setattr(handover, "BUSY", 1e9)
        for step in range(1000):
            run.log_metric("loss", step / 2, step=step)
        assert tracker.flush(60)
        assert 0 == deliverer(tmp_path)
        monkeypatch.setattr(handover, "BUSY", 10.0)
        steps = itertools.count(1000)

        def is_handed_over() -> bool:
            for _ in range(100):
                step = next(steps)
                run.log_metric("loss", step / 2, step=step)
            return deliverer(tmp_path) > 0

        eventually(is_handed_over, 60)
        for _ in range(1000):
            step = next(steps)
            run.log_metric("loss", step / 2, step=step)
        run.end()
        assert tracker.flush(60)
        assert 1 == tracker.counters["deliveries_handed_over"]
    held = the_run(mlflow_server.url, experiment_name)
    assert numbered(next(steps)) == points(mlflow_server.url, held.info.run_id, "loss")


def test_load_is_high_when_much_was_delivered_over_a_whole_window() -> None:
    """A burst that is over before the window does not count, nor what was delivered before it."""
    counters, now = Counters(), [100.0]
    counters.add("delivered", 1_000_000)
    load = handover.Load(counters, lambda: now[0])
    counters.add("delivered", 4_999)
    now[0] += 9.9
    assert not load.is_high()
    now[0] += 0.1
    assert not load.is_high()
    counters.add("delivered", 5_000)
    now[0] += 9.9
    assert not load.is_high()
    now[0] += 0.1
    assert load.is_high()
    now[0] += 10.0
    assert not load.is_high()
