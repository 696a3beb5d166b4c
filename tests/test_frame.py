"""Frames and headers: what goes in comes out, and nothing else ever does (F10, F12, F14)."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_outbox.errors import CorruptSegment, NewerFormat
from mlflow_outbox.spool import frame
from spools import header, metric


@pytest.mark.parametrize("size", [1, 2, 37, 65_534, 65_535, 65_536, 1_000_000, frame.MAX_PAYLOAD])
def test_a_payload_of_any_size_comes_back(size: int) -> None:
    """Short and long frames, and the sizes at their border."""
    payload = random.Random(size).randbytes(size)
    data = frame.pack(payload, 7, 99)
    assert frame.Frame(7, payload, len(data)) == frame.unpack(data, 0, 99)
    assert len(data) == frame.wanted(data, 0)


@pytest.mark.parametrize("size", [1, 65_535])
def test_a_frame_lacking_any_byte_of_its_end_is_none(size: int) -> None:
    """A frame is whole or it is not there."""
    data = frame.pack(b"x" * size, 0, 1)
    for end in {*range(min(40, len(data))), *range(max(0, len(data) - 40), len(data))}:
        assert frame.unpack(data[:end], 0, 1) is None
        assert frame.unpack(data, 0, 1, end=end) is None


@given(st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=100, deadline=None)
def test_a_frame_read_with_another_seed_is_none(payload: bytes, seq: int, seed: int, data: st.DataObject) -> None:
    """A frame of another segment never passes, however intact it is."""
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda number: number != seed))
    assert frame.unpack(frame.pack(payload, seq, seed), 0, other) is None


@pytest.mark.parametrize("length", [0, 2**16 - 2, 2**16 - 1])
@pytest.mark.parametrize("long_length", [0, 1, 65_534, frame.MAX_PAYLOAD, frame.MAX_PAYLOAD + 1, 2**31, 2**32 - 1])
def test_an_absurd_length_costs_no_memory_and_raises_nothing(length: int, long_length: int) -> None:
    """F14: the length is checked before anything is allocated."""
    data = b"\0" * 8 + length.to_bytes(2, "little") + long_length.to_bytes(4, "little") + b"x" * 100
    tracemalloc.start()
    try:
        assert frame.unpack(data, 0, 0) is None
        assert frame.wanted(data, 0) in {-1, 10 + length, 14 + long_length}
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_header_survives_any_flipped_bit() -> None:
    """F12: the header lies there twice, so one damaged bit costs nothing."""
    head = header(remote=True, host="h", boot_id="b", pid=3)
    data = bytearray(frame.pack_header(head) + frame.pack(b"x", 0, head.seed))
    body = len(frame.pack_header(head))
    for bit in range(body * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert (head, body) == frame.unpack_header(data), f"bit {bit}"
        data[bit // 8] ^= 1 << bit % 8


def test_a_header_cut_off_anywhere_is_an_error_or_the_header() -> None:
    """A prefix that holds one whole copy is enough; a shorter one is refused."""
    head = header()
    data = frame.pack_header(head)
    for size in range(len(data) // 2):
        with pytest.raises(CorruptSegment):
            frame.unpack_header(data[:size])
    for size in range(len(data) // 2, len(data) + 1):
        assert head == frame.unpack_header(data[:size])[0]


def test_an_experiment_named_like_the_magic_does_not_confuse_the_search() -> None:
    """The second copy is found behind a false beginning."""
    head = header(experiment="MLFLOBX1" * 3)
    data = bytearray(frame.pack_header(head))
    data[9] ^= 1
    assert (head, len(data)) == frame.unpack_header(data)


def test_a_newer_version_is_refused_by_name() -> None:
    """F37: a file of a newer version is left alone, and the message says what to do."""
    with pytest.raises(NewerFormat, match="upgrade"):
        frame.unpack_header(frame.pack_header(header(version=frame.FORMAT_VERSION + 1)))


def test_a_plain_metric_takes_thirty_eight_bytes() -> None:
    """The figure in the module's docstring."""
    from mlflow_outbox.spool.events import encode

    assert 38 == len(frame.pack(encode(metric(1000)), 0, 0))


def test_seeds_differ() -> None:
    """Two segments do not share a seed."""
    assert 1 < len({frame.new_seed() for _ in range(8)})
