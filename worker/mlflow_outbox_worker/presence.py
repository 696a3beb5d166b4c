"""Is the destination there? Looking is never what makes it: an embedded store that is opened is made."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import DestinationError
from mlflow_outbox_worker.checkup import Finding
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import SinkError
from mlflow_outbox_worker.wording import count, quoted

#: Seconds for the one request to the destination.
_ASK: Final = 10.0


def absent_store(destination: Destination) -> Path | None:
    """Return where the database or directory of an embedded store would be; None when it is there, or no such store.

    Args:
        destination: where an outbox delivers to.
    """
    if destination.scheme not in {"sqlite", "file"}:
        return None
    place = destination.uri.partition(":///")[2] if destination.scheme == "sqlite" else urlsplit(destination.uri).path
    path = Path(unquote(place if place.startswith("/") else f"/{place}"))
    return None if path.exists() else path


def check_destination(destination: Destination, delivered: int, outbox: Path) -> Finding:
    """Ask the destination one question.

    Args:
        destination: where an outbox delivers to, with credentials if there are any.
        delivered: how many runs of the outbox have been created or found there.
        outbox: where that is.
    """
    absent = absent_store(destination)
    if absent is not None:
        return _of_absent(absent, delivered, outbox)
    from mlflow_outbox_worker.mlflow_sink import open_sink

    try:
        sink = open_sink(
            destination.secret_uri or destination.uri, artifact_root=destination.artifact_root or None, timeout=_ASK
        )
        with contextlib.closing(sink):
            sink.find_experiment("Default")
    except SinkError as error:
        refused = classify(error, "open").kind == "parked"
        text = f"{destination.uri} {'refuses' if refused else 'does not answer'}: {error.described}"
        return Finding("parked" if refused else "away", "destination", text)
    except (DestinationError, ImportError) as error:
        return Finding("parked", "destination", f"{destination.uri} cannot be used: {error}")
    return Finding("ok", "destination", f"{destination.uri} answers")


def _of_absent(path: Path, delivered: int, outbox: Path) -> Finding:
    shown = printable(path, 300)
    if delivered:
        runs = f"{count(delivered, 'run')} {'was' if delivered == 1 else 'were'}"
        again = f"mlflow-outbox replay {quoted(outbox)} --again"
        text = f"{shown} is gone, though {runs} delivered to it; put it back, or fill a new one: {again}"
        return Finding("bad", "destination", text)
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if os.access(parent, os.W_OK | os.X_OK):
        return Finding("ok", "destination", f"{shown} does not exist yet; the first delivery makes it")
    return Finding("parked", "destination", f"{shown} does not exist and {parent} cannot be written to")
