"""The rows of the ledger's table: how a value is sealed, judged, stored, and moved out of the way unread.

Before each value stands a CRC-32 (4 bytes, little-endian) of its key and the value. A row that the ledger would not
write is quarantined: its value is kept under the key ``bad/<random>``, and what its columns were in the column "tag".
"""

from __future__ import annotations

import contextlib
import os
import zlib
from typing import Final

from mlflow_outbox_worker.dbconnection import Cache, Row
from mlflow_outbox_worker.disk import BytesDisk, RowRefused

#: Selects what ``sound`` judges.
COLUMNS: Final = "SELECT rowid, key, raw, mode, filename, expire_time, value, store_time FROM Cache "
_IS_BAD: Final = (
    "(raw IS NOT 1 OR mode IS NOT 1 OR filename IS NOT NULL OR expire_time IS NOT NULL"
    " OR typeof(key) <> 'text' OR typeof(value) <> 'blob') "
)
_QUARANTINE: Final = (
    "UPDATE Cache SET tag = 'key=' || substr(quote(key), 1, 300) || ' raw=' || quote(raw) || ' mode=' || quote(mode)"
    " || ' filename=' || substr(quote(filename), 1, 300) || ' expire_time=' || quote(expire_time)"
    " || ' type=' || typeof(value), key = 'bad/' || lower(hex(randomblob(8))), raw = 1, mode = 1, filename = NULL,"
    " expire_time = NULL, size = 0, value = coalesce(CAST(value AS BLOB), x'') WHERE "
)
_VALUE: Final = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_EXISTS: Final = "SELECT 1 FROM Cache WHERE key = ? AND raw = 1"

#: The judge of rows; it has no directory, because no row leads to a file.
_DISK: Final = BytesDisk(os.devnull)


def sound(row: Row) -> bytes:
    """Return the value of a row as ``COLUMNS`` selects it.

    Raises:
        RowRefused: it is not one that the ledger writes, or does not have the checksum of its value.
    """
    _, key, raw, mode, filename, expire_time, value, _ = row
    if expire_time is not None:
        msg = "the row is to expire"
        raise RowRefused(msg)
    return _unseal(_DISK.get(key, raw), _DISK.fetch(mode, filename, value, read=False))


def stored(cache: Cache, key: str) -> bytes | None:
    """Return a value inside a transaction; None when it is not there, or not sound and about to be replaced."""
    for (value,) in cache.query(_VALUE, (key,)):
        with contextlib.suppress(RowRefused):
            return _unseal(key, value if type(value) is bytes else b"")
    return None


def exists(cache: Cache, key: str) -> bool:
    """Return whether there is a value, sound or not."""
    return bool(cache.query(_EXISTS, (key,)))


def put(cache: Cache, key: str, value: bytes, tag: str | None = None) -> None:
    """Store a value.

    Args:
        cache: in a transaction.
        key: where.
        value: what.
        tag: what it is found by besides.
    """
    _clear_the_way(cache, key)
    cache.set(key, _seal(key, value), tag=tag, retry=False)


def delete(cache: Cache, key: str) -> bool:
    """Remove a value; return whether it was there."""
    _clear_the_way(cache, key)
    return bool(cache.delete(key, retry=False))


def quarantine_all(cache: Cache) -> int:
    """Move every row that can be told by its columns out of the way; return how many there were."""
    return cache.change(_QUARANTINE + _IS_BAD)


def quarantine(cache: Cache, row: Row) -> None:
    """Move one row out of the way, unless a sound one was put in its place since it was read."""
    cache.change(_QUARANTINE + "rowid = ? AND store_time IS ?", (row[0], row[-1]))


def _clear_the_way(cache: Cache, key: str) -> None:
    # diskcache removes the file that an overwritten row names, which BytesDisk refuses to.
    cache.change(_QUARANTINE + _IS_BAD + "AND key = ?", (key,))


def _seal(key: str, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key.encode(errors="surrogateescape"))).to_bytes(4, "little") + value


def _unseal(key: object, sealed: bytes) -> bytes:
    value = sealed[4:]
    if isinstance(key, str) and sealed == _seal(key, value):
        return value
    msg = f"the row {key!r} does not have the checksum of its value"
    raise RowRefused(msg)
