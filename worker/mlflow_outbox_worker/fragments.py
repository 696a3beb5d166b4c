"""Runs of which only the end is on disk: their first segments were delivered, kept for the retention time, reclaimed.

Where they were delivered to nothing is missing. Sent anywhere else, or packed for it, such a run would arrive without
its name, its params and its first points, and look whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from mlflow_outbox.spool.reader import RunReader


def lost_beginnings(runs: Mapping[str, tuple[Path, ...]]) -> dict[str, int]:
    """Return how many events are not on disk any more of the runs whose beginning is not; a whole run is not named.

    Args:
        runs: the directories of each run, by run id; what cannot be read is passed over.
    """
    found = {}
    for run_id, folders in runs.items():
        with contextlib.suppress(OSError):
            lost = sum(held[0].header.first_seq for held in RunReader(*folders).complete_segments().values())
            if lost:
                found[run_id] = lost
    return found
