"""The ledger damaged, locked or set back while the whole system runs: the server holds everything once."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contents import the_run
from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric, Tags, encode
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer, eventually

QUICK = workload.settings(**workload.TINY)


def log_run(uri: str, outbox: Path, experiment: str, first: int, count: int) -> set[int]:
    """Log a run without delivering it; return what was kept."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker="none", settings=QUICK)
    run = tracker.start_run(f"run {first}")
    kept = {n for n in range(first, first + count) if workload.log_event(run, n)}
    run.end()
    tracker.close(0)
    return kept


def damages(folder: Path, rng: random.Random, what: str, older: Path) -> None:
    """Damage the ledger of a worker that is gone."""
    main, wal, shm = (folder / f"cache.db{suffix}" for suffix in ("", "-wal", "-shm"))
    if what == "header zeroed":
        main.write_bytes(bytes(100) + main.read_bytes()[100:])
    elif what == "a page zeroed":
        data = bytearray(main.read_bytes())
        at = 4096 * rng.randrange(max(1, len(data) // 4096))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        main.write_bytes(data)
    elif what == "truncated":
        os.truncate(main, rng.randrange(main.stat().st_size))
    elif what == "empty":
        main.write_bytes(b"")
    elif what == "not SQLite":
        main.write_bytes(rng.randbytes(5000))
    elif what == "a flipped bit":
        target = wal if wal.exists() and wal.stat().st_size else main
        data = bytearray(target.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        target.write_bytes(data)
    elif what == "log missing":
        wal.unlink(missing_ok=True)
        shm.unlink(missing_ok=True)
    elif what == "gone":
        shutil.rmtree(folder)
    elif what == "an older copy":
        for path in (main, wal, shm):
            path.unlink(missing_ok=True)
        for path in older.iterdir():
            shutil.copy2(path, folder / path.name)


DAMAGES = (
    "header zeroed", "a page zeroed", "truncated", "empty", "not SQLite", "a flipped bit", "log missing", "gone",
    "an older copy",
)  # fmt: skip


@pytest.mark.fault("F31", "ledger: header or page zeroed, cut, empty, no SQLite, a bit, its log gone, set back (F32)")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_no_damage_of_the_ledger_loses_or_doubles_anything_in_mlflow(
    store: str,
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """A worker is killed in the middle, its ledger is damaged, and the next worker delivers the rest."""
    acked: set[int] = set()
    uri, outbox = "", tmp_path
    for number, what in enumerate(DAMAGES * row.pick(1, 30, 300)):
        if number % len(DAMAGES) == 0:
            database = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
            uri = database if store == "sqlite" else (tmp_path / f"mlruns{number}").as_uri()
            outbox, acked = tmp_path / f"outbox{number}", set()
        first = 1000 * (number + 1)
        acked |= log_run(uri, outbox, "ledger", first, 60)
        folder, older = workload.directory_of(outbox, uri) / "delivery", tmp_path / "older"
        child = nest.start(workload.drain, uri, str(outbox), "ledger", first + 900, workload.TINY)
        enough = len(held(uri, "ledger").events) + rng.randrange(40)
        eventually(lambda uri=uri, enough=enough: len(held(uri, "ledger").events) > enough)
        shutil.rmtree(older, ignore_errors=True)
        child.kill()
        acked |= set(range(first + 900, first + 910)) & set(held(uri, "ledger").events)
        if folder.is_dir():
            shutil.copytree(folder, older)
        damages(folder, rng, what, older)
        report = nest.start(workload.drain, uri, str(outbox), "ledger", first + 950, {}).report()
        fresh = set(report["acked"])
        assert 0 == report["left"]["pending"] + report["left"]["parked"] + report["left"]["dead"], (what, report)
        found = held(uri, "ledger")
        issued = acked | fresh | set(range(first + 900, first + 910))
        try:
            found.check(acked | fresh, issued)
        except AssertionError as error:
            failure = f"{what}: {error}"
            raise AssertionError(failure) from error
        acked |= fresh | (set(found.events) & issued)
        row.done()
    row.measure(store=store)


def log_while_locked(fd: int, uri: str, outbox: str, signs: str, locks: list[float]) -> None:
    """Log and deliver while another process locks the ledger again and again, the last time for ever; and report."""

    def work() -> dict[str, Any]:
        tracker = MLflowTracker("locked", uri, outbox_dir=outbox, settings=QUICK)
        run = tracker.start_run("locked")
        took: list[float] = []
        shares: list[float] = []

        def log(first: int, count: int) -> None:
            for n in range(first, first + count):
                if workload.timed(took, lambda n=n: workload.log_event(run, n)):
                    workload.ack(fd, n)

        for turn, seconds in enumerate([*locks, 1.0]):
            log(1000 * turn, 20)
            assert tracker.flush(60)
            Path(signs, f"lock{turn}").touch()
            eventually(Path(signs, f"locked{turn}").exists, 60)
            log(1000 * turn + 20, 40)
            used, started = time.process_time(), time.monotonic()
            threading.Event().wait(seconds)
            shares.append((time.process_time() - used) / (time.monotonic() - started))
            if turn < len(locks):
                Path(signs, f"unlock{turn}").touch()
                assert tracker.flush(60)
        run.end()
        started = time.monotonic()
        left = tracker.close(1.0)
        return {
            "share": max(shares),
            "p999_ms": workload.quantile(took, 0.999),
            "pending": left.pending,
            "closed_s": time.monotonic() - started,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F30", "another process holds the ledger's database for 1 s, 8 s, 30 s, and until its end")
def test_a_locked_ledger_stops_delivery_and_nothing_else(sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path) -> None:
    """Logging goes on, the processor rests, and all arrives once the lock is gone, the rest with the next program."""
    outbox, signs = tmp_path / "outbox", tmp_path / "signs"
    signs.mkdir()
    longest = row.pick(1, 8, 30)
    locks = [1.0] * row.pick(1, 14, 84) + [float(longest)] * (row.pick(1, 6, 16) - 1)
    child = nest.start(log_while_locked, sqlite_uri, str(outbox), str(signs), locks)
    path = workload.directory_of(outbox, sqlite_uri) / "delivery" / "cache.db"
    for turn in range(len(locks) + 1):
        eventually(lambda turn=turn: (signs / f"lock{turn}").exists() or not child.is_heard(), 120)
        other = sqlite3.connect(path, isolation_level=None)  # this process is the other one: the program is a child
        other.execute("BEGIN EXCLUSIVE")
        (signs / f"locked{turn}").touch()
        if turn < len(locks):
            eventually(lambda turn=turn: (signs / f"unlock{turn}").exists() or not child.is_heard(), 60 + longest)
            other.execute("ROLLBACK")
            other.close()
        row.done()
    report = child.report()
    other.close()
    row.measure(processor_share=report["share"], p999_ms=report["p999_ms"], closed_s=report["closed_s"])
    assert 0 < report["pending"], "what came while the lock was held for ever was not delivered"
    assert report["closed_s"] < 10, (
        "the end of a program waits no longer than it was told to, and for what is under way"
    )
    assert report["share"] < 0.05, "a busy loop"
    assert report["p999_ms"] < 50
    fresh = nest.start(workload.drain, sqlite_uri, str(outbox), "locked", 900, {}).report()
    assert (0, 0, 0) == tuple(fresh["left"][name] for name in ("pending", "parked", "dead")), fresh
    held(sqlite_uri, "locked").check(child.acked() | set(fresh["acked"]))


@pytest.mark.fault("F36", "the ledger's rows altered: a pickle, a file name, an expiry; the cursor's checksum wrong")
def test_altered_rows_of_the_ledger_are_never_believed(sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path) -> None:
    """Nothing is executed, read or deleted elsewhere, and MLflow ends up with everything once."""
    outbox = tmp_path / "outbox"
    acked: set[int] = set()
    witness = tmp_path / "witness"
    bomb = b"cos\nsystem\n(S'touch %s'\ntR." % str(witness).encode()
    changes = [
        ("UPDATE Cache SET mode = 4, value = ? WHERE key LIKE 'run/%'", (bomb,)),
        ("UPDATE Cache SET raw = 0 WHERE key LIKE 'run/%'", ()),
        ("UPDATE Cache SET filename = '../../outbox.json', mode = 2 WHERE key LIKE 'view/%'", ()),
        ("UPDATE Cache SET expire_time = 1.0", ()),
        ("UPDATE Cache SET value = substr(value, 1, length(value) - 1) || x'00' WHERE key LIKE 'run/%'", ()),
    ]
    for turn, (sql, arguments) in enumerate(changes):
        first = 1000 * (turn + 1)
        acked |= log_run(sqlite_uri, outbox, "rows", first, 30)
        nest.start(workload.drain, sqlite_uri, str(outbox), "rows", first + 900, {}).report()
        edit = sqlite3.connect(
            workload.directory_of(outbox, sqlite_uri) / "delivery" / "cache.db", isolation_level=None
        )
        edit.execute(sql, arguments)
        edit.close()
        report = nest.start(workload.drain, sqlite_uri, str(outbox), "rows", first + 950, {}).report()
        acked |= set(range(first + 900, first + 910)) | set(report["acked"])
        assert not report["left"]["pending"], report
        held(sqlite_uri, "rows").check(acked)
        row.done()
    assert not witness.exists()
    assert (workload.directory_of(outbox, sqlite_uri) / "outbox.json").exists()


@pytest.mark.fault("F37", "an outbox of a newer format")
def test_an_outbox_of_a_newer_format_is_refused_and_left_as_it_is(
    sqlite_uri: str, nest: Nest, row: Row, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It says to upgrade, nothing in it changes, and a version that knows the format delivers all of it."""
    outbox = tmp_path / "outbox"
    acked = log_run(sqlite_uri, outbox, "newer", 1000, 20)
    path = workload.directory_of(outbox, sqlite_uri) / "outbox.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "format": 99}))
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    tracker = MLflowTracker("newer", sqlite_uri, outbox_dir=outbox, settings=QUICK)
    assert tracker.disabled
    assert "has format 99 and this version reads up to 1; upgrade mlflow-outbox" in caplog.text
    assert not tracker.start_run("nowhere").log_metric("loss", 1.0, step=1)
    tracker.close(1)
    assert before == {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    path.write_text(text)
    report = nest.start(workload.drain, sqlite_uri, str(outbox), "newer", 50, {}).report()
    held(sqlite_uri, "newer").check(acked | set(report["acked"]))
    row.done()


@pytest.mark.fault("F37", "a segment of a newer format, an event of an unknown kind, beside those of this version")
def test_what_a_newer_version_added_to_a_run_is_kept_for_it(
    sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The rest is delivered; the unknown event's bytes are kept aside, the newer segment stays where it is."""
    outbox = tmp_path / "outbox"
    acked = log_run(sqlite_uri, outbox, "newer", 1000, 20)
    (run,) = (workload.directory_of(outbox, sqlite_uri) / "runs").iterdir()
    ours, _ = frame.unpack_header(next(run.glob("*-000000.log")).read_bytes())
    unknown = msgspec.msgpack.encode([99, "what only a newer version knows"])
    known = {number: encode(Metric("loss", number / 2, 1, number)) for number in (1030, 1040)}

    def add(writer: str, version: int, *payloads: bytes) -> Path:
        header = msgspec.structs.replace(ours, writer=writer, ordinal=0, first_seq=0, version=version)
        frames = [frame.pack(payload, seq, header.seed) for seq, payload in enumerate(payloads)]
        path = run / f"{writer}-000000.log"
        path.write_bytes(frame.pack_header(header) + b"".join(frames))
        path.chmod(0o600)
        return path

    add("a" * 16, 1, unknown, known[1030])
    newer = add("b" * 16, 99, known[1040])
    at_once = {"retention": 0.0}
    report = nest.start(workload.drain, sqlite_uri, str(outbox), "newer", 50, at_once).report()
    assert 1 == report["counters"]["quarantined"], report
    held(sqlite_uri, "newer").check(acked | {1030, *report["acked"]})
    (kept,) = (workload.directory_of(outbox, sqlite_uri) / "quarantine").iterdir()
    assert unknown in kept.read_bytes()
    assert newer.exists()
    add("b" * 16, 1, known[1040])  # the same by a version that knows its format
    again = nest.start(workload.drain, sqlite_uri, str(outbox), "newer", 60, at_once).report()
    held(sqlite_uri, "newer").check(acked | {1030, 1040, *report["acked"], *again["acked"]})
    row.done(2)


@pytest.mark.fault("F34", "an older value of another writer comes after the newer one was delivered and recorded")
def test_an_older_value_of_another_writer_does_not_undo_what_was_delivered(
    sqlite_uri: str, row: Row, tmp_path: Path
) -> None:
    """What the cursor has passed is not read again: that it was overtaken is known from the recorded view alone."""
    tracker = MLflowTracker("overtaken", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    run = tracker.start_run("overtaken")
    assert run.set_tag("phase", "newer")
    assert tracker.flush(30)
    directory = OutboxDirectory.open(workload.directory_of(tmp_path / "outbox", sqlite_uri))
    other = Journal(directory, RunIdentity(run.run_id, "overtaken"), QUICK, Counters())
    other.append(Tags({"phase": "older", "of the other": "there"}, 1))
    other.close()
    run.end()
    assert tracker.close(30)
    tags = the_run(sqlite_uri, "overtaken").data.tags
    assert ("newer", "there") == (tags["phase"], tags["of the other"])
    row.done()


@pytest.mark.fault("F34", "the ledger's commit fails after the server has committed the batch")
def test_a_batch_whose_recording_fails_is_there_once(
    part: slice, mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """The batch goes out again when the ledger can be written, and the server holds its events once."""
    from mlflow_outbox.errors import LedgerUnavailable
    from mlflow_outbox_worker.ledger import Ledger

    whole = Ledger.commit
    for turn in range(row.pick(2, 100, 1000))[part]:
        failed: list[int] = []

        def fail(ledger: Ledger, record: object, failed: list[int] = failed, **named: object) -> None:
            if named.get("view") is not None and len(failed) < 3:
                failed.append(1)
                msg = "injected"
                raise LedgerUnavailable(msg)
            whole(ledger, record, **named)  # type: ignore[arg-type]  # as they came

        experiment = f"{experiment_name}-{turn}"
        with FaultProxy(mlflow_server.url) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "commit", fail)
            tracker = MLflowTracker(experiment, proxy.url, outbox_dir=tmp_path / f"outbox{turn}", settings=QUICK)
            run = tracker.start_run("recorded")
            acked = {n for n in range(60) if workload.log_event(run, n)}
            run.end()
            assert tracker.flush(60)
            tracker.close(1)
            assert 3 == len(failed)
            bodies = [request.body for request in proxy.requests if "log-batch" in request.path]
            assert len(bodies) > len(set(bodies)), "the same batch, byte by byte"
        held(mlflow_server.database_uri, experiment).check(acked)
        row.done()
