"""The kinds of event that a journal holds, and their bytes.

Each event is a msgspec struct encoded to MessagePack as an array whose first element is the kind's number::

    [2, "loss", 0.3, 1700000000000, 7]         Metric(key, value, time_ms, step)

Compatibility: numbers are never used again, fields are only ever added at the end and with a default. A reader ignores
fields that it does not know (a newer minor version wrote them) and reports kinds that it does not know.

Events carry no run id (a segment belongs to one run) and no sequence number (the frame has it). Times are wall-clock
milliseconds since the epoch, taken when the logging call was made: they are what makes a metric point the same point
when it is sent a second time.
"""

from __future__ import annotations

from typing import Any, Final, Union

import msgspec

#: Characters; the limits of MLflow's validation module (mlflow/utils/validation.py).
MAX_KEY_CHARS: Final = 250
MAX_PARAM_CHARS: Final = 6000
MAX_TAG_CHARS: Final = 8000
#: Statuses that are no end of a run.
GOING_ON: Final = frozenset({"RUNNING", "SCHEDULED"})
#: The tag in which MLflow keeps a run's name; setting it renames the run.
NAME_TAG: Final = "mlflow.runName"
#: What MLflow's client calls the user of a run that names none.
NOBODY: Final = "unknown"
#: Characters of a run's name that MLflow's databases hold, SQLite aside, which holds any (``runs.name``).
MAX_NAME_CHARS: Final = 250
#: Steps and times are int64 in MLflow's protocol; a larger one is stored as garbage by its server (facts, 2a).
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

#: The statuses that MLflow knows a run can have.
STATUSES: Final = frozenset({"RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"})


class RunStarted(msgspec.Struct, array_like=True, tag=1, frozen=True, omit_defaults=False):
    """A writer begins to log to a run; always the first event of the process that started or resumed it.

    Attributes:
        time_ms: when the call was made, which orders it among the other events.
        run_name: name shown by MLflow; None lets MLflow choose.
        user: who ran it, as MLflow's ``mlflow.user`` tag.
        tags: the run's first tags.
        resumed: the run existed before, here or in MLflow; it goes on with status RUNNING.
        experiment_id: MLflow's id of the experiment, or a provisional one; "" when only its name is known.
        attempted: the caller asked MLflow to create the run and does not know whether that was carried out.
        given_ms: when the run started, if the caller said so; None is at time_ms.
    """

    time_ms: int
    run_name: str | None = None
    user: str = ""
    tags: dict[str, str] = {}
    resumed: bool = False
    experiment_id: str = ""
    attempted: bool = False
    given_ms: int | None = None

    @property
    def start_time_ms(self) -> int:
        """When the run started."""
        return self.time_ms if self.given_ms is None else self.given_ms


class Metric(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    """One metric point."""

    key: str
    value: float
    time_ms: int
    step: int


class Metrics(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Several metric points of one time and step, from one call."""

    values: dict[str, float]
    time_ms: int
    step: int


class Params(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Parameters; the first value of a key stays, as in MLflow."""

    values: dict[str, str]
    time_ms: int


class Tags(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """Tags; the last value of a key stays."""

    values: dict[str, str]
    time_ms: int


class Artifact(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """A file of the run, copied when it was logged.

    Attributes:
        path: where MLflow shows it: a relative POSIX path, the file name included.
        sha256: hex digest of the content, which is also the copy's name under ``files/``.
        size: bytes.
        placed: the directory in which the call has put the file itself (``placement``); "" when it has not.
    """

    path: str
    sha256: str
    size: int
    time_ms: int
    placed: str = ""


class RunEnded(msgspec.Struct, array_like=True, tag=7, frozen=True, gc=False):
    """The run has ended with a status; an event after it is delivered all the same.

    Attributes:
        status: how it ended, or that it goes on.
        time_ms: when the call was made, which orders it among the ends that other writers logged.
        given_ms: when the run ended, if the caller said so; None is at time_ms.
    """

    status: str
    time_ms: int
    given_ms: int | None = None

    @property
    def end_time_ms(self) -> int:
        """When the run ended."""
        return self.time_ms if self.given_ms is None else self.given_ms


class SegmentClosed(msgspec.Struct, array_like=True, tag=8, frozen=True, gc=False):
    """The last frame of a segment whose writer closed it: nothing will be appended.

    Attributes:
        rotated: the same writer goes on in its next segment.
    """

    rotated: bool


class Request(msgspec.Struct, array_like=True, tag=9, frozen=True, gc=False):
    """A call of MLflow's tracking store that has no event of its own; it is made in its place among the other events.

    Attributes:
        operation: the store's method, for instance "log_inputs".
        arguments: its arguments, a JSON object; entities of MLflow are written as ``plugin.codec`` says.
        known: the id that MLflow gave to what the call creates, which it did already; "" when it is to be made.
        kept: hex digest of a file under ``files/`` with all the arguments, which are more than an event holds:
            ``arguments`` has the short ones only; "" when it has all.
    """

    operation: str
    arguments: bytes
    time_ms: int
    known: str = ""
    kept: str = ""


class FileFor(msgspec.Struct, array_like=True, tag=10, frozen=True):
    """A file of something that is no run, copied when it was logged.

    Attributes:
        owner: "model:<model id>", or "uri:<artifact URI of MLflow>".
        path: relative POSIX path below the owner's artifacts, the file name included.
        sha256: hex digest of the content, which is also the copy's name under ``files/``.
        size: bytes.
        placed: as in ``Artifact``.
    """

    owner: str
    path: str
    sha256: str
    size: int
    time_ms: int
    placed: str = ""


Event = Union[RunStarted, Metric, Metrics, Params, Tags, Artifact, RunEnded, SegmentClosed, Request, FileFor]  # noqa: UP007 - msgspec needs the runtime object on 3.10

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

encode = _encoder.encode


def decode(payload: bytes | memoryview) -> Event:
    """Decode one event.

    Raises:
        msgspec.DecodeError: the payload is no event of a kind and shape known here.
    """
    try:
        return _decoder.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:  # the latter in a field that is not known and passed over
        raise msgspec.DecodeError(str(error)) from None


def arguments_of(data: bytes) -> dict[str, Any]:
    """Return the arguments of a call, as they stand in ``Request.arguments``.

    Raises:
        ValueError: they are no JSON object.
    """
    try:
        found = msgspec.json.decode(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        msg = f"the arguments of a call are a JSON object, not a {type(found).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - it is about what is in the bytes
    return found


def argument_of(data: bytes, name: str) -> str:
    """Return one argument of a call as text; "" when it has none of this name, or its arguments cannot be read."""
    try:
        return str(arguments_of(data).get(name) or "")
    except ValueError:
        return ""


def points_of(event: Event) -> int:
    """Return how many metric points an event holds."""
    if type(event) is Metric:
        return 1
    return len(event.values) if type(event) is Metrics else 0


def digest_of(event: Event) -> str:
    """Return the hex digest of the copied file that an event names; "" for one that names none."""
    if isinstance(event, (Artifact, FileFor)):
        return event.sha256
    return event.kept if isinstance(event, Request) else ""
