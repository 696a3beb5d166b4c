"""The options of an outbox, and the only place that reads environment variables.

Every option has a default that is right for a training job on a workstation or a cluster node. In
``Settings.from_environment(...)`` values given in code win over the environment, which wins over the defaults;
``Settings(...)`` reads no environment variable. ``Settings`` is frozen: two parts of the program can
never disagree about an option, and a test states in one line what it changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_type_hints

from mlflow_outbox.errors import InvalidSettings

SyncLevel = Literal["os", "interval", "always"]
WorkerKind = Literal["thread", "process", "none"]
VerifyLevel = Literal["off", "latest", "full"]

#: MLflow's limit for one request.
MAX_BATCH_POINTS: Final = 1000

_MIB = 1024 * 1024
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of one outbox; ``Settings.from_environment()`` fills them from ``MLFLOW_OUTBOX_<NAME>`` variables.

    ``Settings(...)`` itself reads no variable: what is not given has its default.

    Raises:
        InvalidSettings: an option has a value outside its range; the message names option and range.
    """

    #: Raise the matching error from a logging call that refuses its input, instead of warning once and counting.
    strict: bool = False

    #: What a returned logging call has survived: see the durability ladder in the README.
    sync: SyncLevel = "interval"
    #: Seconds between two background syncs at ``sync="interval"``: what a power cut can take, see the durability ladder
    #: in the README.
    sync_interval: float = 0.5

    #: Bytes after which a writer starts a new segment, so that delivered ones can be reclaimed while the run goes on;
    #: a sixteenth of ``outbox_bytes`` at most.
    segment_bytes: int = 8 * _MIB
    #: Bytes of encoded events kept in memory, per run and process, while the disk refuses them.
    memory_bytes: int = 8 * _MIB
    #: Bytes of the largest file that log_artifact copies; a larger one is refused.
    artifact_bytes: int = 64 * 1024 * _MIB
    #: Bytes that all of one outbox may take; at the cap new events are refused and counted, old ones are never
    #: dropped.
    outbox_bytes: int = 64 * 1024 * _MIB
    #: Bytes of the file system that are left free for others; below it new events are refused and counted.
    free_bytes: int = 64 * _MIB

    #: Seconds that the exit of the interpreter may wait for delivery; what is left stays on disk.
    exit_timeout: float = 10.0
    #: Seconds that ``close()`` may wait for delivery when it is not told otherwise.
    close_timeout: float = 30.0

    #: Seconds between two looks of an idle worker at the journals.
    poll_interval: float = 0.2
    #: Runs delivered side by side to a tracking server, or batches of points of one long run (embedded stores take one
    #: at a time).
    parallel_runs: int = 4
    #: Metric points in one request; MLflow takes at most 1000.
    batch_points: int = MAX_BATCH_POINTS
    #: Seconds that one request to the tracking server may take in all; one with a file four more for each MiB of it.
    #: Of a database: that a connect may take, and for which its host may be silent.
    request_timeout: float = 30.0
    #: Seconds of the first back-off after a failed attempt; doubled for each further one, with full jitter.
    retry_initial: float = 0.5
    #: Seconds that a back-off never exceeds, a Retry-After of the server included.
    retry_max: float = 60.0
    #: Seconds between two attempts at a parked run or destination, which waits for a person.
    parked_retry: float = 300.0
    #: What is read back from MLflow once a run has ended and been delivered: nothing ("off"), the latest values
    #: ("latest"), every point ("full").
    verify: VerifyLevel = "latest"
    #: Seconds that a delivered and verified run is kept on disk, so that it can be replayed to another server; less
    #: where the disk or ``outbox_bytes`` has no room.
    retention: float = 7 * 24 * 3600.0
    #: Seconds that a worker process goes on delivering after the last program that logs has ended.
    linger: float = 60.0

    #: Seconds that MLflow's own API, through an ``outbox+`` tracking URI, waits for the server to create or name a
    #: run, an experiment or a model before it goes on with a provisional id; 0 never asks.
    create_timeout: float = 2.0
    #: Seconds that any other read through such a URI may wait for one answer before the local one is given.
    read_timeout: float = 10.0
    #: Seconds that a write through such a URI waits for its delivery, for those who look for it at the server a moment
    #: later; 0 never waits. After a wait in vain, none is made for a while.
    write_timeout: float = 0.0
    #: Seconds for which such a URI is not used after which the process ends its threads and connections for it, if
    #: everything was delivered; the next call starts them again.
    idle_timeout: float = 30.0
    #: What delivers for such a URI, and for a tracker that is not told: "thread", "process", or "none" to only write,
    #: offline.
    worker: WorkerKind = "thread"

    #: Directory under which outboxes are made, one per destination; None means ``./.mlflow-outbox``.
    root: Path | None = None
    #: Directory for ledgers, when they must not be inside outboxes, one for each of these; None decides by file system.
    ledger_dir: Path | None = None
    #: Switches the whole outbox off: nothing is kept and nothing is delivered; an ``outbox+`` tracking URI is then what
    #: it is without the prefix.
    disabled: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)
            kinds, most = ((int,), _MOST_BYTES) if whole else ((int, float), _MOST_SECONDS)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                sort = "whole" if whole else "finite"
                msg = f"the setting {name}={value!r} must be a {sort} number from {least} to {most}"
                raise InvalidSettings(msg)
        if self.batch_points > MAX_BATCH_POINTS:
            msg = (
                f"the setting batch_points={self.batch_points} must be at most {MAX_BATCH_POINTS}, "
                "MLflow's limit for one request"
            )
            raise InvalidSettings(msg)
        for name in ("strict", "disabled"):
            if not isinstance(getattr(self, name), bool):
                msg = f"the setting {name}={getattr(self, name)!r} must be True or False"
                raise InvalidSettings(msg)
        for name in ("root", "ledger_dir"):
            value = getattr(self, name)
            if value is None or isinstance(value, Path):
                continue
            if not isinstance(value, (str, os.PathLike)):
                msg = f"the setting {name}={value!r} must be a path"
                raise InvalidSettings(msg)
            object.__setattr__(self, name, Path(value))
        if self.ledger_dir is not None:
            object.__setattr__(self, "ledger_dir", _absolute("ledger_dir", self.ledger_dir))
        for name, kind in (("sync", SyncLevel), ("verify", VerifyLevel), ("worker", WorkerKind)):
            value = getattr(self, name)
            if value not in get_args(kind):
                allowed = ", ".join(repr(choice) for choice in get_args(kind))
                msg = f"the setting {name}={value!r} must be one of {allowed}"
                raise InvalidSettings(msg)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Read the options that ``MLFLOW_OUTBOX_<NAME>`` variables set, under those given here.

        Args:
            environ: the variables; None means those of this process.
            **given: options by name, which win over the environment.

        Raises:
            InvalidSettings: a variable cannot be read as its option's type, or is outside its range.
        """
        environ = os.environ if environ is None else environ
        types = get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = variable_name(field.name)
            text = environ.get(variable)
            if text is not None and text.strip() != "" and field.name not in given:
                values[field.name] = _parse(variable, text.strip(), types[field.name])
                try:
                    cls(**{field.name: values[field.name]})
                except InvalidSettings as error:
                    msg = f"the environment variable {variable} is wrong: {error}"
                    raise InvalidSettings(msg) from None
        return cls(**values, **given)


#: ``root`` is what users know as the outbox directory; all other variables follow the option's name.
_VARIABLES = {"root": "MLFLOW_OUTBOX_DIR"}

#: 285 years, for what is meant to last for ever: beyond 292, ``threading.TIMEOUT_MAX``, waits raise an OverflowError.
_MOST_SECONDS = 9_000_000_000
#: Nearly an exabyte, and more than there will be of anything that is counted.
_MOST_BYTES = 10**18 - 1

_LEAST: dict[str, float] = {
    "sync_interval": 0.001,
    "segment_bytes": 1024,
    "memory_bytes": 0,
    "artifact_bytes": 0,
    "outbox_bytes": 0,
    "free_bytes": 0,
    "exit_timeout": 0,
    "close_timeout": 0,
    "poll_interval": 0.001,
    "parallel_runs": 1,
    "batch_points": 1,
    "request_timeout": 0.001,
    "retry_initial": 0.001,
    "retry_max": 0.001,
    "parked_retry": 0.001,
    "retention": 0,
    "linger": 0,
    "create_timeout": 0,
    "read_timeout": 0.001,
    "write_timeout": 0,
    "idle_timeout": 0,
}


def variable_name(option: str) -> str:
    """Return the environment variable that sets an option."""
    return _VARIABLES.get(option, f"MLFLOW_OUTBOX_{option.upper()}")


def _absolute(name: str, path: Path) -> Path:
    """Return a path that stays the same when the program changes its current directory."""
    try:
        return Path(os.path.abspath(path.expanduser()))
    except (OSError, RuntimeError) as error:  # the current directory is gone, or the user has no home
        msg = f"the setting {name}={str(path)!r} depends on what is not there ({error}); give a whole path"
        raise InvalidSettings(msg) from None


def _parse(variable: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            if text.lower() in _TRUE | _FALSE:
                return text.lower() in _TRUE
            raise ValueError
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except ValueError:
        wanted = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        msg = f"the environment variable {variable}={text!r} must be {wanted}"
        raise InvalidSettings(msg) from None
    return Path(text) if kind == (Path | None) else text


def state_directory() -> Path:
    """Return where this machine keeps what must not lie on a network file system or beside read-only data.

    That is ``$XDG_STATE_HOME/mlflow-outbox``, or ``~/.local/state/mlflow-outbox``. Who has no home, as the user of a
    container without ``HOME`` and an entry in ``/etc/passwd``, has the root directory, as in processes of ours.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    # The specification of these directories says to ignore a relative path.
    if os.path.isabs(given):
        return Path(given) / "mlflow-outbox"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    return home / ".local" / "state" / "mlflow-outbox"


def tracking_uri_from_environment() -> str | None:
    """Return ``MLFLOW_TRACKING_URI``, or None when it is unset or empty."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def workspace_from_environment() -> str | None:
    """Return ``MLFLOW_WORKSPACE``, the workspace of a tracking server, or None when it is unset or empty."""
    return os.environ.get("MLFLOW_WORKSPACE") or None


def tell_root(root: Path) -> None:
    """Set ``MLFLOW_OUTBOX_DIR`` for this program and its subprocesses, as MLflow does with its tracking URI.

    Args:
        root: directory under which outboxes are made.
    """
    os.environ[variable_name("root")] = os.path.abspath(root)


def environment_for_child(**extra: str) -> dict[str, str]:
    """Return a copy of this process's environment with ``extra`` added, for a worker process."""
    while True:
        with contextlib.suppress(KeyError, RuntimeError):  # another thread took a variable away or added one just now
            return {**os.environ, **extra}
