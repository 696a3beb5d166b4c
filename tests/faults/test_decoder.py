"""Payloads that are nearly events, in intact frames, for the decoder, the readers and the worker (F15)."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from faults import workload
from faults.children import Nest
from faults.mixtures import event, nests, spoilt
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.errors import CorruptSegment, NewerFormat
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Metric, Request, SegmentClosed, decode, encode
from mlflow_outbox.spool.listing import decoded
from mlflow_outbox_worker.sink import OPERATIONS
from spools import RUN, Everything, closing, header, metric, packed, write_segment

#: Bytes by which memory may grow.
GROWTH = 64 * 1024 * 1024


def _resident(peak: bool = False) -> int:
    """Return the bytes of memory that this process has, or has had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM:" if peak else "VmRSS:"
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def growth(work: Any) -> int:
    """Do something and return by how many bytes this process had grown at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _resident()
    work()
    return _resident(peak=True) - before


def seeds_of(rng: random.Random) -> list[bytes]:
    """Return payloads to spoil, none of which is an event that the tests count."""
    return [encode(event(rng)) for _ in range(60)]


def decode_spoilt(fd: int, seed: int, count: int) -> None:
    """Decode payloads that are nearly events, deep ones too, and report."""

    def work() -> dict[str, Any]:
        rng, kinds = random.Random(seed), {"events": 0, "refused": 0}
        seeds = seeds_of(rng)

        def one(payload: bytes) -> None:
            try:
                decode(payload)
                kinds["events"] += 1
            except msgspec.DecodeError:
                kinds["refused"] += 1
            except BaseException as error:
                failure = f"{payload[:200]!r} ({len(payload)} bytes): {error!r}"
                raise AssertionError(failure) from error

        def many() -> None:
            for number in range(count):
                if number % 10_000 == 0:
                    seeds[:] = seeds_of(rng)
                one(spoilt(rng, seeds))
            for depth in (10, 500, 5000, 100_000):
                for bomb in nests(rng, depth):
                    one(bomb)

        return {"growth": growth(many), **kinds}

    workload.reported(fd, work)


@pytest.mark.fault("F15", "payloads that are nearly events, claims of 4 GiB, nesting to a depth of 100,000")
def test_no_payload_costs_more_than_its_event(part: slice, nest: Nest, row: Row, rng: random.Random) -> None:
    """Each is an event or refused by the one documented error, in bounded memory."""
    count = len(range(row.pick(5_000, 1_000_000, 100_000_000))[part])
    report = nest.start(decode_spoilt, rng.getrandbits(64), count).report(7200)
    assert report["growth"] < GROWTH
    assert count // 10 < report["events"], "hardly any of them reached the inside of the decoder"
    assert count // 4 < report["refused"]
    row.measure(growth_mib=report["growth"] / 2**20, events=report["events"], refused=report["refused"])
    row.done(count)


@pytest.mark.fault("F15", "payloads that are nearly events, in intact frames between good ones")
def test_frames_that_hold_no_event_cost_their_neighbours_nothing(row: Row, rng: random.Random, tmp_path: Path) -> None:
    """The good ones are read; of the others each is an event, or set aside and counted."""
    folder, head, after = tmp_path / RUN, header(), header(ordinal=1, first_seq=80)
    write_segment(folder, after, [*packed(map(metric, range(80, 85)), after), closing(85, after)])
    seeds = seeds_of(rng)
    for number in range(row.pick(25, 1500, 100_000)):
        if number % 100 == 99:
            seeds = seeds_of(rng)
        bad = list(nests(rng, 100_000)) if number % 100 == 0 else [spoilt(rng, seeds) for _ in range(40)]
        found = [decoded(payload) for payload in bad[:40]]
        while len(found) < 40 or any(isinstance(event, SegmentClosed) for event in found):  # it would be the last
            bad = [payload for payload in bad[:40] if not isinstance(decoded(payload), SegmentClosed)]
            bad += [spoilt(rng, seeds) for _ in range(40 - len(bad))]
            found = [decoded(payload) for payload in bad]
        frames = []
        for at in range(80):
            payload = bad[at // 2] if at % 2 else encode(metric(at))
            frames.append(frame.pack(payload, at, head.seed))
        write_segment(folder, head, [*frames, closing(80, head)])
        everything = Everything(folder)
        good = [event for event in everything.events if isinstance(event, Metric) and event.key == "loss"]
        assert [metric(at) for at in (*range(0, 80, 2), *range(80, 85))] == [
            event for event in good if event == metric(event.step)
        ]
        assert sum(isinstance(event, str) for event in found) == len(everything.broken)
        assert {"unknown"} >= {broken.kind for broken in everything.broken}
        assert (85, 0) == (len(everything.events) + len(everything.broken), everything.missing)
        row.done(40)


@pytest.mark.fault("F15", "random bytes for frames and headers, and headers that are nearly some")
def test_no_bytes_make_a_frame_or_a_header_raise_anything_else(row: Row, rng: random.Random) -> None:
    """A frame of random bytes is none; a header is read, or refused by one of the two documented errors."""
    body = msgspec.msgpack.encode(header(host="h", boot_id="b", pid=3))
    extra = [encode(event(rng)) for _ in range(20)]
    refused = 0
    for number in range(row.pick(2_000, 200_000, 10_000_000)):
        data = rng.randbytes(rng.randrange(300))
        offset = rng.randrange(320)
        assert frame.unpack(data, offset, 5) is None
        assert -1 == frame.wanted(data, offset) or offset < frame.wanted(data, offset)
        with pytest.raises(CorruptSegment):
            frame.unpack_header(data)
        near = next(nests(rng, 5000)) if number % 1000 == 0 else spoilt(rng, [body, body, body, *extra])
        block = frame.MAGIC + len(near).to_bytes(4, "little") + zlib.crc32(near).to_bytes(4, "little") + near
        try:
            found, end = frame.unpack_header(block * 2 + data)
        except (CorruptSegment, NewerFormat):
            refused += 1
        else:
            assert (2 * len(block), type(found.seed)) == (end, int)
        row.done()
    assert row.times // 10 < refused < row.times
    row.measure(refused=refused)


def unreadable_calls(rng: random.Random) -> list[bytes]:
    """Return a call of each kind with arguments that no program would log."""
    arguments = [b"[1, 2]", b"null", b'{"tags": 5}', b'{"key": {"$": "RunTag", "v": 1}}', b"\xff\xfe", b"[" * 10_000]
    return [encode(Request(operation, rng.choice(arguments), 1)) for operation in sorted(OPERATIONS)]


@pytest.mark.fault("F15", "payloads that are nearly events, in a run that is delivered to a real store")
def test_payloads_that_are_nearly_events_hold_up_nothing(
    sqlite_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """The run's good events and those of the next program arrive, and nothing is pending or parked for ever."""
    outbox = tmp_path / "outbox"
    acked: set[int] = set()
    for turn in range(row.pick(1, 8, 400)):
        tracker = MLflowTracker("nearly", sqlite_uri, outbox_dir=outbox, worker="none", settings=workload.settings())
        run = tracker.start_run(f"nearly {turn}")
        acked |= {n for n in range(1000 * (turn + 1), 1000 * (turn + 1) + 50) if workload.log_event(run, n)}
        run.end()
        folder = workload.directory_of(outbox, sqlite_uri) / "runs" / run.run_id
        tracker.close(0)
        ours, _ = frame.unpack_header(next(folder.glob("*-000000.log")).read_bytes())
        head = msgspec.structs.replace(ours, writer=f"{rng.getrandbits(64):016x}", ordinal=0, first_seq=0)
        seeds = seeds_of(rng)
        bad = unreadable_calls(rng)
        while len(bad) < 200:  # half of them are events, though none that a program would log
            payload = spoilt(rng, seeds)
            # A call of a kind that is not known, or about what is not there, waits for a person; the run with it.
            if not isinstance(decoded(payload), (SegmentClosed, Request, *((str,) if len(bad) % 2 else ()))):
                bad.append(payload)
        frames = [frame.pack(payload, at, head.seed) for at, payload in enumerate(bad)]
        write_segment(folder, head, [*frames, closing(len(bad), head)]).chmod(0o600)
        report = nest.start(workload.drain, sqlite_uri, str(outbox), "nearly", 1000 * turn + 60, {}).report()
        assert (0, 0) == (report["left"]["pending"], report["left"]["parked"]), report
        acked |= set(report["acked"])
        held(sqlite_uri, "nearly").check(acked)
        row.measure(**{name: report["counters"].get(name, 0) for name in ("quarantined", "dead_letters")})
        row.done(len(bad))
