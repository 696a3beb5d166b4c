"""Keeping bytes of a journal that are no intact frames, for a person to look at."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.listing import Broken
from mlflow_outbox.spool.private import create_private, make_all_private

#: Bytes of one file; damage is a block of a disk, not a gigabyte.
_MOST_BYTES: Final = 16 * 1024 * 1024


class Quarantine:
    """A folder of damaged bytes.

    Args:
        folder: where they go; made when the first come.
        counters: what could not be kept is counted there, and each piece said once.
    """

    def __init__(self, folder: Path, counters: Counters) -> None:
        self._folder = folder
        self._counters = counters

    def keep(self, broken: Broken) -> None:
        """Keep the bytes that were no intact frames, before the cursor moves past them."""
        name = f"{broken.path.parent.name}-{broken.path.stem}-{broken.start}-{broken.end}-{secrets.token_hex(3)}.bin"
        self._counters.warn_once(
            ("broken", broken.path.name, broken.start),
            f"mlflow-outbox: bytes {broken.start} to {broken.end} of {broken.path} are {broken.kind} "
            f"({broken.reason}); they are kept in {self._folder}",
        )
        try:
            make_all_private(self._folder)
            with open(broken.path, "rb") as source, os.fdopen(create_private(self._folder / name), "wb") as copy:
                source.seek(broken.start)
                copy.write(source.read(min(broken.end - broken.start, _MOST_BYTES)))
        except OSError:
            self._counters.add("quarantine_copies_failed")  # the segment itself still holds them until it is reclaimed
