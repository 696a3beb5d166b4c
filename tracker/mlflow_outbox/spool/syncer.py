"""Makes one run's files durable, and decides when a disk that could not may be asked again.

A failed fsync means that the kernel has dropped pages it could not write and will not say so again (Rebello et al.,
ATC 2020), so no descriptor is synced a second time after a failure: what it held is written to another file. A disk
that fails again is asked again later, each time longer, up to a minute: a dying disk must not be filled with copies.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.spool import descriptors
from mlflow_outbox.spool.disk import SystemDisk, is_foreign
from mlflow_outbox.spool.segment import Segment
from mlflow_outbox.spool.snapshot import SnapshotStore

#: Seconds before the second try at a disk that cannot sync; doubled for each further one, up to the last.
_RETRY: Final = (0.5, 60.0)
#: After these nothing was asked of the disk, and another time it can be.
_NOT_ASKED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Syncer:
    """Syncs the segments, names and copied files of one run.

    Args:
        disk: the system calls.
        counters: where failures are counted.
        run_id: for the warning.
        wanted: whether anything is to be synced at all; it is not at ``sync="os"``.
    """

    def __init__(self, disk: SystemDisk, counters: Counters, run_id: str, *, wanted: bool) -> None:
        self._disk = disk
        self._counters = counters
        self._run_id = run_id
        self._wanted = wanted
        self._failures = 0
        self._again_at = 0.0

    def may_try(self) -> bool:
        """Return whether a disk that failed has been left alone for long enough."""
        return stopwatch.seconds() >= self._again_at

    def data(self, fd: int) -> bool:
        """Make a segment's data survive a power cut; return whether the disk did it."""
        if not self._wanted:
            return True
        try:
            courtesy.waits()
            self._disk.datasync(fd)
        except OSError as error:
            if is_foreign(error):
                raise
            self._failed(error)
            return False
        if self._failures:
            self._failures, self._again_at = 0, 0.0
            self._counters.forget("sync")
        return True

    def segment(self, segment: Segment) -> bool | None:
        """Make a complete segment survive a power cut; return whether the disk did it, None to try it another time."""
        if segment.is_open:
            return self.data(segment.fd)
        return self._laid_by(segment.path) if segment.laid_by else True

    def _laid_by(self, path: Path) -> bool | None:
        try:
            fd = descriptors.opened(self._disk.reopen, path)
        except FileNotFoundError:
            return True  # it was delivered meanwhile
        except OSError as error:
            if is_foreign(error):
                raise
            if error.errno in _NOT_ASKED:
                self._counters.add("sync_errors")
                return None
            self._failed(error)
            return False
        try:
            return self.data(fd)
        finally:
            descriptors.close(self._disk.close, fd, path)

    def _failed(self, error: OSError) -> None:
        self._failures += 1
        first, most = _RETRY
        pause = 0.0 if self._failures == 1 else min(most, first * 2.0 ** min(self._failures - 2, 10))
        self._again_at = stopwatch.seconds() + pause
        self._counters.add("sync_errors")
        self._counters.warn_once(
            "sync",
            f"mlflow-outbox: the disk could not sync a segment of run {self._run_id} "
            f"({error.strerror or error}); its last events are written again to a new one",
        )

    def names(self, *folders: Path) -> bool:
        """Make the names in directories survive a power cut; return False when that is worth another try."""
        if not self._wanted:
            return True
        try:
            self._sync_each(folders)
        except OSError as error:
            return self._is_over(error)
        return True

    def _is_over(self, error: OSError) -> bool:
        if is_foreign(error):
            raise error
        self._counters.add("sync_errors")
        return error.errno not in _NOT_ASKED

    def _sync_each(self, folders: tuple[Path, ...]) -> None:
        for folder in folders:
            self._disk.sync_directory(folder)

    def copies(self, copies: Sequence[tuple[SnapshotStore, str]]) -> list[tuple[SnapshotStore, str]]:
        """Make copied files of the run survive a power cut; return those that are worth no other try.

        Their names come last, once for all of them: a directory of files may be logged at once, and each sync waits
        for the disk.
        """
        done = [copy for copy in copies if self._is_done(copy[0].sync_content, copy[1])]
        return done if not done or self._is_done(done[0][0].sync_names) else []

    def _is_done(self, sync: Callable[..., None], *what: str) -> bool:
        try:
            sync(*what)
        except FileNotFoundError:
            pass  # its event was delivered meanwhile, and the copy filed; or it was refused
        except OSError as error:
            return self._is_over(error)
        return True
