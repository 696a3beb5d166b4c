"""``mlflow-outbox worker``: delivery as a service, how it ends, and what it tells a monitoring."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Here, busy, busy_until_it_ends, make_unreadable, offline, outbox_of, run, start
from contents import QUICK, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes
from mlflow_outbox_worker.cli import terminal
from mlflow_outbox_worker.cli.signals import Ending
from mlflow_outbox_worker.cli.worker import Service
from mlflow_outbox_worker.host_lease import worker_of
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.metrics import Exporter, Histogram, Meter, measured
from mlflow_outbox_worker.room import Room
from mlflow_outbox_worker.sink import MetricPoint, Sink, SinkError
from servers import MlflowServer, eventually


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM, timeout: float = 120) -> str:
    """Send a signal, wait for the end and return what was printed."""
    process.send_signal(number)
    out, _ = process.communicate(timeout=timeout)
    return out


def test_all_outboxes_also_later_ones_and_the_drain(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """--all delivers an outbox there is, one that is made later, and ends on SIGTERM with 0 and its counts."""
    first = offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    process = start("worker", "-d", tmp_path, "--all", "--grace", "20")
    eventually(lambda: len(runs(mlflow_server.url, experiment_name)) == 1, 60)
    second = offline(tmp_path, mlflow_server.url + "/", experiment=experiment_name)
    third = offline(tmp_path, mlflow_server.url.replace("127.0.0.1", "localhost"), experiment=experiment_name)
    eventually(lambda: len(runs(mlflow_server.url, experiment_name)) == 3, 60)
    out = end(process)
    assert 0 == process.returncode, out
    assert 3 == len({*first, *second, *third})
    assert "delivering, to http://localhost" in out
    assert "26 delivered, 0 left" in out


def test_it_stands_by_and_takes_over(mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
    """Beside the experiment's own worker it waits; when the experiment ends it goes on with what was left."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    one = tracker.start_run()
    one.log_metric("loss", 0.0, step=0)
    assert tracker.flush(60)
    process = start("worker", "-d", tmp_path)
    assert process.stdout is not None
    assert "standing by, a worker (thread" in process.stdout.readline()
    assert tracker.close(60)
    (path,) = find_outboxes(tmp_path)
    directory = OutboxDirectory.open(path)

    def taken_over() -> bool:
        found = worker_of(directory)
        return found is not None and found.pid == process.pid

    eventually(taken_over)
    writer = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with writer.start_run(run_id=one.run_id) as again:
        again.log_metric("loss", 0.5, step=1)
    writer.close()
    remote = the_run(mlflow_server.url, experiment_name).info.run_id
    eventually(lambda: numbered(2) == points(mlflow_server.url, remote, "loss"), 60)
    out = end(process)
    assert 0 == process.returncode, out


@pytest.mark.parametrize("every", [["--all"], []], ids=["all", "one"])
def test_an_outbox_that_is_removed_and_made_anew_is_delivered_too(
    every: list[str], mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Somebody clears up between two sessions, while the service runs; its metrics show the new one alone."""
    offline(tmp_path / "root", mlflow_server.url, experiment=experiment_name)
    process = start("worker", "-d", tmp_path / "root", *every, "--metrics-port", "0")
    assert process.stdout is not None
    served = re.search(r"metrics at (\S+)", process.stdout.readline())
    assert served is not None
    eventually(lambda: len(runs(mlflow_server.url, experiment_name)) == 1, 60)
    outbox_of(tmp_path / "root").rename(tmp_path / "removed")
    offline(tmp_path / "root", mlflow_server.url, experiment=experiment_name)
    eventually(lambda: len(runs(mlflow_server.url, experiment_name)) == 2, 60)
    with urllib.request.urlopen(served[1], timeout=60) as answer:
        shown = answer.read().decode()
    assert 1 == shown.count("\nmlflow_outbox_backlog_events{")
    out = end(process)
    assert 0 == process.returncode, out
    assert "13 delivered, 0 left" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_left_after_the_grace_time(number: signal.Signals, here: Here, tmp_path: Path) -> None:
    """The server stays away: the worker ends when the grace time is over, with code 3, everything on disk."""
    offline(tmp_path)
    process = start("worker", "-d", tmp_path, "--grace", "1", "--metrics-port", "0")
    assert process.stdout is not None
    served = re.search(r"metrics at (\S+)", process.stdout.readline())
    assert served is not None
    assert "delivering" in process.stdout.readline()
    with urllib.request.urlopen(served[1], timeout=60) as answer:
        shown = answer.read().decode()
    for name in (
        "backlog_events",
        "backlog_bytes",
        "parked_events",
        "dead_letters",
        "quarantined",
        "retries",
        "refused_events",
    ):
        assert re.search(rf"^mlflow_outbox_{name}\S*{{", shown, re.MULTILINE), (name, shown)

    def has_tried() -> bool:  # the import of MLflow before that would keep its main thread from ending in time
        (found,) = here("status", "-d", tmp_path, "--json").data["outboxes"]
        return bool(found["destination_state"] == "away")

    eventually(has_tried)
    started, before = time.monotonic(), busy(process.pid)
    process.send_signal(number)
    at_work = busy_until_it_ends(process.pid, before) - before
    assert time.monotonic() - started - at_work < 6
    out, _ = process.communicate(timeout=60)
    assert 3 == process.returncode, out
    assert "13 left" in out
    assert "Traceback" not in out


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """However long the grace time is."""
    offline(tmp_path)
    process = start("worker", "-d", tmp_path, "--grace", "600")
    assert process.stdout is not None
    assert "delivering" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    while "ending" not in (line := process.stdout.readline()):
        assert line
    out = end(process)
    assert 3 == process.returncode, out


def test_until_idle_and_the_metrics_file(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It ends by itself when all is delivered; the file for the textfile collector is whole and readable by others."""
    offline(tmp_path / "box", mlflow_server.url, experiment=experiment_name)
    file = tmp_path / "outbox.prom"
    done = here("worker", "-d", tmp_path / "box", "--until-idle", "--metrics-file", file)
    assert 0 == done.code, done
    lines = file.read_text().splitlines()
    name = outbox_of(tmp_path / "box").name
    assert f'mlflow_outbox_delivered_events_total{{outbox="{name}"}} 13.0' in lines
    assert f'mlflow_outbox_backlog_events{{outbox="{name}"}} 0.0' in lines
    assert f'mlflow_outbox_destination_up{{outbox="{name}"}} 1.0' in lines
    assert f'mlflow_outbox_delivery_latency_seconds_count{{outbox="{name}"}} 10.0' in lines
    assert any(line.startswith(f'mlflow_outbox_requests_total{{answer="ok",outbox="{name}"}}') for line in lines)
    assert 0o644 == stat.S_IMODE(file.stat().st_mode) | 0o044
    assert [file.name] == [path.name for path in tmp_path.iterdir() if path.is_file()], "no draft is left"


def test_until_idle_does_not_end_while_the_ledger_is_opened(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk takes longer for that than from one look to the next, and nothing is known of any run then."""
    offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    opened = Room.opened

    def slowly(self: Room, path: Path, report: Callable[[str], object]) -> Ledger:
        time.sleep(1.0)
        return opened(self, path, report)

    monkeypatch.setattr(Room, "opened", slowly)
    monkeypatch.setattr("mlflow_outbox_worker.cli.worker._TICK", 0.02)
    done = here("worker", "-d", tmp_path, "--until-idle")
    assert (0, True) == (done.code, "13 delivered, 0 left" in done.out), done


def test_a_segment_that_cannot_be_read_is_said_at_the_end(tmp_path: Path) -> None:
    """There is nothing more to deliver, but what was logged there is not in MLflow: exit code 1."""
    (run_id,) = offline(tmp_path)
    (segment,) = (outbox_of(tmp_path) / "runs" / run_id).glob("*.log")
    make_unreadable(segment)
    done = run("worker", "-d", tmp_path, "--until-idle")
    assert (1, True) == (done.code, "1 segment cannot be read" in done.out), done


def test_metrics_over_http(tmp_path: Path) -> None:
    """OpenMetrics for those that ask for it, with what waits, the answers by class, and everything that was counted."""
    offline(tmp_path)
    directory = OutboxDirectory.open(outbox_of(tmp_path))
    counters, meter = Counters(), Meter()
    counters.add("lanes_abandoned", 2)
    exporter = Exporter(Settings())
    exporter.watch(directory, counters, meter, lambda: True)
    with pytest.raises(SinkError):
        meter.call("log_batch", _refusing, "run", [], {}, {})
    port = exporter.serve(0, "127.0.0.1")
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    label = f'outbox="{directory.path.name}"'
    assert f"mlflow_outbox_backlog_events{{{label}}} 13.0" in text
    assert f'mlflow_outbox_requests_total{{answer="5xx",{label}}} 1.0' in text
    assert f'mlflow_outbox_counts_total{{{label},reason="lanes_abandoned"}} 2.0' in text
    assert text.endswith("# EOF\n")


def test_an_address_of_ipv6_is_told_as_a_url_has_it(here: Here, tmp_path: Path) -> None:
    """In brackets; and where it cannot be had, it is the address that another one is asked for."""
    offline(tmp_path)
    options = ("--metrics-port", "0", "--until-idle", "--grace", "0")
    done = here("worker", "-d", tmp_path, "--metrics-address", "2001:db8::1", *options)
    assert 1 == done.code
    assert "served at [2001:db8::1]:0: " in done.err
    assert "give another --metrics-address" in done.err


def test_a_service_says_how_far_it_is_only_when_that_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An outbox in which nothing happens would fill its log, a line each minute."""
    offline(tmp_path)
    terminal.prepare()
    with Ending() as ending:
        service = Service(Settings(root=tmp_path), ending)
        service.adopt(tmp_path)
        (worker,) = service._workers.values()
        for delivered in (0, 13, 0, 0, 4, 0):
            worker.counters.add("delivered", delivered)
            service._report()
        assert 3 == service.end(0.0, None)
    said = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if "so far" in line]
    assert ["13 delivered so far", "17 delivered so far"] == said


def test_without_prometheus_client_it_says_how_to_get_it(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with the command, code 1; without metrics nothing is missing."""
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    offline(tmp_path)
    done = here("worker", "-d", tmp_path, "--metrics-port", "0")
    assert 1 == done.code
    assert "pip install 'mlflow-outbox[metrics]'" in done.err


def test_several_outboxes_need_all(here: Here, tmp_path: Path) -> None:
    """Otherwise one is to be named: code 2."""
    offline(tmp_path)
    offline(tmp_path, "http://127.0.0.1:10")
    done = here("worker", "-d", tmp_path)
    assert 2 == done.code
    assert "there are 2 outboxes" in done.err


def test_histograms_are_cumulative() -> None:
    """As Prometheus wants them, bounds included, with the sum."""
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.add(seconds)
    assert [("0.1", 2), ("1.0", 3), ("+Inf", 4)] == histogram.buckets()
    assert 7.65 == pytest.approx(histogram.sum)


def _refusing(*_: object) -> None:
    raise SinkError("no", kind="answer", status=503)


class _Recorder:
    deduplicates_metrics = True
    takes_repeats = False
    parallel = False

    def log_batch(self, run_id: str, points: object, params: object, tags: object) -> None:
        return

    def update_run(self, run_id: str, *, status: str, end_time_ms: int | None) -> None:
        raise SinkError("reset", kind="connection")

    def close(self) -> None:
        return


def test_a_measured_sink_is_the_same_sink() -> None:
    """Answers, errors and attributes pass through; requests are counted by class, points by how late they are."""
    meter = Meter(now_ms=lambda: 10_000)
    sink: Sink = measured(_Recorder(), meter)  # type: ignore[arg-type]  # as much of one as is used
    assert (True, False) == (sink.deduplicates_metrics, sink.parallel)
    batch = [MetricPoint("a", 1.0, 9_900, 0), MetricPoint("a", 1.0, 5_000, 1), MetricPoint("a", 1.0, 99_000, 2)]
    sink.log_batch("run", batch, {}, {})
    with pytest.raises(SinkError, match="reset"):
        sink.update_run("run", status="FINISHED", end_time_ms=1)
    sink.close()
    assert {"ok": 1, "connection": 1} == dict(meter.answers)
    assert [("0.1", 2), ("0.3", 2), ("1.0", 2), ("3.0", 2), ("10.0", 3)] == meter.latency.buckets()[:5]


def test_an_outbox_that_is_not_safe_is_left_alone(tmp_path: Path) -> None:
    """The others are delivered; the one that others can enter is named once, and at the end, which is code 1."""
    offline(tmp_path)
    offline(tmp_path, "http://127.0.0.1:10")
    bad = min(find_outboxes(tmp_path))
    bad.chmod(0o755)
    process = start("worker", "-d", tmp_path, "--all", "--grace", "0")
    assert process.stdout is not None
    assert "left alone: " in process.stdout.readline()
    assert "delivering" in process.stdout.readline()
    out = end(process)
    assert 1 == process.returncode, out
    assert f"left alone: {bad}" in out


def test_an_outbox_that_was_made_safe_is_delivered_too(tmp_path: Path) -> None:
    """What was left alone once is no error at the end."""
    offline(tmp_path)
    bad = outbox_of(tmp_path)
    bad.chmod(0o755)
    process = start("worker", "-d", tmp_path, "--all", "--grace", "0")
    assert process.stdout is not None
    assert "left alone: " in process.stdout.readline()
    bad.chmod(0o700)
    assert "delivering" in process.stdout.readline()
    out = end(process)
    assert (3, False) == (process.returncode, "left alone" in out), out


def test_it_goes_on_while_there_is_no_thread_for_a_new_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data loaders of the same user have used up a limit; it is delivered when there is one again."""
    offline(tmp_path)

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with Ending() as ending:
        service = Service(Settings(root=tmp_path), ending)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            service.adopt(tmp_path)
        assert "<Service of 0 outboxes>" == repr(service)
        service.adopt(tmp_path)
        assert "<Service of 1 outboxes>" == repr(service)
        assert 3 == service.end(0.0, None)


def test_until_idle_ends_where_there_is_nothing_to_deliver(here: Here, tmp_path: Path) -> None:
    """It says so: code 0 where there is no outbox, 1 where the only one is not safe to use, of which -q says so too."""
    done = here("worker", "-d", tmp_path, "--all", "--until-idle")
    assert (0, True) == (done.code, f"there is no outbox to deliver in {tmp_path}" in done.out), done
    offline(tmp_path)
    outbox_of(tmp_path).chmod(0o755)
    done = here("worker", "-d", tmp_path, "--all", "--until-idle", "-q")
    assert (1, "", True) == (done.code, done.out, "left alone: " in done.err), done
