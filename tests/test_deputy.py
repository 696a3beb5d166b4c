"""The process that delivers syncs a program's live segments: what it says, and what it is believed."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import Settings
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.caretaker import RELIEVED, Caretaker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.testing import FailingDisk
from mlflow_outbox_worker.deputy import MOST_SEGMENTS, Deputy, passed_on
from mlflow_outbox_worker.process import Noted
from mlflow_outbox_worker.substitute import Substitute
from servers import unused_port
from spools import RUN, make_journal, metric, read

INTERVAL = 0.5


class Pair:
    """A deputy and its other end, in one process, with a clock that is set by hand."""

    def __init__(self, outbox: OutboxDirectory) -> None:
        self.now = 100.0
        self.disk = FailingDisk()
        self.counters = Counters()
        self.deputy = Deputy(INTERVAL, clock=lambda: self.now)
        self.substitute = Substitute(
            self.deputy.theirs,
            self.deputy.page,
            outbox.runs,
            INTERVAL,
            self.counters,
            self.disk.datasync,
            clock=lambda: self.now,
        )

    def round(self) -> None:
        """Let the other end hear what it is told, and do a round."""
        self.substitute._hear(0.0)
        self.substitute.round()


@pytest.fixture
def pair(outbox: OutboxDirectory) -> Iterator[Pair]:
    """A deputy for an outbox."""
    pair = Pair(outbox)
    yield pair
    pair.deputy.close()


@pytest.fixture
def segment(outbox: OutboxDirectory) -> Callable[[str], str]:
    """Returns the name of a segment of a run, which is made with one event at the first call and grows at each."""
    journals: dict[str, Any] = {}

    def grown(run: str = RUN) -> str:
        journal = journals.setdefault(run, make_journal(outbox, run=run))
        assert journal.append(metric(0))
        path = journal._sequence.live.path
        return f"{path.parent.name}/{path.name}"

    return grown


def test_it_is_believed_for_the_segments_that_were_asked_for_and_for_two_intervals(
    pair: Pair, segment: Callable[..., str]
) -> None:
    """Not before it has said so, not for others, and not for long."""
    name, other = segment(), segment("b" * 32)
    assert not pair.deputy.syncs((name,))
    pair.round()
    assert pair.deputy.syncs((name,))
    assert not pair.deputy.syncs((name, other))
    assert not pair.deputy.syncs((name,)), "the answer to an older question"
    pair.round()
    pair.now += 2 * INTERVAL
    assert pair.deputy.syncs((name,))
    pair.now += 0.001
    assert not pair.deputy.syncs((name,))
    pair.round()
    assert pair.deputy.syncs((name,))


def test_it_syncs_what_has_grown_and_nothing_else(pair: Pair, segment: Callable[..., str]) -> None:
    """An idle program costs a look at the size."""
    names = segment(), segment("b" * 32)
    pair.deputy.syncs(names)
    for expected in (2, 2):
        pair.round()
        assert expected == pair.disk.count("datasync")
    segment()
    pair.round()
    assert (3, True) == (pair.disk.count("datasync"), pair.deputy.syncs(names))


def test_a_segment_that_could_not_be_synced_is_never_said_to_be(pair: Pair, segment: Callable[..., str]) -> None:
    """The kernel reports an error once: a second sync of the same descriptor would go well and mean nothing."""
    name, other = segment(), segment("b" * 32)
    pair.deputy.syncs((name, other))
    pair.disk.fail("datasync", error=errno.EIO, times=1)
    for _ in range(3):
        pair.round()
        assert not pair.deputy.syncs((name, other))
        segment()
    assert (2, 1) == (pair.disk.count("datasync"), pair.counters["syncs_for_the_program_failed"])
    pair.deputy.syncs((other,))
    pair.round()
    assert pair.deputy.syncs((other,)), "the program has left the bad one"
    pair.disk.fail("datasync", error=errno.EIO, times=1)
    segment("b" * 32)
    pair.round()
    pair.deputy.syncs((other, name))
    pair.round()
    pair.deputy.syncs((other,))
    pair.round()
    pair.now += 2.1 * INTERVAL
    assert not pair.deputy.syncs((other,)), "nor if it alone is asked for again"


@pytest.mark.parametrize("name", ["../../{secret}", "{run}/../../{secret}", "{run}/link.log", "{run}/none.log", "none"])
def test_only_segments_of_runs_are_opened(name: str, pair: Pair, segment: Callable[..., str], tmp_path: Path) -> None:
    """What it is told is a name beneath the runs; a link is not followed."""
    run = segment().partition("/")[0]
    (tmp_path / "secret").write_text("not ours")
    os.symlink(tmp_path / "secret", pair.substitute._runs / run / "link.log")
    pair.deputy.syncs((name.format(run=run, secret="secret"),))
    pair.round()
    assert {} == pair.substitute._open
    assert 0 == pair.disk.count("datasync")


def test_a_segment_that_was_removed_is_neither_said_to_be_synced_nor_held(
    pair: Pair, segment: Callable[..., str]
) -> None:
    """The program sees to it at its own round, which must not be late for that; what is held takes room on the disk."""
    name = segment()
    pair.deputy.syncs((name,))
    pair.round()
    os.unlink(pair.substitute._runs / name)
    assert pair.deputy.syncs((name,))
    pair.now += 2.1 * INTERVAL
    pair.round()
    assert not pair.deputy.syncs((name,))
    assert ({}, []) == (pair.substitute._open, pair.substitute._wanted)
    assert 0 == pair.counters["syncs_for_the_program_failed"]


def test_an_event_is_not_synced_before_the_copied_file_that_it_names(pair: Pair, outbox: OutboxDirectory) -> None:
    """F16: what takes its turn whenever it does must not meet it; a power cut would leave an event without its file."""
    caretaker = Caretaker(INTERVAL, pair.counters, is_relieved=pair.deputy.syncs)
    journal, store = make_journal(outbox), SnapshotStore(outbox.run(RUN))
    caretaker._watched[0] = journal
    assert journal.append(metric(0))
    for expected in (1, RELIEVED):
        journal.sync()
        assert expected == caretaker._intervals()
        pair.round()
    kept = store.add_bytes(b"late", limit=100)
    journal.sync_later(store, kept.sha256)
    assert journal.append(Artifact("late.txt", kept.sha256, kept.size, 1))
    assert journal.append(metric(1))
    before = pair.disk.count("datasync")
    pair.round()
    assert 1 == pair.disk.count("datasync") - before
    assert 3 == len(read(outbox).events)
    (synced,) = pair.substitute._open
    for path in outbox.run(RUN).glob("*.log"):
        if path.name not in synced:
            path.unlink()
    assert [metric(0)] == read(outbox).events


def test_descriptors_are_given_back_with_the_segments(pair: Pair, segment: Callable[..., str]) -> None:
    """One for each that is asked for now."""
    before = len(os.listdir("/proc/self/fd"))
    names = tuple(segment(f"{number:032x}") for number in range(10))
    held = len(os.listdir("/proc/self/fd")) - before
    for asked in (names, names[:3], names[5:]):
        pair.deputy.syncs(asked)
        pair.round()
        assert held + len(asked) == len(os.listdir("/proc/self/fd")) - before


def test_more_segments_than_it_may_hold_are_left_to_the_program(pair: Pair) -> None:
    """It is not even asked."""
    pair.deputy.syncs(tuple(f"{number:032x}/a.log" for number in range(MOST_SEGMENTS + 1)))
    pair.round()
    assert [] == pair.substitute._wanted


def test_one_that_does_not_listen_holds_up_nobody(pair: Pair, segment: Callable[..., str]) -> None:
    """What there was no room for is asked again."""
    name = segment()
    for number in range(3000):
        assert not pair.deputy.syncs((name, str(number)))
    assert not pair.deputy.syncs((name,))
    for _ in range(2):
        pair.round()
    assert not pair.deputy.syncs((name,)), "they are told now"
    pair.round()
    assert pair.deputy.syncs((name,))


def test_nothing_is_left_of_one_whose_process_could_not_be_started() -> None:
    """Nor is there one where nothing is synced in the background."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no process"), passed_on(Settings()) as deputy:
        assert deputy is not None
        raise OSError(errno.EAGAIN, "no process")
    for level in ("os", "always"):
        with passed_on(Settings(sync=level)) as deputy:
            assert deputy is None
    assert before == len(os.listdir("/proc/self/fd"))


PROGRAM = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.spool.caretaker import Caretaker
intervals = Caretaker._intervals

def told(caretaker):
    found = intervals(caretaker)
    print(found, flush=True)
    return found

Caretaker._intervals = told
given = Settings(sync_interval=0.1, exit_timeout=0.0, linger=0.0)
tracker = MLflowTracker("deputy", sys.argv[1], outbox_dir=sys.argv[2], worker=sys.argv[3], settings=given)
run = tracker.start_run("steady")
for step in range(200_000):
    run.log_metric("loss", 0.5, step=step)
    time.sleep(0.001)
"""


def worker_of(program: int) -> int:
    """Returns the process that delivers for a program."""
    tasks = Path(f"/proc/{program}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    found = [int(child) for child in children if b"mlflow_outbox_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert 1 == len(found), children
    return found[0]


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_worker_that_is_stopped_is_made_up_for_and_believed_again_later(kind: str, tmp_path: Path) -> None:
    """The program's own rounds come as often as without one for as long as that, and more rarely before and after."""
    uri = f"http://127.0.0.1:{unused_port()}"
    command = [sys.executable, "-c", PROGRAM, uri, str(tmp_path / "outbox"), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        rounds = map(int, iter(program.stdout.readline, ""))
        try:
            assert RELIEVED in rounds, "it ended before"
            worker = worker_of(program.pid)
            os.kill(worker, signal.SIGSTOP)
            in_a_row = 0
            while in_a_row < 6:  # what was said before it was stopped comes first, and may be any of them
                in_a_row = in_a_row + 1 if next(rounds) == 1 else 0
            os.kill(worker, signal.SIGCONT)
            assert RELIEVED in rounds
        finally:
            program.kill()


@pytest.mark.parametrize("lacking", ["descriptors", "threads"])
def test_a_process_that_cannot_sync_for_the_program_delivers_all_the_same(
    lacking: str, pair: Pair, outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was started by a script that closes what it does not know, or there are no threads left."""

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    given = pair.deputy.theirs.detach(), os.dup(pair.deputy.page.fd)
    if lacking == "threads":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        for fd in given:
            os.close(fd)
    Noted(outbox, outbox.destination, Settings(), given).substitute_for_the_program(pair.counters)
    assert 1 == pair.counters["substitute_not_started"]


def test_without_memory_to_share_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other systems than Linux: the program does all rounds itself."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.delattr(os, "memfd_create")
    with passed_on(Settings()) as deputy:
        assert deputy is None
    assert before == len(os.listdir("/proc/self/fd"))


def test_memory_that_gets_no_size_is_given_back() -> None:
    """As where no file may have one (``ulimit -f 0``): a worker that is replaced again and again would use them up."""
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with passed_on(Settings()) as deputy:
            assert deputy is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, held)
    assert before == len(os.listdir("/proc/self/fd"))


_DAEMON = """
import os, sys
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox_worker.deputy import Deputy

if sys.argv[1] == "thread":
    deputy = Deputy(0.5)
else:
    given = Settings(exit_timeout=0.0, linger=0.0)
    tracker = MLflowTracker("daemon", sys.argv[2], outbox_dir=sys.argv[3], worker="process", settings=given)
    assert tracker.start_run("daemon").log_metric("loss", 0.5)
os._exit(sum(os.path.lexists(f"/proc/self/fd/{stream}") for stream in range(3)))
"""


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_nothing_of_it_takes_the_place_of_a_standard_stream_that_is_closed(kind: str, tmp_path: Path) -> None:
    """A mapping has a descriptor of its own: what a daemon's libraries print would be kept in memory for ever."""
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", _DAEMON, kind]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    uri = f"http://127.0.0.1:{unused_port()}"
    assert 0 == subprocess.run([*command, uri, str(tmp_path)], timeout=60, check=False, env=found).returncode


def test_a_forked_child_of_a_program_has_no_deputy(pair: Pair, segment: Callable[..., str]) -> None:
    """What its parent is told is not for it."""
    name = segment()
    pair.deputy.syncs((name,))
    pid = os.fork()
    if not pid:
        os._exit(int(pair.deputy._own.fileno() >= 0 or pair.deputy.theirs.fileno() >= 0 or pair.deputy.syncs((name,))))
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    pair.round()
    assert pair.deputy.syncs((name,))
