"""The size of an outbox as one process tells it to the others: believed only when it is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_outbox.spool import measurement
from mlflow_outbox.spool.measurement import Measurement

_MEASURED = Measurement(123_456, 10**12, 0.25, 1_764_500_000.5)


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The largest numbers too; the file always has the same length, and is the user's alone."""
    for told in (_MEASURED, Measurement(0, 0, 0.0, 0.0), Measurement(10**18 - 1, 10**18 - 1, 9_999.0, 9_999_999_999.0)):
        assert measurement.write(tmp_path, told)
        assert told == measurement.read(tmp_path)
        assert (72, 0o600) == ((tmp_path / "size").stat().st_size, (tmp_path / "size").stat().st_mode & 0o777)


def test_what_no_line_can_hold_is_cut_to_what_it_can(tmp_path: Path) -> None:
    """A clock before the epoch, a disk without end."""
    assert measurement.write(tmp_path, Measurement(10**30, 10**30, 1e9, -5.0))
    assert Measurement(10**18 - 1, 10**18 - 1, 9_999.999999, 0.0) == measurement.read(tmp_path)


def test_no_flipped_bit_and_no_cut_is_taken_for_a_measurement(tmp_path: Path) -> None:
    """A wrong size would refuse events for nothing."""
    assert measurement.write(tmp_path, _MEASURED)
    path = tmp_path / "size"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert measurement.read(tmp_path) is None, bit
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert measurement.read(tmp_path) is None, length
    path.write_bytes(whole + b"0")
    assert measurement.read(tmp_path) is None


@pytest.mark.parametrize("kind", ["nothing", "a directory", "a pipe", "a link"])
def test_what_is_no_file_is_neither_read_nor_written(kind: str, tmp_path: Path) -> None:
    """And nobody waits for it."""
    path, other = tmp_path / "outbox" / "size", tmp_path / "other"
    path.parent.mkdir()
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        measurement.write(tmp_path, _MEASURED)
        (tmp_path / "size").rename(other)
        path.symlink_to(other)
    assert measurement.read(path.parent) is None
    assert (kind == "nothing") == measurement.write(path.parent, Measurement(1, 2, 3.0, 4.0))
    assert not other.exists() or _MEASURED.used == int(other.read_bytes()[:18])
