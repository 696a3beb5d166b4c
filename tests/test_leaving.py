"""What a program does at its end for an outbox, where it forks, is a daemon, or is told to hurry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from contents import QUICK, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker, stopwatch
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.host_lease import worker_of
from mlflow_outbox_worker.lease import Lease
from servers import eventually


def program(body: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python program of its own, whose words can be read."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_daemon_delivers_at_its_end_what_its_parents_cannot(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its tracker was made before it was forked, twice, and those it was forked from are gone."""
    started = program(
        """
        import os, sys
        from mlflow_outbox import MLflowTracker, Settings

        settings = Settings(exit_timeout=60.0)
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], settings=settings)
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        with tracker.start_run("daemon") as run:
            for i in range(200):
                run.log_metric("loss", i / 2, step=i)
        """,
        *(experiment_name, sqlite_uri, str(tmp_path / "outbox")),
    )
    _, said = started.communicate(timeout=250)  # until the daemon has ended, whose streams they are too
    assert "" == said
    run = the_run(sqlite_uri, experiment_name)
    assert numbered(200) == points(sqlite_uri, run.info.run_id, "loss")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_told_to_hurry_at_its_exit_says_what_every_outbox_has_left(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Ctrl-C, or a SIGTERM that its handler makes an exit of: it waits for none of them, and shows no traceback."""
    ending = program(
        """
        import signal, sys
        from mlflow_outbox import MLflowTracker, Settings
        from mlflow_outbox.outbox import Outbox

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        at_exit = Outbox.at_exit

        def says_so(self, deadline):
            print("waits", flush=True)
            at_exit(self, deadline)

        Outbox.at_exit = says_so
        for name in ("first", "second"):
            tracker = MLflowTracker(
                "e", "http://127.0.0.1:9", outbox_dir=f"{sys.argv[1]}/{name}", settings=Settings(exit_timeout=600.0)
            )
            tracker.start_run("r").log_metric("loss", 0.5, step=0)
        """,
        str(tmp_path),
    )
    assert ending.stdout is not None
    assert "waits\n" == ending.stdout.readline()
    ending.send_signal(number)
    _, said = ending.communicate(timeout=200)
    assert 0 == ending.returncode
    assert "Traceback" not in said
    assert 2 == said.count("2 events wait in"), said


def test_whoever_reads_what_a_program_says_does_not_wait_for_the_process_that_outlives_it(tmp_path: Path) -> None:
    """As ``tee`` does, and ``subprocess.run``: until nobody has the pipe any more."""
    ending = program(
        """
        import sys
        from mlflow_outbox import MLflowTracker, Settings

        settings = Settings(exit_timeout=2.0, linger=120.0)
        tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=sys.argv[1], worker="process", settings=settings)
        tracker.start_run("r").log_metric("loss", 0.5, step=0)
        print(tracker.outbox_path)
        """,
        str(tmp_path),
    )
    path, said = ending.communicate(timeout=110)  # less than that process stays for
    directory = OutboxDirectory.open(Path(path.strip()))
    found = eventually(lambda: worker_of(directory), message="the process is there")  # on a busy machine not at once
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)
    assert "2 events wait in" in said


def test_a_program_that_ends_by_the_signal_that_ended_its_worker_too_delivers_what_is_left(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As systemd and SLURM send it, to all processes: nobody starts another one in the background any more."""
    ending = program(
        """
        import os, signal, sys, time
        from mlflow_outbox import MLflowTracker, Settings

        settings = Settings(exit_timeout=60.0, sync_interval=600.0)
        tracker = MLflowTracker(*sys.argv[1:3], outbox_dir=sys.argv[3], worker="process", settings=settings)
        run = tracker.start_run("r")
        assert tracker.flush(120)
        worker = tracker._outbox._worker
        os.kill(worker.pid, signal.SIGTERM)
        while worker.is_alive():
            time.sleep(0.01)
        for i in range(200):
            run.log_metric("loss", i / 2, step=i)
        """,
        *(experiment_name, sqlite_uri, str(tmp_path)),
    )
    _, said = ending.communicate(timeout=250)
    assert "" == said
    assert numbered(200) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


def test_what_is_logged_first_at_the_exit_is_delivered_where_no_thread_can_be_started_then(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As with Python 3.12; of a worker that could not be started nothing need be said then."""
    ending = program(
        """
        import atexit, sys, threading
        from mlflow_outbox import MLflowTracker, Settings

        start = threading.Thread.start

        def start_before_the_exit(thread):
            if not threading.main_thread().is_alive():
                raise RuntimeError("can't create new thread at interpreter shutdown")
            start(thread)

        threading.Thread.start = start_before_the_exit
        settings = Settings(exit_timeout=60.0)
        tracker = MLflowTracker(*sys.argv[1:3], outbox_dir=sys.argv[3], settings=settings)

        def log():
            with tracker.start_run("last") as run:
                for i in range(200):
                    run.log_metric("loss", i / 2, step=i)

        atexit.register(log)
        """,
        *(experiment_name, sqlite_uri, str(tmp_path / "outbox")),
    )
    _, said = ending.communicate(timeout=120)
    assert "" == said
    assert numbered(200) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


_CHILDREN = """
import os, sys
from mlflow_outbox import MLflowTracker, Settings

settings = Settings(exit_timeout=60.0)
tracker = MLflowTracker(*sys.argv[1:3], outbox_dir=sys.argv[3], worker=sys.argv[4], settings=settings)
for number in range(2):
    if not os.fork():
        with tracker.start_run(f"child-{number}") as run:
            run.log_metric("loss", 0.5, step=number)
        os._exit(0)
    os.wait()
"""


def test_a_program_delivers_at_its_exit_what_its_forked_children_alone_have_logged(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As those of a pool do, which end without waiting; it has no worker of its own."""
    _, said = program(_CHILDREN, experiment_name, sqlite_uri, str(tmp_path), "thread").communicate(timeout=250)
    assert "" == said
    held = {run.info.run_name: run.data.metrics for run in runs(sqlite_uri, experiment_name)}
    assert {f"child-{number}": {"loss": 0.5} for number in range(2)} == held


def test_an_offline_program_says_at_its_exit_what_its_forked_children_have_logged(tmp_path: Path) -> None:
    """Three events each: the beginning, a point and the end."""
    _, said = program(_CHILDREN, "e", "http://127.0.0.1:9", str(tmp_path), "none").communicate(timeout=200)
    assert "6 events wait in" in said


#: Four tasks of a pool, each with a tracker of its own, which nobody closes; their program logs nothing.
_POOL = """
import concurrent.futures, multiprocessing, sys
from mlflow_outbox import MLflowTracker, Settings

def task(number):
    settings = Settings(exit_timeout=float(sys.argv[4]))
    tracker = MLflowTracker(*sys.argv[1:3], outbox_dir=sys.argv[3], settings=settings)
    with tracker.start_run(f"task-{number}") as run:
        run.log_metric("loss", 0.5, step=number)

forked = multiprocessing.get_context("fork")
with concurrent.futures.ProcessPoolExecutor(int(sys.argv[5]), mp_context=forked) as pool:
    list(pool.map(task, range(4)))
"""


def test_the_processes_of_a_pool_deliver_at_their_end_what_their_own_trackers_have_logged(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Python runs no handlers of its exit in them, and their program has no outbox."""
    _, said = program(_POOL, experiment_name, sqlite_uri, str(tmp_path), "60", "2").communicate(timeout=250)
    assert "mlflow-outbox" not in said
    held = {run.info.run_name: run.data.metrics for run in runs(sqlite_uri, experiment_name)}
    assert {f"task-{number}": {"loss": 0.5} for number in range(4)} == held


def test_a_process_of_a_pool_says_at_its_end_what_its_own_trackers_have_left(tmp_path: Path) -> None:
    """Once, however many trackers it had: of each of four runs the beginning, a point and the end."""
    _, said = program(_POOL, "e", "http://127.0.0.1:9", str(tmp_path), "0.1", "1").communicate(timeout=200)
    assert 1 == said.count("mlflow-outbox: 12 events wait in"), said


def test_a_program_that_has_delivered_all_says_nothing_of_what_another_one_delivers(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the programs of a sweep do, which share an outbox: of events that are on their way nobody has to send any."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK)
    tracker.start_run("its own").end()
    assert tracker.close(60)
    another = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with another.start_run("another's") as run:
        run.log_metric("loss", 0.5, step=1)
    outbox = tracker._outbox
    assert outbox is not None
    delivers = Lease(outbox.directory.lock, "process")
    eventually(delivers.acquire, 60, "its own worker has ended")
    outbox.at_exit(stopwatch.seconds())
    assert "events wait" not in caplog.text
    delivers.release()
    outbox.at_exit(stopwatch.seconds())
    assert "3 events wait in" in caplog.text, "nobody delivers them"
