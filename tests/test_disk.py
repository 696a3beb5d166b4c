"""BytesDisk: what it stores, and what it refuses (F36)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox_worker.disk import BytesDisk, RowRefused


@pytest.fixture
def disk(tmp_path: Path) -> BytesDisk:
    """A BytesDisk over a directory that must stay empty."""
    return BytesDisk(str(tmp_path))


@pytest.mark.parametrize("key", ["run/1", "", b"\x00", 0, -(2**63), 2**63 - 1])
def test_a_plain_key_is_stored_as_it_is(disk: BytesDisk, key: Any) -> None:
    """Text, bytes and 64-bit integers come back as they went in."""
    stored, raw = disk.put(key)
    assert key == disk.get(stored, int(raw))
    assert type(stored) is type(key)


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1, 1.5, True, None, ("run", 1), bytearray(b"x")])
def test_a_key_that_diskcache_would_pickle_is_refused(disk: BytesDisk, key: Any) -> None:
    """No key is ever pickled."""
    with pytest.raises(TypeError):
        disk.put(key)


@pytest.mark.parametrize("raw", [0, None, 2, "1", 1.0])
def test_a_key_that_is_not_marked_raw_is_refused_unread(disk: BytesDisk, raw: Any) -> None:
    """A row cannot ask for its key to be unpickled."""
    with pytest.raises(RowRefused):
        disk.get(pickle.dumps("run/1"), raw)


@pytest.mark.parametrize("key", [1.5, None])
def test_a_key_of_a_type_that_is_never_stored_is_refused(disk: BytesDisk, key: Any) -> None:
    """A key is text, an integer or bytes, whatever SQLite could hold."""
    with pytest.raises(RowRefused):
        disk.get(key, 1)


@pytest.mark.parametrize("size", [0, 1, 2**15, 2**20])
def test_a_value_of_any_size_stays_in_its_row(disk: BytesDisk, tmp_path: Path, size: int) -> None:
    """The limit of 32 KiB, above which diskcache would make a file that it never syncs, does not apply."""
    value = b"x" * size
    _, mode, filename, stored = disk.store(value, read=False)
    assert value == disk.fetch(mode, filename, stored, read=False)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "read"), [("text", False), (1, False), (None, False), ([], False), (b"x", True)])
def test_a_value_that_is_not_bytes_is_refused(disk: BytesDisk, value: Any, *, read: bool) -> None:
    """Nothing but bytes is ever stored."""
    with pytest.raises(TypeError):
        disk.store(value, read=read)


@pytest.mark.parametrize(
    ("mode", "filename", "value", "read"),
    [
        (4, None, pickle.dumps("x"), False),
        (4, "../x", None, False),
        (2, "../x", None, False),
        (3, "../x", None, False),
        (0, None, b"x", False),
        ("1", None, b"x", False),
        (1, "../x", b"x", False),
        (1, "", b"x", False),
        (1, None, "text", False),
        (1, None, None, False),
        (1, None, b"x", True),
    ],
)
def test_a_row_that_is_not_plain_bytes_is_refused(
    disk: BytesDisk, mode: Any, filename: Any, value: Any, *, read: bool
) -> None:
    """A row cannot ask to be unpickled, nor for a file to be opened."""
    with pytest.raises(RowRefused):
        disk.fetch(mode, filename, value, read=read)


def test_there_are_no_files_to_name_or_remove(disk: BytesDisk, tmp_path: Path) -> None:
    """A row cannot have a file removed."""
    victim = tmp_path / "victim"
    victim.touch()
    with pytest.raises(RowRefused):
        disk.filename()
    with pytest.raises(RowRefused):
        disk.remove("victim")
    assert victim.exists()
