"""Ids given here while MLflow could not be asked for its own, in a form that can be found wherever they were written.

An id is copied by user code and by MLflow into tags, traces, links and files. So a provisional id can be told from
one of MLflow's by its look, in any text, and is replaced there at delivery by what it has become:

* a run's is 32 hex digits, a model's the same behind ``m-``, and both begin with ``0b0e5e1f``;
* an experiment's is a number of 18 digits (MLflow takes nothing else) that begins with ``90669``, made from the
  outbox and the experiment's name: two processes that meet the same new experiment offline give it the same id. One
  that gets a name which another had before gets another id.

An id that looks like this and that no outbox gave is left as it is.

What belongs to no run (an experiment's tags, traces) is written to the journal of a *room*: a run directory whose
name says which experiment it is for, and that never becomes a run in MLflow.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

_MARK: Final = "0b0e5e1f"
_EXPERIMENT_MARK: Final = "90669"
#: The tags by which MLflow's own clients' runs and models are found again.
RUN_ID_TAG: Final = "mlflow_outbox.run_id"
MODEL_ID_TAG: Final = "mlflow_outbox.model_id"
#: Finds provisional ids of runs, models (with their ``m-``) and experiments.
PATTERN: Final = re.compile(
    rf"(?<![0-9A-Za-z])(?:m-)?{_MARK}[0-9a-f]{{24}}(?![0-9A-Za-z])|(?<!\d){_EXPERIMENT_MARK}\d{{13}}(?!\d)"
)
#: Artifact URIs of the outbox's own scheme: the kind ("run", "model", "experiment") and id of their owner.
ARTIFACT_SCHEME: Final = "outbox-artifacts"
URI_PATTERN: Final = re.compile(rf"{ARTIFACT_SCHEME}:/[\w\-]+/(run|model|experiment)/([\w\-]+)(?:/artifacts)?")
_ROOM: Final = "experiment-"
#: The room of things whose experiment is not known.
COMMON_ROOM: Final = f"{_ROOM}none"


def new_run_id() -> str:
    """Return a provisional run id that nobody else has."""
    return _MARK + secrets.token_hex(12)


def new_model_id() -> str:
    """Return a provisional model id that nobody else has."""
    return f"m-{new_run_id()}"


def experiment_id(outbox_id: str, name: str, earlier: int = 0) -> str:
    """Return the provisional id of the experiment called name.

    Args:
        outbox_id: the outbox.
        name: the experiment's.
        earlier: how many others had the name, and were renamed, while MLflow could not be asked.
    """
    text = f"{outbox_id}/{name}\0{earlier}" if earlier else f"{outbox_id}/{name}"
    digest = hashlib.sha256(text.encode()).digest()
    return f"{_EXPERIMENT_MARK}{int.from_bytes(digest[:8], 'big') % 10**13:013d}"


def is_provisional(text: str) -> bool:
    """Return whether an id looks like one given here."""
    return PATTERN.fullmatch(text) is not None


def beginning(run_id: str, chars: int) -> str:
    """Return so much of a run's id that people can tell it from others: all provisional ones begin alike.

    Args:
        run_id: the id; the name of a room tells by its end, and is returned as a whole.
        chars: characters that tell.
    """
    if is_room(run_id):
        return run_id
    return run_id[: chars + len(_MARK) * is_provisional(run_id)]


def room_of(experiment: str) -> str:
    """Return the name of the room of an experiment, by its id."""
    return f"{_ROOM}{experiment}"


def is_room(run_id: str) -> bool:
    """Return whether a run directory's name is that of a room."""
    return run_id.startswith(_ROOM)


def experiment_of(room: str) -> str:
    """Return the experiment id that a room is for; "" for the common room.

    Args:
        room: its name, with a dot and its outbox behind it where rooms of several outboxes meet.
    """
    name = room.partition(".")[0]
    return "" if name == COMMON_ROOM else name.removeprefix(_ROOM)
