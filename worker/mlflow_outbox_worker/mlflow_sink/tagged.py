"""Which runs of a file store carry the tag of an outbox, without reading the others.

MLflow's search reads every run of an experiment whole, all points of all metrics: a search for each of many runs costs
by the square of what the store holds. A run gets the tag with its creation, in a file of the tag's name; so a run is
looked at once when it has that file, and until it is old when it has not, since whoever makes it may be at it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow.store.tracking.file_store import FileStore

from mlflow_outbox_worker.sink import RUN_ID_TAG

#: Seconds after which a run without the tag gets none: it is not an outbox's.
_OLD: Final = 3600.0


class TaggedRuns:
    """Remembers the runs that have the tag, by experiment; used by several threads.

    Args:
        now: wall-clock seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        #: By the experiment's directory: the names that were looked at for good, and the runs by the value of the tag.
        self._seen: dict[str, set[str]] = {}
        self._runs: dict[str, dict[str, list[str]]] = {}

    def find(self, home: str, value: str) -> list[str]:
        """Return the ids of the runs in an experiment's directory whose tag had a value when they were first seen.

        Raises:
            OSError: the directory or a tag cannot be read.
        """
        with self._lock:
            seen, runs = self._seen.setdefault(home, set()), self._runs.setdefault(home, {})
            for name in set(os.listdir(home)) - seen:
                held = self._tag_of(Path(home, name))
                if held is not None:
                    seen.add(name)
                if held:
                    runs.setdefault(held, []).append(name)
            return list(runs.get(value, ()))

    def _tag_of(self, run: Path) -> str | None:
        """Return the value of the tag; "" for what will never have it, None for what may be in the making."""
        try:
            value = Path(run, FileStore.TAGS_FOLDER_NAME, RUN_ID_TAG).read_text(encoding="utf-8")
        except NotADirectoryError:
            return ""
        except FileNotFoundError:
            value = ""
        try:
            return value or ("" if run.stat().st_mtime < self._now() - _OLD else None)
        except FileNotFoundError:
            return None
