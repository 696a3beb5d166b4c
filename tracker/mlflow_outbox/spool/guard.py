"""The disk budget: when new events are refused so that neither the outbox nor the disk overflows.

Looked at in the background, never by a logging call; a call only reads the last verdict. What is undelivered is never
deleted to make room: at the cap the newest events are refused and counted, and logging goes on by itself as soon as
delivery has made room (``mlflow_outbox_worker.room``).
"""

from __future__ import annotations

import os
import time
from typing import Final

from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import reserve
from mlflow_outbox.spool.directory import OutboxDirectory

#: Seconds between two measurements of the outbox's size, which walks its directories; free space is looked at every
#: time.
_MEASURE_EVERY: Final = 10.0


class DiskGuard:
    """Decides whether an outbox may take new events.

    Args:
        directory: the outbox.
        settings: ``outbox_bytes`` and ``free_bytes``.
    """

    def __init__(self, directory: OutboxDirectory, settings: Settings) -> None:
        self._directory = directory
        self._settings = settings
        self._reason: str | None = None
        self._measured_at = -_MEASURE_EVERY
        self._used = 0

    def reason(self) -> str | None:
        """Return why new events are refused, or None when they are not."""
        return self._reason

    def look(self) -> None:
        """Measure, and decide anew."""
        self._reason = self._free_space() or self._budget()

    def _free_space(self) -> str | None:
        try:
            found = os.statvfs(self._directory.path)
        except OSError:
            return None  # the write itself will say what is wrong
        free = found.f_bavail * found.f_frsize
        if free >= self._settings.free_bytes or found.f_blocks == 0:
            return None
        kept = self._settings.free_bytes
        return f"{free:,} bytes are free on the disk of {self._directory.path}, the setting free_bytes keeps {kept:,}"

    def _budget(self) -> str | None:
        now = time.monotonic()
        if self._reason is not None or now - self._measured_at >= _MEASURE_EVERY:
            self._measured_at = now
            self._used = used_bytes(self._directory)
        if self._used < self._settings.outbox_bytes:
            return None
        allowed = self._settings.outbox_bytes
        return f"{self._directory.path} holds {self._used:,} bytes, the setting outbox_bytes allows {allowed:,}"


def used_bytes(directory: OutboxDirectory) -> int:
    """Return the bytes of all files of an outbox, its reserve aside."""
    total = 0
    for folder, _, files in os.walk(directory.path):
        for name in files:
            if name == reserve.NAME:
                continue
            try:
                total += os.stat(os.path.join(folder, name), follow_symlinks=False).st_size
            except OSError:
                continue
    return total
