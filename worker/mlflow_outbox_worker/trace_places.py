"""Where the files of a trace may go, whose place a journal names by its URI.

A journal may be one that somebody else wrote: who imports a bundle, or replays the outbox of another, has its requests
made in the own name at the own server, and nothing else. A URI says more than that. It may be any directory of this
machine, or another host, to which the login would be sent. So only those are taken that calls write down (``places`` of
the plugin): a trace's place below an experiment, as the destination has it, or among what its server keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.artifact_path import checked_artifact_path

_SERVED: Final = "mlflow-artifacts"
_TRACE: Final = re.compile(r"(?P<root>.*?)/traces/[^/\\?#%\s]+/artifacts(?:/.*)?", re.DOTALL)
#: What ends the path of a URI, or is left out of it where it is read.
_NO_PATH: Final = re.compile(r"[?#\\\t\r\n]")


def check(given: str, place: str, location: Callable[[], str]) -> None:
    """Check the place of a trace's files.

    Args:
        given: its URI as it was logged.
        place: the same with MLflow's ids in it, which is where the files would go.
        location: returns the artifact URI of the experiment in MLflow; "" where that is not known.

    Raises:
        InvalidEvent: it is no place of a trace.
        SinkError: MLflow had to be asked and could not be.
    """
    own = provisional.URI_PATTERN.match(given)
    path = given[own.end() :] if own is not None else _path_of(given)
    found = _TRACE.fullmatch(path) if not _NO_PATH.search(given) else None
    if found is None or (own is not None and (own[1] != "experiment" or found["root"])):
        raise _refused(given)
    checked_artifact_path(path.strip("/"), what="place of a trace")
    if own is None and place.startswith(f"{_SERVED}:") and (host := urlsplit(place).netloc):
        where = location()
        if not where.startswith(f"{_SERVED}:") or urlsplit(where).netloc != host:
            raise _refused(given)


def _path_of(given: str) -> str:
    try:
        parts = urlsplit(given)
    except ValueError:
        return ""
    return parts.path if given.startswith(f"{_SERVED}:") else ""


def _refused(given: str) -> InvalidEvent:
    msg = f"{printable(given, 200)!r} is no place of a trace's files at the destination, and nothing is put there"
    return InvalidEvent("bad_path", msg)
