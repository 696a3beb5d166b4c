"""``mlflow-outbox flush``: delivers or has delivered, keeps its time, and its exit code tells the truth."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import (
    NOBODY,
    QUICK_ENVIRONMENT,
    Here,
    busy,
    busy_until_it_ends,
    make_unreadable,
    offline,
    outbox_of,
    run,
    start,
    waited,
    withhold,
)
from contents import QUICK, artifacts, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.testing.faults import accept_hang, delay, forward_then_drop_response, status
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import backlog
from mlflow_outbox_worker.cli.exits import ExitCode
from mlflow_outbox_worker.cli.flush import Flush
from mlflow_outbox_worker.host_lease import worker_of
from mlflow_outbox_worker.lease import Lease
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.mlflow_sink import open_sink
from replays import run_with_kills
from servers import MlflowServer, eventually


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_was_logged_offline_arrives(mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
    """The real command in a process of its own delivers two runs, reads them back and files them, and exits 0."""
    offline(tmp_path, mlflow_server.url, experiment=experiment_name, runs=2, points=50)
    done = run("flush", "-d", tmp_path, "--timeout", 60, "--json")
    assert (0, "") == (done.code, done.err), done
    (told,) = json.loads(done.out)
    assert (106, 0, 0, 0) == (told["delivered"], told["pending"], told["dead"], told["exit_code"])
    held = runs(mlflow_server.url, experiment_name)
    assert ["FINISHED", "FINISHED"] == [one.info.status for one in held]
    assert all(numbered(50) == points(mlflow_server.url, one.info.run_id, "loss") for one in held)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    assert ([], 2) == (outbox.run_ids(), len(outbox.delivered_ids())), "read back and filed, not only sent"


def test_a_second_flush_has_nothing_to_do(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It says so at once, without asking the server."""
    offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    assert 0 == here("flush", "-d", tmp_path, "--timeout", 60).code
    again = here("flush", "-d", tmp_path)
    assert 0 == again.code
    assert "nothing waits" in again.out


def test_a_flush_looks_again_as_soon_as_its_own_worker_is_through(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While that one delivers it is not disturbed by looks at the ledger, which here would be an hour apart."""
    open_sink(mlflow_server.url).close()
    monkeypatch.setattr("mlflow_outbox_worker.cli.flush._LOOK_MOST", 3600.0)
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("", delay(0.2), times=None)
        offline(tmp_path, proxy.url, experiment=experiment_name)
        begun = time.monotonic()
        done = here("flush", "-d", tmp_path, "--timeout", 600)
    assert (0, True) == (done.code, "13 events delivered" in done.out), done
    assert time.monotonic() - begun < 60
    assert len(proxy.requests) > 3, "it took longer than a look"


def test_a_segment_that_cannot_be_read_is_said(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """All else arrives, and still it is an error: what was logged there is not in MLflow."""
    first, second = offline(tmp_path, mlflow_server.url, experiment=experiment_name, runs=2)
    (segment,) = OutboxDirectory.open(outbox_of(tmp_path)).run(first).glob("*.log")
    make_unreadable(segment)
    done = here("flush", "-d", tmp_path, "--timeout", 60)
    assert (1, True) == (done.code, "13 events delivered" in done.out), done
    assert "1 segment cannot be read, so that its events are not delivered; see: mlflow-outbox doctor" in done.err
    told = here("flush", "-d", tmp_path, "--timeout", 60, "--json")
    assert [(1, 1)] == [(one["unreadable_segments"], one["exit_code"]) for one in told.data]
    assert 1 == here("flush", "-d", tmp_path, "--timeout", 60, "--run", first).code
    assert 0 == here("flush", "-d", tmp_path, "--timeout", 60, "--run", second).code


def test_a_run_that_the_disk_does_not_give_is_one_event_beside_those_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What arrives of them is seen and said: a flush without a time-out gives up after a minute without that."""
    withheld, _ = offline(tmp_path, runs=2)
    one = Flush(OutboxDirectory.open(outbox_of(tmp_path)), Settings())
    with monkeypatch.context() as patch:
        withhold(patch, withheld)
        one.look()
        assert (14, 14, False) == (one.left, one.total, one.is_done())
        one.conclude()
        one.say()
        assert ExitCode.ERROR == one.code()
    out, err = capsys.readouterr()
    assert ("14 left, on disk" in out, "1 segment cannot be read" in err, "cannot be told" in err) == (
        True,
        True,
        False,
    )
    one.look()
    assert (26, 26) == (one.left, one.total), "the disk gives it again"
    alone = Flush(OutboxDirectory.open(outbox_of(tmp_path)), Settings(), withheld)
    alone.look()
    assert 13 == alone.left


def test_a_server_that_is_down_leaves_events(here: Here, tmp_path: Path) -> None:
    """Exit code 3, the number that is left, the reason, and everything still on disk."""
    open_sink(NOBODY).close()  # imports mlflow, which may take longer than the time-out below
    offline(tmp_path)
    done = here("flush", "-d", tmp_path, "--timeout", 4)
    assert 3 == done.code
    assert "0 events delivered, 13 left, on disk" in done.out
    assert "refused" in done.err
    assert 13 == here("status", "-d", tmp_path, "--json").data["pending"]


def test_a_flush_that_ends_early_says_why(here: Here, tmp_path: Path) -> None:
    """Beside what is left, whoever has delivered: its own warning came earlier, or not at all."""
    open_sink(NOBODY).close()  # imports mlflow, which may take longer than the time-out below
    offline(tmp_path)
    done = here("flush", "-d", tmp_path, "--timeout", 4)
    assert 3 == done.code
    _, begun, reason = " ".join(done.err.split()).rpartition(f"{outbox_of(tmp_path).name}: ")
    assert begun
    assert "refused" in reason


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_a_hung_server_holds_up_no_flush(seconds: float, silent: str, tmp_path: Path) -> None:
    """The time-out is kept to within a second, with requests that never end under way."""
    offline(tmp_path, silent)
    done, spent = waited("flush", "-d", tmp_path, "--timeout", seconds)
    assert 3 == done.code, done
    assert "0 events delivered, 13 left, on disk" in done.out
    assert spent < seconds + 1.0


def test_a_flush_without_a_time_out_does_not_give_up_in_the_middle_of_a_file(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes more than a minute, here more than four seconds; the next flush would begin with it anew."""
    monkeypatch.setattr("mlflow_outbox_worker.cli.flush._PATIENCE", 4.0)
    open_sink(mlflow_server.url).close()  # imports mlflow, which may take longer than that
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, _: method == "PUT", delay(8.0), times=None)
        tracker = MLflowTracker(
            experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=Settings(sync="os")
        )
        with tracker.start_run("large") as one:
            one.log_text("weights", "model.txt")
        tracker.close()
        done = here("flush", "-d", tmp_path)
    assert (0, True) == (done.code, "3 events delivered" in done.out), done
    assert ["model.txt"] == artifacts(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id)


def test_a_flush_without_a_time_out_does_not_give_up_while_a_program_sends_a_file(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program's own worker has the outbox, and says every few seconds that it is sending."""
    monkeypatch.setattr("mlflow_outbox_worker.cli.flush._PATIENCE", 6.0)
    open_sink(mlflow_server.url).close()  # imports mlflow, which may take longer than that
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, _: method == "PUT", delay(14.0), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=Settings(sync="os"))
        with tracker.start_run("large") as one:
            one.log_text("weights", "model.txt")
        eventually(lambda: any(request.method == "PUT" for request in proxy.requests), message="it is being sent")
        assert worker_of(OutboxDirectory.open(outbox_of(tmp_path))) is not None
        done = here("flush", "-d", tmp_path)
        tracker.close()
    assert 0 == done.code, done
    assert ["model.txt"] == artifacts(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id)


def test_a_flush_without_a_time_out_gives_up_where_a_server_is_silent(
    here: Here, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a request is under way is no reason to wait once such a request has failed."""
    monkeypatch.setattr("mlflow_outbox_worker.cli.flush._PATIENCE", 4.0)
    monkeypatch.setenv("MLFLOW_OUTBOX_REQUEST_TIMEOUT", "2")
    open_sink(silent).close()  # imports mlflow, which may take longer than that
    offline(tmp_path, silent)
    done = here("flush", "-d", tmp_path)
    assert 3 == done.code, done
    assert "0 events delivered, 13 left, on disk" in done.out


def test_a_flush_that_is_over_reads_no_run_a_second_time(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of runs that takes seconds beside its own worker; which of them are damaged is known by then."""
    ids, made = offline(tmp_path, runs=3), list[Path]()

    class Counted(RunReader):
        def __init__(self, path: Path) -> None:
            made.append(path)
            super().__init__(path)

    monkeypatch.setattr(backlog, "RunReader", Counted)
    assert 3 == here("flush", "-d", tmp_path, "--timeout", 0).code
    assert sorted(ids) == sorted(path.name for path in made)


def test_a_look_that_would_come_too_late_is_not_begun(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one takes is known from the one before: in an outbox with thousands of runs it is as long as a time-out."""
    looks: list[float] = []
    original = Flush.look

    def slowly(self: Flush) -> None:
        looks.append(time.monotonic())
        original(self)
        time.sleep(2.0)

    monkeypatch.setattr(Flush, "look", slowly)
    offline(tmp_path)
    assert 3 == here("flush", "-d", tmp_path, "--timeout", 3).code
    assert 1 == len(looks)


@pytest.mark.parametrize(("words", "code"), [(["flush", "-d"], 6), (["replay"], 6)])
def test_a_worker_that_is_stopped_holds_up_nobody(words: list[str], code: int, silent: str, tmp_path: Path) -> None:
    """SIGSTOP to the worker that delivers, a request under way: it is named, and the time-out is kept."""
    offline(tmp_path / "box", silent)
    holder = start("worker", "-d", tmp_path / "box")
    try:
        eventually(lambda: worker_of(OutboxDirectory.open(outbox_of(tmp_path / "box"))), 60)
        eventually((outbox_of(tmp_path / "box") / "delivery" / "cache.db").exists, 60)
        holder.send_signal(signal.SIGSTOP)
        done, spent = waited(*words, tmp_path / "box", "--timeout", 1.0)
    finally:
        holder.kill()
        holder.communicate()
    assert code == done.code, done
    assert f"process {holder.pid}) on this machine" in done.err
    assert spent < 1.0 + 1.0


def test_a_login_page_parks_and_the_repair_is_seen(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """401: exit code 4, tried anew by each flush; once a person has acted the next one delivers and exits 0."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("mlflow", status(401, body=b"no"), times=None)
        offline(tmp_path, proxy.url, experiment=experiment_name)
        first = here("flush", "-d", tmp_path, "--timeout", 120)
        assert 4 == first.code, first
        assert "13 parked for a person" in first.out
        asked = len(proxy.requests)
        assert 4 == here("flush", "-d", tmp_path, "--timeout", 120).code
        assert len(proxy.requests) > asked, "the second flush believed the first one's word"
        proxy.clear()
        assert 0 == here("flush", "-d", tmp_path, "--timeout", 60).code
    assert "FINISHED" == the_run(mlflow_server.url, experiment_name).info.status


def test_a_dead_letter_is_code_5(here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
    """All else is delivered, and the one refused param is named as a dead letter."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, worker="none")
    with tracker.start_run() as one:
        one.log_param("depth", 3)
        one.log_param("depth", 5)
    tracker.close()
    done = here("flush", "-d", tmp_path, "--timeout", 60)
    assert 5 == done.code, done
    assert "3 events delivered, 1 dead letter (mlflow-outbox dead list)" in done.out


def test_from_outside_while_the_experiment_backs_off(
    own_mlflow_server: object, experiment_name: str, tmp_path: Path
) -> None:
    """The experiment's thread holds the outbox and waits an hour after failures; a flush from outside ends the wait."""
    server = own_mlflow_server(start=False)  # type: ignore[operator]  # a fixture that makes servers
    server.start()
    server.kill()
    slow = Settings(poll_interval=0.02, retry_initial=3600.0, retry_max=3600.0)
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, settings=slow)
    one = tracker.start_run()
    for step in range(20):
        one.log_metric("loss", step / 2, step=step)
    eventually(lambda: tracker.counters.get("retried", 0) > 0, 60)
    server.start()
    done = run("flush", "-d", tmp_path, "--timeout", 60)
    assert 0 == done.code, done
    held = the_run(server.url, experiment_name)
    assert numbered(20) == points(server.url, held.info.run_id, "loss")
    assert "RUNNING" == held.info.status, "a flush ends no run"
    one.end()
    assert tracker.close(60)


def test_another_worker_that_does_not_answer_is_code_6(tmp_path: Path) -> None:
    """A holder of the lease that neither delivers nor tries is named, and the flush does not wait beyond its time."""
    offline(tmp_path)
    lease = Lease(OutboxDirectory.open(outbox_of(tmp_path)).lock, "process")
    assert lease.acquire()
    done = run("flush", "-d", tmp_path, "--timeout", 2)
    lease.release()
    assert 6 == done.code, done
    assert f"a worker (process, process {os.getpid()}) on this machine" in done.err


def test_another_worker_whose_server_is_down_is_code_3(tmp_path: Path) -> None:
    """It answered: it tried, and the server refused. That is left over, not held."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, settings=QUICK)
    tracker.start_run().log_metric("loss", 1.0)
    eventually(lambda: tracker.counters.get("retried", 0) > 0, 60)
    done = run("flush", "-d", tmp_path, "--timeout", 10)  # which its start is part of
    assert 3 == done.code, done
    tracker.close(0)


def test_it_takes_over_from_a_worker_that_ends(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The holder dies while the flush waits: the flush becomes the worker and delivers."""
    offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    lock = OutboxDirectory.open(outbox_of(tmp_path)).lock
    holder = subprocess.Popen(
        ["/bin/sh", "-c", 'exec 9>"$1"; flock -n 9 || exit 9; echo held; read line', "sh", str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert b"held\n" == holder.stdout.readline()
    flushing = start("flush", "-d", tmp_path, "--timeout", 60)
    eventually(lambda: OutboxDirectory.open(outbox_of(tmp_path)).hurry_asked() > 0)
    holder.kill()
    holder.communicate()
    out, _ = flushing.communicate(timeout=200)
    assert 0 == flushing.returncode, out


def test_only_one_run_is_waited_for(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """--run takes the beginning of an id; what becomes of the others does not matter."""
    first, second = offline(tmp_path, mlflow_server.url, experiment=experiment_name, runs=2)
    ledger = Ledger.open(outbox_of(tmp_path) / "delivery")
    from mlflow_outbox_worker.records import RunRecord

    ledger.commit(RunRecord(second, state="parked", reason="gone"))
    ledger.close()
    done = here("flush", "-d", tmp_path, "--run", first[:10], "--timeout", 60)
    assert 0 == done.code, done
    assert "13 events delivered" in done.out


def test_events_that_come_later_keep_no_flush(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """What counts is what was on disk when the flush began; a program that goes on logging does not keep it."""
    import threading

    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    one = tracker.start_run()
    over = threading.Event()

    def log() -> None:
        step = 0
        while not over.wait(0.001):
            one.log_metric("loss", 1.0, step=step)
            step += 1

    logging = threading.Thread(target=log)
    logging.start()
    try:
        done = run("flush", "-d", tmp_path, "--timeout", 60)
    finally:
        over.set()
        logging.join()
    assert 0 == done.code, done
    one.end()
    assert tracker.close(60)


def test_killed_at_any_moment_nothing_is_lost_or_doubled(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """SIGKILL to one flush after the other, answers getting lost besides; the last one finds everything once."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("runs/create", forward_then_drop_response(), times=1)
        proxy.on("log-batch", forward_then_drop_response(), times=3)
        offline(tmp_path, proxy.url, experiment=experiment_name, runs=2, points=1500)
        killed, code = run_with_kills(
            "flush",
            "-d",
            tmp_path,
            least=0.1,
            most=0.7,
            kills=4,
            env={**QUICK_ENVIRONMENT, "MLFLOW_OUTBOX_BATCH_POINTS": "100"},
        )
    assert (True, 0) == (killed > 1, code)
    held = runs(mlflow_server.url, experiment_name)
    assert 2 == len(held)
    assert all(numbered(1500) == points(mlflow_server.url, one.info.run_id, "loss") for one in held)


def test_an_interrupt_leaves_nothing_half_done(tmp_path: Path) -> None:
    """Ctrl-C while requests hang: 130 within a second or so, with the count of what is left."""
    with FaultProxy(NOBODY) as proxy:
        proxy.on("mlflow", accept_hang(), times=None)
        offline(tmp_path, proxy.url)
        process = start("flush", "-d", tmp_path)
        eventually(lambda: len(proxy.requests) > 0, 60)
        started, before = time.monotonic(), busy(process.pid)
        process.send_signal(signal.SIGINT)
        at_work = busy_until_it_ends(process.pid, before) - before
        waits = time.monotonic() - started - at_work
        out, _ = process.communicate(timeout=60)
    assert 130 == process.returncode, out
    assert "13 left, on disk" in out
    assert "interrupted; nothing was left half done" in out
    assert "Traceback" not in out
    assert waits < 5


def test_sigterm_ends_it_in_order(silent: str, tmp_path: Path) -> None:
    """What a service manager sends when its patience is over: left over is code 3, with the count of what is left."""
    offline(tmp_path, silent)
    process = start("flush", "-d", tmp_path)
    eventually(lambda: OutboxDirectory.open(outbox_of(tmp_path)).hurry_asked() > 0, 60)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert 3 == process.returncode, out
    assert "13 left, on disk" in out
    assert "Traceback" not in out
