"""The reader against a plain list: what is written is read once, in order, from any point on."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import stopwatch
from mlflow_outbox.spool import frame, listing
from mlflow_outbox.spool import writer as writers
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox.spool.events import Metric, Metrics, RunStarted
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from spools import RUN, Everything, closing, header, make_journal, make_outbox, metric, packed, write_segment


def test_reading_resumes_at_every_window_boundary(tmp_path: Path) -> None:
    """Windows of any size, with a fresh reader each: together they are the whole, nothing twice."""
    writer = make_journal(make_outbox(tmp_path / "outbox"), segment_bytes=1024)
    for number in range(120):
        writer.append(metric(number) if number % 3 else Metrics({"loss": 1.0, "b": 2.0}, 1, number))
    folder = writer.directory.run(RUN)
    writer.close()
    whole = Everything(folder).events
    for items in (1, 2, 7, 50):
        cursors: dict[str, Cursor] = {}
        found = []
        while True:
            window = RunReader(folder).window(cursors, items=items)
            assert len(window.events) <= items
            assert window.events == RunReader(folder).window(cursors, items=items).events, "reading changes nothing"
            found += [event for _, event in window.events]
            cursors = window.cursors
            if not window.more:
                break
        assert whole == found


@pytest.mark.parametrize("limits", [{"points": 5}, {"size": 100}, {"items": 1}])
def test_a_window_stops_at_each_limit(tmp_path: Path, limits: dict[str, int]) -> None:
    """Points, bytes and events: a window is some requests large, not the whole run; but never empty."""
    frames = packed(map(metric, range(20)), header())
    write_segment(tmp_path, header(), [*frames, closing(20, header())])
    window = RunReader(tmp_path).window({}, **limits)
    assert 1 <= len(window.events) <= 5
    assert window.more
    assert list(range(20)) == Everything(tmp_path, **limits).steps


def test_a_writer_that_writes_faster_than_is_read_does_not_keep_back_the_others(tmp_path: Path) -> None:
    """They have their turns behind the one that used up a window, each in its own order, and nothing is read twice."""
    outbox = make_outbox(tmp_path / "outbox")
    fast, other, slow = make_journal(outbox), make_journal(outbox), make_journal(outbox)
    for writer in (fast, other, slow):
        assert writer.append(metric(0))
    assert slow.append(metric(1))
    cursors, after, number = {}, "", 0
    read: dict[str, list[float]] = {}
    for _ in range(6):
        for writer in (fast, other):  # each alone fills more than a window
            for step in range(number + 1, number + 8):
                assert writer.append(metric(step))
        number += 7
        window = RunReader(outbox.run(RUN)).window(cursors, points=5, after=after)
        cursors, after = window.cursors, window.used_up_by
        for name, event in window.events:
            assert isinstance(event, Metric)
            read.setdefault(name, []).append(event.value)
    assert 3 == len(read)
    assert [0.0, 1.0] in read.values()
    for values in read.values():
        assert [float(at) for at in range(len(values))] == values


def test_a_writer_that_has_ended_is_read_to_its_end_before_those_that_went_on_from_there(tmp_path: Path) -> None:
    """By turns, a file of the first job would replace the one that the second has written in its place."""
    outbox = make_outbox(tmp_path / "outbox")
    first = make_journal(outbox, clock_ms=lambda: 1)
    for step in range(20):
        assert first.append(metric(step))
    first.close()
    second = make_journal(outbox, clock_ms=lambda: 2)
    for step in range(20, 40):
        assert second.append(metric(step))
    cursors, after, steps = {}, "", []
    for _ in range(8):
        window = RunReader(outbox.run(RUN)).window(cursors, points=5, after=after)
        cursors, after = window.cursors, window.used_up_by
        steps += [event.step for _, event in window.events if isinstance(event, Metric)]
    assert list(range(40)) == steps


def test_a_reclaimed_segment_is_no_gap(tmp_path: Path) -> None:
    """What was delivered and removed is not read again and not missed."""
    writer = make_journal(make_outbox(tmp_path / "outbox"), segment_bytes=1024)
    for number in range(60):
        writer.append(metric(number))
    folder = writer.directory.run(RUN)
    first = Everything(folder)
    for path in sorted(folder.glob("*.log"))[:-1]:
        path.unlink()
    for number in range(60, 100):
        writer.append(metric(number))
    found = Everything(folder, first.cursors)
    assert (list(range(60, 100)), 0, []) == (found.steps, found.missing, found.broken)


def test_next_numbers_do_not_depend_on_what_the_last_event_holds(tmp_path: Path) -> None:
    """The last event's bytes may look like those of a closing frame; flush would end one event early."""
    head = header()
    for number in range(300):
        events = [Metric("loss", 0.5, 1_700_000_000_000 + number, 1)]
        write_segment(tmp_path, head, packed(events, head))
        assert {head.writer: 1} == RunReader(tmp_path).next_numbers()


def test_next_numbers_are_the_same_from_any_cursor(tmp_path: Path) -> None:
    """A cursor makes counting faster, not different."""
    writer = make_journal(make_outbox(tmp_path / "outbox"), segment_bytes=1024)
    for number in range(100):
        writer.append(metric(number))
    reader = RunReader(writer.directory.run(RUN))
    cursors: dict[str, Cursor] = {}
    while (window := reader.window(cursors, items=7)).more:
        cursors = window.cursors
        assert {writer.writer: 100} == reader.next_numbers(cursors)


def test_a_damaged_last_frame_does_not_make_a_flush_wait_for_ever(tmp_path: Path) -> None:
    """The number in a damaged frame is not believed."""
    head = header()
    frames = packed(map(metric, range(5)), head)
    for bit in range(8 * 4, 8 * 10):
        bad = bytearray(frames[4])
        bad[bit // 8] ^= 1 << bit % 8
        write_segment(tmp_path, head, [*frames[:4], bytes(bad)])
        assert {head.writer: 4} == RunReader(tmp_path).next_numbers(), f"bit {bit}"


@pytest.mark.parametrize("cut", [0, 10])
def test_a_gap_that_only_a_header_tells_is_counted_once_and_not_waited_for(tmp_path: Path, cut: int) -> None:
    """F18: a power cut took segment 1 and all of segment 2 but its header, or one of its two copies."""
    first, last = header(), header(ordinal=2, first_seq=32)
    write_segment(tmp_path, first, packed(map(metric, range(10)), first))
    path = write_segment(tmp_path, last, [])
    os.truncate(path, path.stat().st_size - cut)
    os.utime(path, (1, 1))
    window = RunReader(tmp_path).window({})
    assert (22, 10) == (window.missing, len(window.events))
    assert RunReader(tmp_path).next_numbers() == {first.writer: window.cursors[first.writer].seq}
    again = RunReader(tmp_path).window(window.cursors)
    assert (0, [], window.cursors) == (again.missing, again.events, again.cursors)


@pytest.mark.parametrize("zeros", [False, True])
def test_wherever_a_cut_comes_nothing_is_waited_for_that_will_not_come(
    zeros: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F18: any of four segments absent, and another one cut, or full of zeros, from any byte of its events on."""
    monkeypatch.setattr(writers, "_MOMENT", 0.0)  # it is over: see the next test
    heads = [header(ordinal=number, first_seq=number * 3) for number in range(3)]
    absences = [set(absent) for count in range(3) for absent in itertools.combinations(range(3), count)]
    for absent, damaged in itertools.product(absences, range(3)):
        if damaged in absent:
            continue
        folder = tmp_path / f"{absent}-{damaged}"
        for head in heads:
            if head.ordinal not in absent:
                events = map(metric, range(head.first_seq, head.first_seq + 3))
                frames = [*packed(events, head), closing(head.first_seq + 3, head, rotated=True)]
                os.utime(write_segment(folder, head, frames), (1, 1))
        path = folder / f"{heads[damaged].writer}-{damaged:06d}.log"
        whole = path.read_bytes()
        body = len(frame.pack_header(heads[damaged]))
        for size in (*range(0, body, 25), *range(body, len(whole))):
            path.write_bytes(whole[:size] + bytes(len(whole) - size if zeros else 0))
            os.utime(path, (1, 1))
            cursors = Everything(folder).cursors
            for name, end in RunReader(folder).next_numbers().items():
                assert end == cursors.get(name, Cursor()).seq, (absent, damaged, size)


def test_the_beginning_of_a_frame_is_torn_only_once_its_rest_has_not_come_for_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F40: by the clock, which jumped or is another machine's, the writer is gone; it is in the middle of a write."""
    now = [100.0]
    monkeypatch.setattr(stopwatch, "seconds", lambda: now[0])
    head = header()
    first, second, third = packed(map(metric, range(3)), head)
    path = write_segment(tmp_path, head, [first, second[:9]])
    reader, cursors = RunReader(tmp_path), dict[str, Cursor]()
    for expected, rest in ((1, second[9:] + third[:9]), (1, b""), (0, b"")):
        os.utime(path, (1, 1))
        for _ in range(2):
            window = reader.window(cursors)
            assert (expected, [], True) == (len(window.events), window.broken, window.live)
        cursors = window.cursors
        now[0] += 0.5
        with path.open("ab") as file:
            file.write(rest)
    os.utime(path, (1, 1))
    now[0] += 0.5
    window = reader.window(cursors)
    assert ([], ["torn"], False) == (window.events, [broken.kind for broken in window.broken], window.live)


def test_a_run_begins_with_its_start_however_many_tags_it_has(tmp_path: Path) -> None:
    """The first event may be larger than one read."""
    head = header()
    start = RunStarted(1, "name", "user", {f"tag{number}": "x" * 8000 for number in range(100)})
    write_segment(tmp_path, head, packed([start], head))
    assert (start, head) == RunReader(tmp_path).started()
    assert start == RunReader(tmp_path).first(RunStarted)


def test_a_run_without_files_has_not_begun(tmp_path: Path) -> None:
    """A missing directory is an empty one."""
    assert (None, None) == RunReader(tmp_path / "none").started()
    assert [] == Everything(tmp_path / "none").events


def test_files_that_are_no_segments_are_named_and_harmless(tmp_path: Path) -> None:
    """F90, F37: a FIFO, a link, a directory, junk, a newer version: none blocks, each is reported, the rest is read."""
    head = header()
    write_segment(tmp_path, head, [*packed(map(metric, range(3)), head), closing(3, head)])
    os.mkfifo(tmp_path / "fifo.log")
    (tmp_path / "link.log").symlink_to(tmp_path / f"{head.writer}-000000.log")
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "junk.log").write_bytes(b"junk")
    (tmp_path / "newer.log").write_bytes(frame.pack_header(header(version=99, writer="n" * 16)))
    (tmp_path / "empty.log").write_bytes(b"")
    found = Everything(tmp_path)
    assert [0, 1, 2] == found.steps
    assert {"fifo.log", "link.log", "folder.log", "junk.log", "newer.log"} == {item.path.name for item in found.broken}
    assert ["newer"] == [item.kind for item in found.broken if item.path.name == "newer.log"]


def test_a_bad_file_that_is_gone_is_not_reported_any_more(tmp_path: Path) -> None:
    """Somebody moved it away."""
    (tmp_path / "junk.log").write_bytes(b"junk")
    reader = RunReader(tmp_path)
    reader.segments()
    assert 1 == len(reader.bad_headers())
    (tmp_path / "junk.log").unlink()
    reader.segments()
    assert [] == reader.bad_headers()


def test_a_copy_of_a_segment_brings_nothing_twice(tmp_path: Path) -> None:
    """A backup restored beside the original."""
    head = header()
    path = write_segment(tmp_path, head, [*packed(map(metric, range(3)), head), closing(3, head)])
    (tmp_path / "copy.log").write_bytes(path.read_bytes())
    found = Everything(tmp_path)
    assert ([0, 1, 2], 0) == (found.steps, found.missing)


def test_a_living_writer_is_told_from_a_dead_one(tmp_path: Path) -> None:
    """Its lock says so, whatever the clock says."""
    writer = make_journal(make_outbox(tmp_path / "outbox"))
    writer.append(metric(0))
    folder = writer.directory.run(RUN)
    assert Everything(folder, settle=0.0).live
    os.close(writer._sequence.live.fd)
    assert not Everything(folder).live
    writer._sequence.live.fd = -1


def test_a_writer_is_locked_even_while_readers_look(tmp_path: Path) -> None:
    """A look at the moment of a segment's creation must not make its writer seem dead."""
    from mlflow_outbox.spool.disk import SystemDisk, is_being_written

    stop = threading.Event()
    path = [tmp_path / "0.log"]

    def look() -> None:
        while not stop.is_set():
            is_being_written(path[0])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(300):
            path[0] = tmp_path / f"{number}.log"
            fd = SystemDisk().create(path[0])
            assert is_being_written(path[0])
            os.close(fd)
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By the names of files, the error numbers with which they cannot be opened or looked at."""
    failing: dict[str, int] = {}

    def fails_for(call: Callable[..., Any]) -> Callable[..., Any]:
        def failing_call(path: Any, *arguments: Any, **named: Any) -> Any:
            number = failing.get(os.path.basename(os.fspath(path))) if not isinstance(path, int) else None
            if number is not None:
                raise OSError(number, os.strerror(number), os.fspath(path))
            return call(path, *arguments, **named)

        return failing_call

    monkeypatch.setattr(os, "open", fails_for(os.open))
    monkeypatch.setattr(os, "lstat", fails_for(os.lstat))
    return failing


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_segment_that_cannot_be_opened_now_is_not_passed_by(
    number: int, refused: dict[str, int], tmp_path: Path
) -> None:
    """Nothing is read of the run meanwhile: what comes later would move the cursor past it, for good."""
    outbox = make_outbox(tmp_path / "outbox")
    writer = make_journal(outbox, segment_bytes=1024)
    for step in range(120):
        assert writer.append(metric(step))
    writer.close()
    folder = outbox.run(RUN)
    names = sorted(os.listdir(folder))
    assert len(names) > 2
    for name in names:
        refused[name] = number
        reader = RunReader(folder)
        for look in (lambda reader=reader: reader.window({}), reader.next_numbers, reader.complete_segments):
            with pytest.raises(OSError, match=name):
                look()
        assert [name] == [broken.path.name for broken in reader.bad_headers()], "doctor names it"
        refused.clear()
        assert [float(step) for step in range(120)] == [
            event.value for _, event in reader.window({}).events if isinstance(event, Metric)
        ]
        assert [] == reader.bad_headers()


def test_a_segment_that_is_moved_while_its_run_is_listed_is_read_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker files what was delivered, and a replay may be reading just then."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path = write_segment(here, header(), [*packed(map(metric, range(3)), header()), closing(3, header())])
    whole = listing.read_bytes

    def move_first(wanted: Path, offset: int, size: int) -> bytes:
        if path.exists():
            path.rename(there / path.name)
        return whole(wanted, offset, size)

    monkeypatch.setattr(listing, "read_bytes", move_first)
    reader = RunReader(here, there)
    assert 3 == len(reader.window({}).events)
    assert [] == reader.bad_headers()


def test_a_copied_file_that_the_disk_does_not_tell_of_is_not_taken_for_gone(
    refused: dict[str, int], tmp_path: Path
) -> None:
    """One that is gone is a dead letter; one that cannot be looked at is looked at again."""
    digest = "d" * 64
    filed = tmp_path / "filed" / "files" / digest
    filed.parent.mkdir(parents=True)
    filed.write_text("content")
    reader = RunReader(tmp_path / "run", tmp_path / "filed")
    refused[digest] = errno.EIO
    with pytest.raises(OSError, match=digest):
        reader.file(digest)
    refused.clear()
    assert filed == reader.file(digest)
    assert "no\0digest" == reader.file("no\0digest").name, "a name that no file can have is nowhere"


def test_a_writer_is_not_taken_for_dead_for_want_of_descriptors(refused: dict[str, int], tmp_path: Path) -> None:
    """What it is in the middle of writing would be called damaged."""
    path = write_segment(tmp_path, header(), [])
    assert not is_being_written(path)
    refused[path.name] = errno.EMFILE
    assert is_being_written(path)
