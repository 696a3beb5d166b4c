"""What a reader makes of damaged segments: fault rows F10 to F15."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Metrics, encode
from mlflow_outbox.spool.recovery import Cut, Damage, frames
from spools import RUN, Everything, closing, header, metric, packed, write_segment

HEAD = header()
COUNT = 64
FRAMES = packed(map(metric, range(COUNT)), HEAD)
BODY = b"".join(FRAMES)
ENDS = [sum(map(len, FRAMES[: at + 1])) for at in range(COUNT)]


def numbers(data: bytes, *, final: bool = True, complete: bool = True) -> list[int]:
    """Numbers of the frames found in data; each is checked to hold what was written under it."""
    found = frames(data, 0, HEAD.seed, next_seq=0, final=final, complete=complete)
    intact = [item for item in found if isinstance(item, frame.Frame)]
    assert all(item.payload == encode(metric(item.seq)) for item in intact), "a payload that was never written"
    return [item.seq for item in intact]


def covered(data: bytes) -> bool:
    """Whether frames and damage together cover every byte once, in order."""
    at = 0
    for item in frames(data, 0, HEAD.seed, next_seq=0, final=True):
        if isinstance(item, Damage):
            assert item.start == at
        at = item.end if isinstance(item, (Damage, frame.Frame)) else at
    return at == len(data)


def test_a_tail_cut_at_any_byte_leaves_the_exact_prefix() -> None:
    """F10: every offset of a 64-frame segment."""
    for size in range(len(BODY) + 1):
        whole = sum(end <= size for end in ENDS)
        assert list(range(whole)) == numbers(BODY[:size])
        assert list(range(whole)) == numbers(BODY[:size], final=False)
        assert covered(BODY[:size])


@pytest.mark.parametrize("tail", ["zeros", "random", "stale", "sector"])
def test_a_tail_that_the_file_system_left_is_never_an_event(tail: str) -> None:
    """F11: zeros, random bytes, frames of a former file, a sector of zeros in the middle."""
    chance = random.Random(11)
    stale = b"".join(packed(map(metric, range(COUNT)), header(seed=77)))
    for size in range(0, len(BODY) + 1, 7):
        rest = len(BODY) - size
        data = {
            "zeros": BODY[:size] + bytes(rest),
            "random": BODY[:size] + chance.randbytes(rest),
            "stale": BODY[:size] + stale[size:],
            "sector": (BODY[:size] + bytes(512) + BODY[size + 512 :])[: len(BODY)],
        }[tail]
        # What was cut off may by chance have been the zeros that came in its place: compare bytes, not places.
        untouched = [at for at in range(COUNT) if data[ENDS[at] - len(FRAMES[at]) : ENDS[at]] == FRAMES[at]]
        assert untouched == numbers(data)
        assert covered(data)


def test_any_flipped_bit_of_a_segment_costs_at_most_its_frame() -> None:
    """F12: every bit of 4 KiB; no wrong payload, all other frames, and the damage or the gap is reported."""
    count = 115
    events = [metric(number) for number in range(count)]
    data = bytearray(b"".join(packed(events, HEAD)) + closing(count, HEAD))
    ends = _ends(data)
    begins = [0, *ends[:-1]]
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        hit = next(at for at, end in enumerate(ends) if bit // 8 < end)
        # What is further away than three frames is read as if nothing had happened; reading all of it takes long.
        part = bytes(data[begins[max(0, hit - 1)] : ends[min(hit + 3, count)]])
        items = list(frames(part, 0, HEAD.seed, next_seq=max(0, hit - 1), final=True))
        found = [item for item in items if isinstance(item, frame.Frame)]
        around = range(max(0, hit - 1), min(hit + 3, count) + 1)
        assert [n for n in around if n != hit] == [item.seq for item in found], f"bit {bit}"
        assert all(item.payload == encode(events[item.seq]) for item in found if item.seq < count)
        assert 1 == len(items) - len(found)
        data[bit // 8] ^= 1 << bit % 8
    assert len(data) > 4096


def _ends(data: bytearray) -> list[int]:
    at, ends = 0, []
    while at < len(data):
        at = frame.wanted(data, at)
        ends.append(at)
    return ends


def test_flipped_bits_in_a_file_are_reported_by_the_reader(tmp_path: Path) -> None:
    """F12, I7: the event that was hit is counted as missing or broken; the header's bits cost nothing."""
    whole = frame.pack_header(HEAD) + BODY + closing(COUNT, HEAD)
    path = write_segment(tmp_path / RUN, HEAD, [])
    for bit in random.Random(12).sample(range(len(whole) * 8), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = Everything(path.parent, settle=-1.0)
        in_header = bit // 8 < len(frame.pack_header(HEAD))
        assert COUNT - len(found.steps) == found.missing
        assert found.missing <= (0 if in_header else 1)
        assert in_header or found.broken
        assert sorted(found.steps) == found.steps
        assert found.numbers == {HEAD.writer: COUNT} or bit // 8 >= len(whole) - 13


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("burst"), st.integers(0, len(BODY) - 1), st.binary(min_size=2, max_size=64)),
            st.tuples(st.just("swap"), st.integers(0, COUNT - 2), st.integers(0, COUNT - 1)),
            st.tuples(st.just("remove"), st.integers(0, COUNT - 1), st.none()),
            st.tuples(st.just("double"), st.integers(0, COUNT - 1), st.none()),
            st.tuples(st.just("foreign"), st.integers(0, COUNT - 1), st.none()),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_bursts_and_moved_frames_never_make_an_event_that_was_not_written(harm: list[tuple[str, int, object]]) -> None:
    """F13: damaged, swapped, removed, doubled frames and frames of another segment."""
    pieces = list(FRAMES)
    foreign = packed([metric(5)], header(seed=4711))[0]
    touched: set[int] = set()
    bursts: list[tuple[int, bytes]] = []
    for kind, place, what in harm:
        at = min(place, len(pieces) - 1)
        if kind == "burst":
            assert isinstance(what, bytes)
            bursts.append((at, what))
        elif kind == "swap":
            assert isinstance(what, int)
            other = min(what, len(pieces) - 1)
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == "remove":
            del pieces[at]
        elif kind == "double":
            pieces.insert(at, pieces[at])
        else:
            pieces.insert(at, foreign)
    data = bytearray(b"".join(pieces))
    for place, junk in bursts:
        at = min(place, len(data))
        data[at : at + len(junk)] = junk
        touched.update(range(at, at + len(junk)))
    written = bytes(data)
    found = numbers(written)
    assert covered(written)
    begin = 0
    for piece in pieces:
        here = range(begin, begin + len(piece))
        begin += len(piece)
        if piece is not foreign and not touched.intersection(here):
            assert int.from_bytes(piece[4:8], "little") in found


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
    [b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000, b"\xdb\xff\xff\xff\xffx", b"\x93\x63\x01\x02", b"\x92\x02\xa1k"],
)
def test_an_intact_frame_that_holds_no_event_is_set_aside(tmp_path: Path, payload: bytes) -> None:
    """F15, F37: msgpack bombs, unknown kinds and wrong shapes are reported; the others arrive."""
    frames = [FRAMES[0], frame.pack(payload, 1, HEAD.seed), *packed([metric(2)], HEAD, 2), closing(3, HEAD)]
    write_segment(tmp_path / RUN, HEAD, frames)
    found = Everything(tmp_path / RUN)
    assert [0, 2] == found.steps
    assert ["unknown"] == [broken.kind for broken in found.broken]
    assert 0 == found.missing
