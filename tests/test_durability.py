"""Nothing that a logging call has taken is lost, however the program ends, and nothing arrives twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from contents import QUICK, numbered, points, runs, stamped_points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.run import Run
from servers import MlflowServer, eventually


def program(body: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Python program of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.compatibility
@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_ten_thousand_points_survive_kill_9_right_after_the_last_call(
    store: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A new process delivers all 10,000 points once, with their values, steps and times."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    child = program(
        """
        import os, sys, time
        from mlflow_outbox import MLflowTracker
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="none")
        run = tracker.start_run("killed")
        for i in range(10_000):
            run.log_metric("loss", i / 2, step=i, timestamp=1_700_000_000_000 + i)
        os.kill(os.getpid(), 9)
        """,
        experiment_name,
        uri,
        str(tmp_path / "outbox"),
    )
    child.communicate(timeout=200)
    assert -signal.SIGKILL == child.returncode
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        tracker.start_run("wakes the worker").end()
        result = tracker.flush(120)
    assert result, result
    killed = next(run for run in runs(uri, experiment_name) if run.info.run_name == "killed")
    expected = [(i, 1_700_000_000_000 + i, i / 2) for i in range(10_000)]
    assert expected == stamped_points(uri, killed.info.run_id, "loss")
    assert "RUNNING" == killed.info.status, "a delivery never decides how a run ended"


def test_a_worker_killed_in_the_middle_is_replaced_and_nothing_doubles(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The program and its worker die by SIGKILL while delivering; the next program's worker goes on."""
    child = program(
        """
        import sys
        from mlflow_outbox import MLflowTracker, Settings
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], settings=Settings(batch_points=50))
        run = tracker.start_run("killed")
        for i in range(3000):
            run.log_metric("loss", i / 2, step=i)
        print("logged", flush=True)
        sys.stdin.read()
        """,
        experiment_name,
        mlflow_server.url,
        str(tmp_path / "outbox"),
    )
    assert child.stdout is not None
    assert b"logged\n" == child.stdout.readline()
    eventually(lambda: runs(mlflow_server.url, experiment_name), 120)  # the program imports MLflow
    child.kill()
    child.communicate()
    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        tracker.start_run("next").end()
        assert tracker.flush(60)
    killed = [run for run in runs(mlflow_server.url, experiment_name) if run.info.run_name == "killed"]
    assert 1 == len(killed)
    assert numbered(3000) == points(mlflow_server.url, killed[0].info.run_id, "loss")


def log_numbered(run: Run, key: str, count: int) -> None:
    """Log ``count`` numbered points."""
    for i in range(count):
        run.log_metric(key, i / 2, step=i)


def spawned(uri: str, experiment: str, outbox: str, run_id: str, key: str) -> None:
    """Be a process that was spawned: attach to a run by its id and log to it."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker="none", settings=QUICK)
    log_numbered(tracker.start_run(run_id=run_id), key, 500)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_eight_processes_and_eight_threads_log_to_one_run_and_to_their_own(
    how: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Every point of every process and thread arrives once, in the shared run and in the runs of their own."""
    uri, outbox = mlflow_server.url, tmp_path / "outbox"
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=outbox, settings=QUICK)
    shared = tracker.start_run("shared")
    log_numbered(shared, "parent", 100)

    def forked(number: int) -> None:
        log_numbered(shared, f"process{number}", 500)
        with tracker.start_run(f"own{number}") as own:
            log_numbered(own, "loss", 100)

    context = multiprocessing.get_context(how)
    processes = [
        context.Process(target=forked, args=(n,))
        if how == "fork"
        else context.Process(target=spawned, args=(uri, experiment_name, str(outbox), shared.run_id, f"process{n}"))
        for n in range(8)
    ]
    threads = [threading.Thread(target=log_numbered, args=(shared, f"thread{n}", 500)) for n in range(8)]
    for worker in [*processes, *threads]:
        worker.start()
    for worker in [*processes, *threads]:
        worker.join(120)
    shared.end()
    assert tracker.close(60)
    by_name = {run.info.run_name: run for run in runs(uri, experiment_name)}
    expected = {"shared"} | ({f"own{n}" for n in range(8)} if how == "fork" else set())
    assert expected == set(by_name)
    assert numbered(100) == points(uri, by_name["shared"].info.run_id, "parent")
    for n in range(8):
        assert numbered(500) == points(uri, by_name["shared"].info.run_id, f"process{n}")
        assert numbered(500) == points(uri, by_name["shared"].info.run_id, f"thread{n}")
        if how == "fork":
            assert numbered(100) == points(uri, by_name[f"own{n}"].info.run_id, "loss")


def test_an_exit_without_close_delivers_within_its_time(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A script that logs and simply ends has everything in MLflow, and says nothing."""
    child = program(
        """
        import sys
        from mlflow_outbox import MLflowTracker, Settings
        settings = Settings(exit_timeout=60.0)  # a busy machine takes more than the usual ten seconds to import mlflow
        run = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], settings=settings).start_run("plain")
        for i in range(300):
            run.log_metric("loss", i / 2, step=i)
        """,
        experiment_name,
        mlflow_server.url,
        str(tmp_path / "outbox"),
    )
    _, said = child.communicate(timeout=200)
    assert 0 == child.returncode
    assert b"" == said
    run = the_run(mlflow_server.url, experiment_name)
    assert numbered(300) == points(mlflow_server.url, run.info.run_id, "loss")


def test_an_exit_with_the_server_away_is_bounded_and_says_what_is_left(experiment_name: str, tmp_path: Path) -> None:
    """One line names the number of events, where they lie, and the command that sends them."""
    child = program(
        """
        import atexit, sys, time
        def busy():  # seconds in which this thread has computed, or could not because the processors had others
            return sum(map(int, open("/proc/thread-self/schedstat").read().split()[:2])) / 1e9
        def say():
            took = time.monotonic() - logged
            print(took, took - (busy() - before))
        atexit.register(say)  # registered first, so it runs last
        from mlflow_outbox import MLflowTracker, Settings
        settings = Settings(exit_timeout=1.0)
        tracker = MLflowTracker(sys.argv[1], "http://127.0.0.1:9", outbox_dir=sys.argv[2], settings=settings)
        run = tracker.start_run("offline")
        for i in range(300):
            run.log_metric("loss", i / 2, step=i)
        logged, before = time.monotonic(), busy()
        """,
        experiment_name,
        str(tmp_path / "outbox"),
    )
    spent, said = child.communicate(timeout=120)
    assert 0 == child.returncode
    took, waited = map(float, spent.split())
    assert 1.0 <= took, "the time that was set"
    assert waited < 1.0 + 4.0, "and some for a busy machine"
    lines = [line for line in said.decode().splitlines() if "To send them" in line]
    assert 1 == len(lines), said
    assert "301 events wait" in lines[0]
    assert "nothing is lost" in lines[0]
    assert f"mlflow-outbox flush --outbox-dir {tmp_path}/outbox" in lines[0]


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os._exit(3)", "raise RuntimeError", "os.kill(os.getpid(), 15)"])
def test_however_a_program_ends_its_events_are_delivered_later(
    ending: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """exit, _exit, an exception and SIGTERM leave all events on disk, and the next program delivers them."""
    child = program(
        f"""
        import os, sys
        from mlflow_outbox import MLflowTracker, Settings
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="none")
        run = tracker.start_run("ended")
        for i in range(200):
            run.log_metric("loss", i / 2, step=i)
        {ending}
        """,
        experiment_name,
        sqlite_uri,
        str(tmp_path / "outbox"),
    )
    child.communicate(timeout=120)
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        assert tracker.flush(60)
    run = the_run(sqlite_uri, experiment_name)
    assert numbered(200) == points(sqlite_uri, run.info.run_id, "loss")


@pytest.mark.parametrize("worker", ["none", "thread"])
def test_logging_from_del_and_atexit_is_kept(
    worker: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Events of the very last moments of an interpreter reach the disk, and do not keep it from ending."""
    child = program(
        """
        import atexit, sys
        from mlflow_outbox import MLflowTracker
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker=sys.argv[4])
        run = tracker.start_run("late")
        class Late:
            def __del__(self): run.log_metric("from_del", 1.0, step=1)
        late = Late()
        atexit.register(lambda: run.log_metric("from_atexit", 2.0, step=2))
        """,
        experiment_name,
        sqlite_uri,
        str(tmp_path / "outbox"),
        worker,
    )
    _, said = child.communicate(timeout=120)
    assert 0 == child.returncode, said
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        assert tracker.flush(60)
    assert {"from_del": 1.0, "from_atexit": 2.0} == the_run(sqlite_uri, experiment_name).data.metrics


def test_a_worker_process_outlives_a_killed_program(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With worker="process", SIGKILL of the program's whole process group right after logging loses nothing."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import os, signal, sys, time
                from mlflow_outbox import MLflowTracker
                tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="process")
                run = tracker.start_run("killed")
                for i in range(2000):
                    run.log_metric("loss", i / 2, step=i)
                os.killpg(0, signal.SIGKILL)
                """
            ),
            experiment_name,
            mlflow_server.url,
            str(tmp_path / "outbox"),
        ],
        start_new_session=True,
    )
    child.wait(120)
    eventually(
        lambda: (
            runs(mlflow_server.url, experiment_name)
            and numbered(2000)
            == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")
        ),
        120,  # it imports MLflow, and stands back for all else on this machine
    )


def test_a_program_in_development_mode_is_not_warned_of_the_worker_process_that_goes_on(
    sqlite_uri: str, tmp_path: Path
) -> None:
    """It is meant to, also when a tracker was closed long before the end; Python warns of a process left running."""
    text = """
        import sys
        from mlflow_outbox import MLflowTracker
        for name in ("closed", "open"):
            tracker = MLflowTracker(name, sys.argv[1], outbox_dir=f"{sys.argv[2]}/{name}", worker="process")
            run = tracker.start_run()
            run.log_metric("m", 1.0)
            if name == "closed":
                run.end()
                tracker.close(0)
                del run, tracker
        """
    command = [sys.executable, "-X", "dev", "-c", textwrap.dedent(text), sqlite_uri, str(tmp_path)]
    environment = {**os.environ, "MLFLOW_OUTBOX_EXIT_TIMEOUT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert 0 == done.returncode, done.stderr
    assert "Warning" not in done.stderr
    names = ("closed", "open")
    # Both import MLflow, and stand back for all else on this machine.
    eventually(lambda: [{"m": 1.0}] * 2 == [run.data.metrics for name in names for run in runs(sqlite_uri, name)], 200)


def test_two_trackers_with_different_destinations_never_share_a_queue(tmp_path: Path) -> None:
    """Each destination has an outbox of its own under one root."""
    one = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path / "root", worker="none")
    two = MLflowTracker("e", "http://127.0.0.1:10", outbox_dir=tmp_path / "root", worker="none")
    assert one.outbox_path != two.outbox_path
    assert {one.outbox_path, two.outbox_path} == {tmp_path / "root" / name for name in os.listdir(tmp_path / "root")}
    assert one.outbox_path is not None
    assert "http://127.0.0.1:9" == json.loads((one.outbox_path / "outbox.json").read_text())["destination"]


def test_an_offline_program_says_at_its_exit_what_waits_and_not_what_was_delivered_meanwhile(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Of two runs that it wrote, another worker has sent the first one before the exit."""
    child = program(
        """
        import sys
        from mlflow_outbox import MLflowTracker
        offline = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="none")
        with offline.start_run("sent") as run:
            for i in range(20):
                run.log_metric("loss", 0.5, step=i)
        with MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="thread") as tracker:
            assert tracker.flush(200)
        offline.start_run("waits").log_param("depth", 3)
        """,
        experiment_name,
        sqlite_uri,
        str(tmp_path / "outbox"),
    )
    _, said = child.communicate(timeout=250)
    assert 0 == child.returncode, said
    assert "mlflow-outbox: 2 events wait in" in said.decode()


#: Logs a run in a function, drops it, and ends once the background has let go of its journal.
DROPS_ITS_RUN = """
    import gc, sys, weakref
    from mlflow_outbox import MLflowTracker, Settings
    from servers import eventually

    def log():
        settings = Settings(exit_timeout=float(sys.argv[4]), sync_interval=0.01)
        tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker=sys.argv[5], settings=settings)
        with tracker.start_run("dropped") as run:
            for i in range(50):
                run.log_metric("loss", i / 2, step=i)
        return weakref.ref(run._journal)

    journal = log()
    eventually(lambda: gc.collect() >= 0 and journal() is None)
"""


def dropping(*arguments: object) -> subprocess.Popen[bytes]:
    """Start the program that drops its run, with experiment, URI, outbox, seconds for its exit, and worker."""
    return program(f"import sys; sys.path[:0] = {sys.path!r}\n" + textwrap.dedent(DROPS_ITS_RUN), *map(str, arguments))


def test_an_exit_without_close_delivers_a_run_whose_journal_is_gone(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """What a function logged and ended long before the end of the program is delivered as well."""
    _, said = dropping(experiment_name, sqlite_uri, tmp_path / "outbox", 60, "thread").communicate(timeout=200)
    assert b"" == said
    assert numbered(50) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


@pytest.mark.parametrize("worker", ["thread", "none"])
def test_an_exit_says_what_is_left_of_a_run_whose_journal_is_gone(
    worker: str, experiment_name: str, tmp_path: Path
) -> None:
    """With the server away as offline: the number of its events, and how to send them."""
    child = dropping(experiment_name, "http://127.0.0.1:9", tmp_path / "outbox", 0.5, worker)
    _, said = child.communicate(timeout=200)
    assert 0 == child.returncode, said
    assert 1 == said.decode().count("mlflow-outbox: 52 events wait in"), said
