"""Segments cut, overwritten, with bits flipped and frames moved: what a reader makes of them (F10 to F13).

Each damage is followed by more frames of the same writer, or by its next segment, and all is read back.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from faults.mixtures import closing, payloads
from faults.table import Row
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Tags
from spools import RUN, Everything, Written, header, metric, numbers, packed, write_segment, written
from spools import closing as closing_frame

COUNT = 64
SEED = 0x12345678
#: Frames that are appended behind a damage.
MORE = 3
#: Bytes of a spoilt tail that are read; each is looked at for the beginning of a frame, which takes long.
REST = 700


def in_full(rng: random.Random, mix: int) -> Written:
    """Return the frames of a mixture, and behind them those that are appended to the damage."""
    return written(payloads(rng, mix, COUNT + MORE), SEED)


def before(whole: Written, number: int = COUNT) -> tuple[bytes, bytes]:
    """Return the bytes before the frame of a number, and those from it on."""
    return whole.body[: whole.ends[number - 1]], whole.body[whole.ends[number - 1] :]


@pytest.mark.fault("F10", "64 frames cut at every byte, five mixtures of events; then more is appended")
def test_a_tail_cut_at_any_byte_leaves_the_exact_prefix(row: Row, rng: random.Random) -> None:
    """What is whole is read, the rest is torn, and what the writer appends behind it is found."""
    for mix in range(row.pick(1, 5, 20)):
        whole = in_full(rng, mix)
        body, more = before(whole)
        for size in range(len(body) + 1):
            prefix = [at for at in range(COUNT) if whole.ends[at] <= size]
            data = body[:size]
            assert prefix == numbers(data, whole)
            assert prefix == numbers(data, whole, final=False)
            # By chance the bytes that were cut off are those that come in their place, and are missing there.
            at = len(prefix)
            healed = at < COUNT and (data + more).startswith(whole.frames[at], begin_of(whole, at))
            rest = [at, *range(COUNT + 1, COUNT + MORE)] if healed else range(COUNT, COUNT + MORE)
            assert [*prefix, *rest] == numbers(data + more, whole)
            row.done()


@pytest.mark.fault("F10", "a segment's file cut at many bytes, a frame of 64 KiB among them; its writer goes on")
def test_a_writer_goes_on_in_a_new_segment_behind_a_cut_one(row: Row, rng: random.Random, tmp_path: Path) -> None:
    """The reader of files finds the prefix, counts what is missing, and reads the next segment whole."""
    head, after = header(), header(ordinal=1, first_seq=COUNT)
    events = [metric(number) for number in range(COUNT)]
    long = Tags({"long": "x" * 70_000}, 1)
    frames = packed([*events[:20], long, *events[21:]], head)
    ends = list(itertools.accumulate(map(len, frames)))
    body, folder = b"".join(frames), tmp_path / RUN
    path = write_segment(folder, head, [])
    start = path.read_bytes()
    more = packed(map(metric, range(COUNT, COUNT + 10)), after)
    write_segment(folder, after, [*more, closing_frame(COUNT + 10, after)])
    edges = {end + near for end in (0, *ends) for near in range(-16, 17)}
    for size in rng.sample(sorted(edges & set(range(len(body) + 1))), row.pick(80, 800, 1500)):
        path.write_bytes(start + body[:size])
        found = Everything(folder)
        whole = sum(end <= size for end in ends)
        assert [*events[:20], long, *events[21:]][:whole] == found.events[:-10]
        assert list(range(COUNT, COUNT + 10)) == found.steps[-10:]
        assert COUNT - whole == found.missing
        torn = size - (ends[whole - 1] if whole else 0)
        assert ([torn] if torn else []) == [broken.end - broken.start for broken in found.broken]
        row.done()


@pytest.mark.fault("F11", "the tail behind any byte: zeros, random, frames of another file, a sector of zeros")
@pytest.mark.parametrize("tail", ["zeros", "random", "stale", "sector"])
def test_a_tail_that_the_file_system_left_is_never_an_event(tail: str, row: Row, rng: random.Random) -> None:
    """Frames that are as they were written are read, nothing else is, and what is appended is found."""
    for mix in range(row.pick(1, 4, 20)):
        count = 24 if mix else COUNT  # of those that are longer than metrics, fewer
        whole = written(payloads(rng, mix, count + MORE), SEED)
        body, more = before(whole, count)
        stale = written(payloads(rng, mix, count), 77).body.ljust(len(body), b"\0")
        for size in range(0, len(body) + 1, 7 if row.tier == "commit" else 1):
            data = left_behind(tail, body, size, stale, rng)[: size + REST]
            cut = next((at for at, end in enumerate(whole.ends) if end > size), count)
            first = max(0, cut - 2)  # what is before is read as if nothing had happened; reading it takes long
            expected = as_written(data + more, whole, range(first, count), len(data) - len(body))
            assert expected == numbers(data[begin_of(whole, first) :] + more, whole, first=first), f"{mix}, {size}"
            row.done()


def as_written(data: bytes, whole: Written, places: range, shift: int) -> list[int]:
    """Return which frames stand in their place in a segment, and of those appended, which a reader comes to.

    What was cut off may by chance have been what came in its place, also where that is the beginning of what was
    appended: bytes are compared, not places. A reader takes the first frame of two that share bytes.

    Args:
        data: the segment, with the frames that were appended.
        whole: what was written.
        places: numbers of those that may stand in their place.
        shift: how far the frames behind them have moved, in bytes.
    """
    same = [at for at in places if data.startswith(whole.frames[at], begin_of(whole, at))]
    taken = whole.ends[same[-1]] if same else 0
    return [*same, *(at for at in range(places.stop, len(whole.ends)) if begin_of(whole, at) + shift >= taken)]


def left_behind(tail: str, body: bytes, size: int, stale: bytes, rng: random.Random) -> bytes:
    """Return a segment of which only the bytes up to a size are what was written."""
    if tail == "sector":
        return (body[:size] + bytes(512) + body[size + 512 :])[: len(body)]
    rest = {"zeros": bytes(len(body)), "random": rng.randbytes(len(body)), "stale": stale}[tail]
    return body[:size] + rest[size : len(body)]


def begin_of(whole: Written, number: int) -> int:
    """Return the offset of a frame."""
    return whole.ends[number - 1] if number else 0


@pytest.mark.fault("F12", "every single bit of a segment of 4 KiB flipped")
def test_any_flipped_bit_of_a_segment_costs_at_most_its_frame(row: Row, rng: random.Random) -> None:
    """No wrong payload, all other frames, and the damage or the gap is reported."""
    for mix in range(row.pick(1, 8, 64)):
        events = payloads(rng, mix, 1)
        while len(written(events, SEED).body) < 4096:
            events += payloads(rng, mix, 10) if mix else payloads(rng, 0, len(events) + 10)[len(events) :]
        whole = written([*events, closing()], SEED)
        data = bytearray(whole.body)
        assert len(data) > 4096
        for hit, end in enumerate(whole.ends):
            # What is further away than three frames is read as if nothing had happened; reading all of it takes long.
            first, last = max(0, hit - 1), min(hit + 3, len(events))
            others = [n for n in range(first, last + 1) if n != hit]
            for bit in range(8 * begin_of(whole, hit), 8 * end):
                data[bit // 8] ^= 1 << bit % 8
                part = bytes(data[begin_of(whole, first) : whole.ends[last]])
                assert others == numbers(part, whole, first=first), f"mix {mix}, bit {bit}"
                data[bit // 8] ^= 1 << bit % 8
        row.done(8 * len(data))


@pytest.mark.fault("F12", "a bit of a segment's file flipped, its header included; its writer goes on")
def test_flipped_bits_in_a_file_are_reported_by_the_reader(row: Row, rng: random.Random, tmp_path: Path) -> None:
    """I7: the event that was hit is counted as missing or broken; the header's bits cost nothing."""
    head, after = header(), header(ordinal=1, first_seq=COUNT)
    start = len(frame.pack_header(head))
    path = write_segment(tmp_path / RUN, head, [*packed(map(metric, range(COUNT)), head), closing_frame(COUNT, head)])
    whole = path.read_bytes()
    more = packed(map(metric, range(COUNT, COUNT + MORE)), after)
    write_segment(tmp_path / RUN, after, [*more, closing_frame(COUNT + MORE, after)])
    for _ in range(row.pick(250, 2000, 100_000)):
        bit = rng.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = Everything(path.parent, settle=-1.0)
        assert COUNT + MORE - len(found.steps) == found.missing
        assert found.missing <= (0 if bit // 8 < start else 1), f"bit {bit}"
        assert bit // 8 < start or found.broken, f"bit {bit}"
        assert sorted(set(found.steps)) == found.steps
        assert {head.writer: COUNT + MORE} == found.numbers
        row.done()


@pytest.mark.fault("F13", "bursts of 2 to 64 bytes; frames swapped, removed, doubled, and those of another segment")
def test_bursts_and_moved_frames_never_make_an_event_that_was_not_written(
    row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Untouched frames are found, no other event is, and each number is read once or counted as missing."""
    plain = written(payloads(rng, 0, COUNT + MORE), SEED)
    folder = tmp_path / RUN
    for example in range(row.pick(200, 20_000, 1_000_000)):
        pieces = plain.frames[:COUNT]
        foreign = written([rng.choice(plain.payloads)], rng.getrandbits(32) | 1).frames[0]
        for _ in range(rng.randint(0, 3)):
            at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
            match rng.randrange(4):
                case 0:
                    pieces[at], pieces[other] = pieces[other], pieces[at]
                case 1:
                    del pieces[at]
                case 2:
                    pieces.insert(other, pieces[at])
                case _:
                    pieces.insert(at, foreign)
        clean = b"".join(pieces)
        data = bytearray(clean)
        for _ in range(rng.randint(0 if pieces != plain.frames[:COUNT] else 1, 3)):
            at = rng.randrange(len(data))
            junk = rng.randbytes(min(rng.randint(2, 64), len(data) - at))
            data[at : at + len(junk)] = junk
        found = numbers(bytes(data) + before(plain)[1], plain)
        assert list(range(COUNT, COUNT + MORE)) == found[-MORE:]
        begin = 0
        for piece in pieces:
            end = begin + len(piece)
            if piece is not foreign and clean[begin:end] == data[begin:end]:
                assert int.from_bytes(piece[4:8], "little") in found
            begin = end
        if example % 4 == 0:
            rest = [*plain.frames[COUNT:], closing_frame(COUNT + MORE, header())]
            write_segment(folder, header(), [bytes(data), *rest])
            everything = Everything(folder)
            assert sorted(set(everything.steps)) == everything.steps
            assert COUNT + MORE == len(everything.steps) + everything.missing
        row.done()
