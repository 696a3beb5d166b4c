"""The bytes-only ``diskcache.Disk``: what a row of the ledger's database may hold, and nothing else.

diskcache's own Disk, and its JSONDisk too, believes the row: a ``mode`` of 4 or a ``raw`` of 0 is unpickled, which
runs code of whoever wrote the row, and ``filename`` is joined to the directory unchecked, so that reading follows it
outside and deleting removes what is there. A ledger stores bytes under text keys, inline, so all of that can be
refused:

* a key is text, an integer or bytes, stored as it is; a value is bytes, stored in its row (``mode`` 1, no file);
* a row that says anything else raises RowRefused before any of it is looked at;
* there are no side files, hence none to name, write, read or remove.
"""

from __future__ import annotations

from typing import Any, Final

import diskcache

#: diskcache's MODE_RAW: the value is in its row, as it is.
RAW: Final = 1
#: Integers that SQLite can hold; diskcache would pickle a larger one.
_INT64: Final = range(-(2**63), 2**63)


class RowRefused(Exception):
    """Raised when a row is not one that BytesDisk writes; it is to be moved out of the way, unread."""


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Stores bytes under plain keys in the database file, and refuses every other row."""

    def put(self, key: Any) -> tuple[str | int | bytes, bool]:
        """Return the columns ``key`` and ``raw`` for a key.

        Args:
            key: text, bytes, or an integer of 64 bits.

        Raises:
            TypeError: the key is anything else.
        """
        kind = type(key)
        if kind is str or kind is bytes or (kind is int and key in _INT64):
            return key, True
        msg = f"a key of the ledger is str, bytes or a 64-bit int, not {kind.__name__}"
        raise TypeError(msg)

    def get(self, key: Any, raw: Any) -> str | int | bytes:
        """Return the key that the columns ``key`` and ``raw`` hold.

        Raises:
            RowRefused: the row is not one that BytesDisk writes.
        """
        if type(raw) is int and raw == 1 and type(key) in {str, int, bytes}:
            return key  # type: ignore[no-any-return]  # of a type that was just looked at
        msg = f"the row's key is {type(key).__name__} with raw={raw!r}"
        raise RowRefused(msg)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple[int, int, None, bytes]:  # noqa: ARG002, FBT001 - diskcache's signature
        """Return the columns ``size``, ``mode``, ``filename`` and ``value`` for a value.

        Args:
            value: bytes.
            read: always False; values are not files.
            key: ignored.

        Raises:
            TypeError: the value is not bytes, or is to be read from a file.
        """
        if type(value) is bytes and not read:
            return 0, RAW, None, value
        msg = f"a value of the ledger is bytes, not {'a file' if read else type(value).__name__}"
        raise TypeError(msg)

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> bytes:  # noqa: FBT001 - diskcache's signature
        """Return the value that the columns ``mode``, ``filename`` and ``value`` hold.

        Raises:
            RowRefused: the row is not one that BytesDisk writes; nothing was opened, executed or removed.
        """
        if type(mode) is int and mode == RAW and filename is None and type(value) is bytes and not read:
            return value
        msg = f"the row's value is {type(value).__name__} with mode={mode!r} and filename={filename!r}"
        raise RowRefused(msg)

    def filename(self, key: Any = diskcache.UNKNOWN, value: Any = diskcache.UNKNOWN) -> tuple[str, str]:  # noqa: ARG002 - diskcache's signature
        """Refuse to name a file: values are never stored in files.

        Raises:
            RowRefused: always.
        """
        msg = "the ledger keeps no files beside its database"
        raise RowRefused(msg)

    def remove(self, file_path: Any) -> None:
        """Refuse to remove a file: the ledger has none, so a row that names one was not written by it.

        Raises:
            RowRefused: always.
        """
        msg = f"the ledger keeps no files beside its database, and does not remove {file_path!r}"
        raise RowRefused(msg)
