"""The journal under threads, forks, signals and finalisers: each event once, whoever interrupts whom (F04 to F06)."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_outbox.spool import journal
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric
from servers import eventually
from spools import FORKS, RUN, Everything, make_journal, make_outbox, metric, read

#: How often a test of signals or threads logs; enough to hit every place between two calls many times.
STORM = 3000


def test_eight_threads_share_one_sequence(outbox: OutboxDirectory) -> None:
    """F83: contiguous numbers, and each thread's events in its order."""
    writer = make_journal(outbox, segment_bytes=4096)
    start = threading.Barrier(8)

    def log(thread: int) -> None:
        start.wait()
        for number in range(500):
            assert writer.append(metric(number, f"t{thread}"))

    threads = [threading.Thread(target=log, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = read(outbox)
    assert (0, [], {writer.writer: 4000}) == (found.missing, found.broken, found.numbers)
    for thread in range(8):
        mine = [event.step for event in found.events if isinstance(event, Metric) and event.key == f"t{thread}"]
        assert list(range(500)) == mine


FORK = """
import os, sys, threading
sys.path[:0] = {path!r}
from spools import *
outbox = make_outbox(Path({outbox!r}))
writer = make_journal(outbox{options})
stop = threading.Event()
def log():
    number = 0
    while not stop.is_set() or number < 300:
        assert writer.append(metric(number, "thread"))
        number += 1
thread = threading.Thread(target=log)
thread.start()
for number in range(50):
    writer.append(metric(number, "before"))
children = []
for child in range(6):
    writer.append(metric(child, "fork"))
    pid = os.fork()
    if pid == 0:
        for number in range(100):
            assert writer.append(metric(number, f"child{{child}}"))
        if child % 2:
            writer.sync(); writer.close()
        if child % 3 == 0:
            os.read(gate, 1)
        os._exit(0)
    children.append(pid)
stop.set(); thread.join()
for number in range(50):
    writer.append(metric(number, "after"))
writer.close()
"""


@pytest.mark.parametrize("sync", ["interval", "always"])
@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_fork_while_others_log_costs_no_event_of_either(tmp_path: Path, sync: str, first: str) -> None:
    """F05: children log on, whoever exits first; every writer's numbers are its own."""
    code = FORK.format(path=sys.path, outbox=str(tmp_path / "outbox"), options=f", sync={sync!r}, segment_bytes=2048")
    if first == "parent":
        code = "import os\ngate, end = os.pipe()\n" + code + "os._exit(0)\n"
        code = code.replace("os.read(gate, 1)", "os.close(end); os.read(gate, 1)")
    else:
        code = "import os\ngate = os.open('/dev/null', os.O_RDONLY)\n" + code
        code += "assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)\n"
    command = [sys.executable, *FORKS, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]
    folder = make_outbox(tmp_path / "outbox").run(RUN)

    def complete() -> bool:
        found = Everything(folder)
        steps: dict[str, list[int]] = {}
        for event in found.events:
            assert isinstance(event, Metric)
            steps.setdefault(event.key, []).append(event.step)
        assert (0, []) == (found.missing, found.broken)
        assert list(range(50)) == steps["before"] == steps["after"]
        assert list(range(6)) == steps["fork"]
        assert list(range(len(steps["thread"]))) == steps["thread"]
        return all(list(range(100)) == steps.get(f"child{child}") for child in range(6)) and not found.live

    eventually(complete)


SIGNALS = """
import random, signal, sys
sys.path[:0] = {path!r}
from spools import *
from mlflow_outbox.counters import Counters
outbox = make_outbox(Path({outbox!r}))
writer = make_journal(outbox, segment_bytes=2048{options})
chance = random.Random({seed})
{setup}
stopped = []
def arm():
    if not stopped: signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0003))
writer.append(metric(0, "begin"))
signal.signal(signal.SIGALRM, handler)
{loop}
stopped.append(True)
signal.setitimer(signal.ITIMER_REAL, 0)
writer.append(metric(0, "end"))
writer.sync()
writer.close()
found = Everything(outbox.run(RUN))
steps = {{}}
for event in found.events:
    steps.setdefault(event.key, []).append(event.step)
assert (0, []) == (found.missing, found.broken), (found.missing, found.broken)
assert [0] == steps.pop("begin") == steps.pop("end")
{check}
"""


@pytest.mark.parametrize("sync", ["os", "interval", "always"])
def test_a_signal_handler_may_log_in_the_middle_of_an_append(tmp_path: Path, sync: str) -> None:
    """A storm of signals, each of which logs: no deadlock, nothing lost, nothing twice."""
    code = SIGNALS.format(
        path=sys.path,
        outbox=str(tmp_path / "outbox"),
        options=f", sync={sync!r}",
        seed=1,
        setup="""
logged = [0]
def handler(*_):
    assert writer.append(metric(logged[0], "handler"))
    logged[0] += 1
    arm()
""",
        loop=f"""
arm()
for number in range({STORM}):
    assert writer.append(metric(number))
    if number % 100 == 0:
        writer.sync()
""",
        check=f"""
assert list(range({STORM})) == steps["loss"]
assert sorted(range(logged[0])) == sorted(steps["handler"])
assert logged[0] > 20
""",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "TimeoutError()", "BrokenPipeError(32, 'pipe')"])
@pytest.mark.parametrize(("sync", "full"), [("os", False), ("interval", False), ("interval", True), ("always", False)])
def test_an_exception_in_the_middle_of_an_append_neither_doubles_nor_loses_an_event(
    tmp_path: Path, error: str, sync: str, full: bool
) -> None:
    """A storm of signals that raise: what was acknowledged is there once, what was not at most once, in order."""
    code = SIGNALS.format(
        path=sys.path,
        outbox=str(tmp_path / "outbox"),
        options=f", sync={sync!r}"
        + ", disk=disk" * full,  # the real disk where it need not fail: fewer places to interrupt
        seed=2,
        setup=f"""
error = {error}
def handler(*_):
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise error
""",
        loop=f"""
import errno
acknowledged = []
interrupted = 0
numbers = iter(range({STORM}))
def storm():  # a function, for Python 3.13.0 takes the jump at the end of a loop out of the "try" around it
    for number in numbers:
        if {full} and number % 50 == 0:
            disk.fail("write", error=errno.ENOSPC, times=3)
            disk.fail("write", short=7, at=3)
            writer._sequence._try_again = 0.0
        if number % 3 == 0:
            arm()
        if writer.append(metric(number)):
            acknowledged.append(number)
        if number % 100 == 0:
            writer.sync()
    signal.setitimer(signal.ITIMER_REAL, 0)  # here, where what it raises is still caught
while True:
    try:
        storm()
        break
    except type(error):
        interrupted += 1
disk.clear()
""",
        check=f"""
found = steps["loss"]
assert sorted(set(found)) == found, "doubled, or out of order"
assert set(acknowledged) <= set(found), sorted(set(acknowledged) - set(found))
assert interrupted > 5 and len(acknowledged) > 1000, (interrupted, len(acknowledged))
import threading
other = threading.Thread(target=lambda: writer.append(metric(1)))
other.start(); other.join(10)
assert not other.is_alive(), "the lock was left held"
import os
left = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3, 2000) if os.path.exists(f"/proc/self/fd/{{fd}}")]
written = [path for path in left if path.endswith(".log") and os.path.getsize(path)]
assert {full} or len(written) <= 2, "descriptors of segments leak"  # the live one, and one that no name had yet
""",
    ).replace(
        "writer = make_journal",
        "from mlflow_outbox.testing import FailingDisk\ndisk = FailingDisk()\nwriter = make_journal",
        1,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr[-2000:]


def test_an_object_may_log_when_it_is_collected_in_the_middle_of_an_append(outbox: OutboxDirectory) -> None:
    """F06: a ``__del__`` runs wherever memory is allocated."""
    writer = make_journal(outbox)
    collected = []

    class Noisy:
        def __init__(self, number: int) -> None:
            self.number = number
            self.me = self

        def __del__(self) -> None:
            assert writer.append(metric(self.number, "del"))
            collected.append(self.number)

    import gc

    threshold = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        for number in range(500):
            Noisy(number)
            assert writer.append(metric(number))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    writer.close()
    found = read(outbox)
    by_key = {key: [e.step for e in found.events if isinstance(e, Metric) and e.key == key] for key in ("loss", "del")}
    assert list(range(500)) == by_key["loss"]
    assert sorted(collected) == sorted(by_key["del"]) == list(range(500))
    assert 0 == found.missing


def test_logging_at_the_exit_of_the_interpreter_is_kept(tmp_path: Path) -> None:
    """F06: from atexit, from a module's ``__del__``, when no thread can be started any more."""
    code = f"""
import atexit, sys
sys.path[:0] = {sys.path!r}
from spools import *
from mlflow_outbox.spool.caretaker import Caretaker
from mlflow_outbox.counters import Counters
outbox = make_outbox(Path({str(tmp_path / "outbox")!r}))
elsewhere = {{}}  # a function of this module would keep all of it alive until after its own end
exec("def wake(): raise ImportError('sys.meta_path is None, Python is likely shutting down')", elsewhere)
writer = make_journal(outbox, registry=Caretaker(0.01, Counters()), wake=elsewhere.pop("wake"))
class Last:
    def __del__(self, writer=writer, event=metric(2)):
        writer.append(event)
last = Last()
atexit.register(lambda: writer.append(metric(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stderr
    assert {1, 2} == set(Everything(make_outbox(tmp_path / "outbox").run(RUN)).steps)


class _Logging(logging.Handler):
    """A program's handler for log messages that logs to a run."""

    def __init__(self, log: Callable[[], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log, with the lock of the handler held, as always."""
        self._log()


def test_a_log_handler_that_logs_to_a_run_waits_for_no_thread_that_waits_for_the_handler(
    outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread warns in the middle of a call, with the journal to itself; the other has the handler."""
    monkeypatch.setattr(journal, "_PATIENCE", 0.05)
    warns = threading.Thread(target=lambda: writer.append(metric(0)), daemon=True)
    writer = make_journal(outbox, refuse=lambda *_: "no room" if threading.current_thread() is warns else None)
    kept: list[bool] = []

    def is_taken() -> bool:
        if not writer._lock.acquire(blocking=False):
            return True
        writer._lock.release()
        return False

    def log() -> None:
        if threading.current_thread() is not warns:
            warns.start()
            eventually(is_taken)
            kept.append(writer.append(metric(1)))

    handler, logger = _Logging(log), logging.getLogger("mlflow_outbox")
    logs = threading.Thread(target=lambda: logger.warning("of the program"), daemon=True)
    logger.addHandler(handler)
    try:
        logs.start()
        logs.join(30)
        assert [True] == kept
        warns.join(30)
        assert not warns.is_alive()
    finally:
        logger.removeHandler(handler)
    assert writer.append(metric(2))
    assert [1, 2] == sorted(read(outbox).steps)
