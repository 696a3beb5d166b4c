"""What a reader makes of damaged segments, in single cases; ``faults/test_bytes.py`` has them by the thousand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Metrics
from mlflow_outbox.spool.recovery import Cut, Damage, frames
from spools import RUN, Everything, closing, header, metric, packed, write_segment

HEAD = header()
COUNT = 64
FRAMES = packed(map(metric, range(COUNT)), HEAD)
BODY = b"".join(FRAMES)
ENDS = [sum(map(len, FRAMES[: at + 1])) for at in range(COUNT)]


def test_a_removed_frame_is_counted_as_missing(tmp_path: Path) -> None:
    """F13: a gap in the numbers is reported, never skipped in silence."""
    write_segment(tmp_path / RUN, HEAD, [*FRAMES[:10], *FRAMES[13:], closing(COUNT, HEAD)])
    found = Everything(tmp_path / RUN)
    assert 3 == found.missing
    assert [*range(10), *range(13, COUNT)] == found.steps


def test_frames_missing_at_the_end_are_known_from_the_closing_frame(tmp_path: Path) -> None:
    """The closing frame carries the number that the next event would have had."""
    write_segment(tmp_path / RUN, HEAD, [*FRAMES[:60], closing(COUNT, HEAD)])
    assert 4 == Everything(tmp_path / RUN).missing


def test_a_frame_that_was_written_twice_is_read_once(tmp_path: Path) -> None:
    """What a failed sync made the writer write again comes under its old number."""
    write_segment(tmp_path / RUN, HEAD, [*FRAMES[:10], *FRAMES[4:12], closing(12, HEAD)])
    found = Everything(tmp_path / RUN)
    assert (list(range(12)), 0, []) == (found.steps, found.missing, found.broken)


def test_a_cut_frame_of_a_living_writer_is_neither_damage_nor_event() -> None:
    """The reader stops, says nothing, and comes back."""
    data = BODY[: ENDS[9] + 5]
    found = list(frames(data, 0, HEAD.seed, next_seq=0, final=False))
    assert 10 == len(found)
    assert all(isinstance(item, frame.Frame) for item in found)


def test_incomplete_data_ends_in_a_cut_and_never_in_damage() -> None:
    """When more bytes are to come, nothing at the end is judged."""
    for size in range(len(BODY)):
        last = list(frames(BODY[:size], 0, HEAD.seed, next_seq=0, final=True, complete=False))[-1:]
        assert size in {0, *ENDS} or isinstance(last[0], Cut)


@pytest.mark.parametrize("length", [0xFFFFFFFF, frame.MAX_PAYLOAD + 1])
def test_an_absurd_length_does_not_make_the_reader_wait_for_more(length: int) -> None:
    """F14: a length that no frame has is damage, and what follows is found."""
    absurd = bytes(8) + b"\xff\xff" + length.to_bytes(4, "little") + b"x" * 50
    found = list(frames(absurd + BODY, 0, HEAD.seed, next_seq=0, final=False, complete=False))
    assert Damage("corrupt", 0, len(absurd)) == found[0]


def test_a_hole_larger_than_any_frame_is_passed_in_bounded_memory(tmp_path: Path) -> None:
    """F14: 40 MiB of zeros in a segment; the reader goes on behind them, and does not hold it all."""
    hole = 40 * 1024 * 1024
    path = write_segment(tmp_path / RUN, HEAD, FRAMES[:10])
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        file.seek(end + hole)
        file.write(b"".join(FRAMES[10:]) + closing(COUNT, HEAD))
    tracemalloc.start()
    try:
        found = Everything(path.parent)
        assert tracemalloc.get_traced_memory()[1] < 3 * 32 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert list(range(COUNT)) == found.steps
    assert hole == sum(broken.end - broken.start for broken in found.broken)


def test_an_event_larger_than_a_read_is_read_whole(tmp_path: Path) -> None:
    """Frames of every size around the reader's chunk, one after the other."""
    events = [Metrics({f"k{at}": 1.0 for at in range(count)}, 1, count) for count in (1, 20_000, 3, 60_000, 2)]
    write_segment(tmp_path / RUN, HEAD, [*packed(events, HEAD), closing(len(events), HEAD)])
    assert events == Everything(tmp_path / RUN, points=10**6).events


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\xdb\xff\xff\xff\xffx",
        b"\x93\x63\x01\x02",
        b"\x92\x02\xa1k",
        b"\x93\x04\x81\xa1k\xa2\xff\xfe\x01",
        b"\x96\x02\xa1k\xcb" + bytes(8) + b"\x01\x01" + b"\x91" * 100_000 + b"\xc0",  # in a field that is not known
    ],
    ids=["nothing", "array of 4 GiB", "arrays", "text of 4 GiB", "kind", "shape", "no UTF-8", "depth"],
)
def test_an_intact_frame_that_holds_no_event_is_set_aside(tmp_path: Path, payload: bytes) -> None:
    """F15, F37: msgpack bombs, unknown kinds and wrong shapes are reported; the others arrive."""
    frames = [FRAMES[0], frame.pack(payload, 1, HEAD.seed), *packed([metric(2)], HEAD, 2), closing(3, HEAD)]
    write_segment(tmp_path / RUN, HEAD, frames)
    found = Everything(tmp_path / RUN)
    assert [0, 2] == found.steps
    assert ["unknown"] == [broken.kind for broken in found.broken]
    assert 0 == found.missing
