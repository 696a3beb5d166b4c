"""A run as the experiment holds it: every method writes to the journal and returns.

No method raises (unless ``Settings(strict=True)``), waits for MLflow, or imports anything. What cannot be kept is
refused with one warning per kind and key, and counted.
"""

from __future__ import annotations

import datetime as dt
import io
import os
import posixpath
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import ArtifactRefused, EventRefused, InvalidEvent, InvalidEventType, OutboxFull
from mlflow_outbox.jsontext import Reader
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.events import (
    INT64_MAX,
    INT64_MIN,
    MAX_KEY_CHARS,
    MAX_PARAM_CHARS,
    MAX_TAG_CHARS,
    Artifact,
    Event,
    Metric,
    Metrics,
    Params,
    RunEnded,
    RunStarted,
    Tags,
)
from mlflow_outbox.spool.snapshot import Snapshot, SnapshotStore, checked_artifact_path
from mlflow_outbox.validation import (
    checked_key,
    checked_mapping,
    checked_status,
    checked_step,
    checked_text,
    checked_time_ms,
    checked_value,
    looks_like_seconds,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlflow_outbox.spool.journal import Journal

Time = int | float | dt.datetime

#: Keys that were checked already, per run; more than these are checked at each call.
_KEYS_REMEMBERED: Final = 10_000

_time_ns = time.time_ns


class Run:
    """One run. Made by ``MLflowTracker.start_run``; may be used from any thread, and in forked processes.

    Used as a context manager it ends FINISHED, FAILED when an exception leaves the block, or KILLED on
    KeyboardInterrupt.

    Attributes:
        run_id: the run's id in the outbox, 32 hex digits; MLflow's own id when the run is one that existed in MLflow.
    """

    def __init__(self, journal: Journal | None, run_id: str, settings: Settings, counters: Counters) -> None:
        self.run_id = run_id
        self._journal = journal
        self._settings = settings
        self._counters = counters
        self._keys: set[str] = set()
        self._ended = False
        self._files_lock = threading.RLock()
        self._append_event = journal.append if journal is not None else _append_nowhere

    def __repr__(self) -> str:
        return f"<Run {self.run_id}, {'ended' if self._ended else 'running'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(_status_after(error))

    # -- metrics

    def log_metric(self, key: str, value: Any, step: Any = None, timestamp: Time | None = None) -> bool:
        """Log one metric point.

        Args:
            key: letters, digits and ``_-. :/``, at most 250 characters.
            value: a Python, NumPy or framework scalar; NaN and infinities too.
            step: a whole number in the range of int64; None is 0.
            timestamp: wall-clock time in milliseconds since the epoch, or a datetime; None is now.

        Returns:
            Whether the point was kept.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        if (
            timestamp is None
            and type(value) is float
            and type(step) is int
            and INT64_MIN <= step <= INT64_MAX
            and type(key) is str
            and key in self._keys
        ):
            event: Event = Metric(key, value, _time_ns() // 1_000_000, step)
            if self._append_event(event):
                return True
            return self._not_kept()
        return self._attempt(lambda: self._metric(key, value, step, timestamp), key)

    def log_metrics(self, metrics: Mapping[str, Any], step: Any = None, timestamp: Time | None = None) -> bool:
        """Log several metric points of one step and time; a value that is refused does not hold back the others.

        Args:
            metrics: values by key, as for ``log_metric``.
            step: as for ``log_metric``.
            timestamp: as for ``log_metric``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._metrics(metrics, step, timestamp))

    def _metric(self, key: object, value: object, step: object, timestamp: Time | None) -> bool:
        name = self._key(key, "metric")
        return self._keep(
            Metric(name, checked_value(name, value), self._time(name, timestamp), checked_step(name, step))
        )

    def _metrics(self, metrics: object, step: object, timestamp: Time | None) -> bool:
        given = checked_mapping(metrics, "log_metrics")
        whole_step = checked_step("log_metrics", step)
        time_ms = self._time("log_metrics", timestamp)
        good, whole = self._each(given.items(), "metric", checked_value)
        return (not good or self._keep(Metrics(good, time_ms, whole_step))) and whole

    # -- params and tags

    def log_param(self, key: str, value: Any) -> Any:
        """Log one parameter; its first value stays. Returns the value, as MLflow does.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        self._attempt(lambda: self._params([(key, value)]), key)
        return value

    def log_params(self, params: Mapping[str, Any]) -> bool:
        """Log parameters; the first value of each stays.

        Args:
            params: values by key; kept as text. MLflow keeps the first 6000 characters of a value.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._params(checked_mapping(params, "log_params").items()))

    def set_tag(self, key: str, value: Any) -> bool:
        """Set one tag; its last value stays.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._tags([(key, value)]), key)

    def set_tags(self, tags: Mapping[str, Any]) -> bool:
        """Set tags; the last value of each stays.

        Args:
            tags: values by key; kept as text. MLflow keeps the first 8000 characters of a value.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._tags(checked_mapping(tags, "set_tags").items()))

    def _params(self, given: Iterable[tuple[Any, Any]]) -> bool:
        good, whole = self._each(given, "param", self._param_text)
        return (not good or self._keep(Params(good, self._now_ms()))) and whole

    def _tags(self, given: Iterable[tuple[Any, Any]]) -> bool:
        good, whole = self._each(given, "tag", self._tag_text)
        return (not good or self._keep(Tags(good, self._now_ms()))) and whole

    def _param_text(self, key: str, value: object) -> str:
        return self._bounded(key, checked_text(key, value, "param"), "param", MAX_PARAM_CHARS)

    def _tag_text(self, key: str, value: object) -> str:
        return self._bounded(key, checked_text(key, value, "tag"), "tag", MAX_TAG_CHARS)

    def _bounded(self, key: str, text: str, what: str, limit: int) -> str:
        """Say that MLflow will cut a long value; the outbox keeps it whole, for it is MLflow that decides."""
        if len(text) > limit:
            self._counters.add("over_long_values")
            self._counters.warn_once(
                ("long", what, key),
                f"mlflow-outbox: the {what} {printable(key)!r} has {len(text)} characters; "
                f"MLflow keeps the first {limit}, or refuses it; log_text keeps all",
            )
        return text

    # -- files

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> bool:
        """Copy a file into the outbox, as it is now, for upload.

        Args:
            path: a regular file.
            artifact_path: folder for it among the run's artifacts; None is their root.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._file(path, artifact_path), _shown(path))

    def _file(self, path: str | os.PathLike[str], artifact_path: str | None) -> bool:
        folder = checked_artifact_path(artifact_path or "")
        name = os.path.basename(os.path.abspath(_path_text(path)))
        target = checked_artifact_path(posixpath.join(folder, name), what="file name")
        store = self._files()
        return store is not None and self._keep_file(
            target, store.add_file(path, limit=self._settings.artifact_bytes), store
        )

    def _each_file(self, path: str, artifact_path: str) -> bool:
        """Keep one file of several: one that is refused does not hold back the others, unless strict."""
        try:
            return self._file(path, artifact_path)
        except EventRefused as refused:
            if self._settings.strict:
                raise
            return self._refuse(refused, _shown(path))

    def _unreadable(self, error: OSError) -> None:
        msg = f"the directory {printable(error.filename)!r} cannot be read: {error.strerror}"
        refused = ArtifactRefused("bad_file", msg)
        if self._settings.strict:
            raise refused
        self._refuse(refused, _shown(error.filename))

    def log_artifacts(self, directory: str | os.PathLike[str], artifact_path: str | None = None) -> bool:
        """Copy all files of a directory and those below it; a file that is refused does not hold back the others.

        Args:
            directory: the directory; links to directories in it are not followed.
            artifact_path: folder for its content among the run's artifacts; None is their root.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """

        def log() -> bool:
            folder = checked_artifact_path(artifact_path or "")
            root = _path_text(directory)
            if not os.path.isdir(root):
                msg = f"{printable(root)!r} is not a directory; use log_artifact for a file"
                raise ArtifactRefused("bad_file", msg)
            results = [
                self._each_file(file, posixpath.join(folder, below) if below else folder)
                for file, below in _walk(root, self._unreadable)
            ]
            return all(results)

        return self._attempt(log)

    def log_text(self, text: str, artifact_file: str) -> bool:
        """Keep text as an artifact.

        Args:
            text: the content, written as UTF-8.
            artifact_file: its path among the run's artifacts, for instance ``"notes/reasoning.txt"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """

        def log() -> bool:
            if not isinstance(text, str):
                msg = f"log_text takes a string for {printable(artifact_file)!r}, not a {type(text).__name__}"
                raise InvalidEventType("bad_value", msg)
            return self._keep_bytes(text.encode("utf-8", "surrogatepass"), artifact_file)

        return self._attempt(log)

    def log_dict(self, dictionary: Any, artifact_file: str) -> bool:
        """Keep a mapping or list as a JSON artifact, or as YAML when the name ends so.

        Args:
            dictionary: anything that JSON can hold; NaN and infinities become null, other objects their text.
            artifact_file: its path among the run's artifacts, for instance ``"config.json"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """

        def log() -> bool:
            text = Reader().json_text(dictionary, _path_text(artifact_file))
            if text is None:
                msg = f"the object for {printable(artifact_file)!r} cannot be written as JSON"
                raise InvalidEventType("bad_value", msg)
            if str(artifact_file).lower().endswith((".yaml", ".yml")):
                import json

                import yaml  # a dependency of mlflow; nobody pays for it who does not ask for YAML

                text = yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True)
            return self._keep_bytes(text.encode("utf-8", "surrogatepass"), artifact_file)

        return self._attempt(log)

    def log_figure(self, figure: Any, artifact_file: str) -> bool:
        """Render a matplotlib or plotly figure, or save a PIL image, and keep it as an artifact.

        Args:
            figure: an object with ``savefig`` (matplotlib), ``to_html``/``to_image`` (plotly) or ``save`` (PIL).
            artifact_file: its path among the run's artifacts; the extension says the format, as in ``"loss.png"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._attempt(lambda: self._keep_bytes(_rendered(figure, artifact_file), artifact_file))

    def _files(self) -> SnapshotStore | None:
        if self._journal is None:
            return None
        try:
            folder = self._journal.directory.make_run(self.run_id)
        except OSError as error:
            msg = f"the outbox has no room for files: {error.strerror or error}"
            raise ArtifactRefused("no_room_for_file", msg) from None
        return SnapshotStore(folder, durable=self._settings.sync == "always")

    def _keep_bytes(self, data: bytes, artifact_file: object) -> bool:
        target = checked_artifact_path(_path_text(artifact_file), what="artifact file")
        if target in {"", "."}:
            msg = "the artifact file has no name; give one such as 'notes.txt'"
            raise InvalidEvent("bad_path", msg)
        store = self._files()
        return store is not None and self._keep_file(
            target, store.add_bytes(data, limit=self._settings.artifact_bytes, name=target), store
        )

    def _keep_file(self, target: str, kept: Snapshot, store: SnapshotStore) -> bool:
        if self._settings.sync == "interval" and self._journal is not None:
            self._journal.sync_later(store, kept.sha256)
        return self._keep(Artifact(target, kept.sha256, kept.size, self._now_ms()))

    # -- the end

    def end(self, status: str = "FINISHED", end_time: Time | None = None) -> bool:
        """End the run; logging afterwards still works, as in MLflow.

        Args:
            status: FINISHED, FAILED, KILLED, RUNNING or SCHEDULED.
            end_time: wall-clock time in milliseconds since the epoch, or a datetime; None is now.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """

        def log() -> bool:
            kept = self._keep(RunEnded(checked_status(status), self._time("end", end_time)))
            self._ended = True
            if self._journal is not None:
                self._journal.close()
            return kept

        return self._attempt(log)

    def begin(self, run_name: object, user: str, tags: Mapping[str, Any], time: Time | None, *, resumed: bool) -> bool:
        """Write the event with which a writer begins; called once, by the tracker.

        Args:
            run_name: its name, or None.
            user: who runs it.
            tags: first tags; one that is refused does not hold back the run.
            time: when it started; None is now.
            resumed: the run existed before.
        """
        time_ms = self._value(lambda: self._time("start_run", time))
        name = self._value(lambda: checked_text("run_name", run_name, "name")) if run_name is not None else None
        good = self._value(lambda: self._each(checked_mapping(tags, "tags").items(), "tag", self._tag_text)[0])
        who = user.encode("utf-8", "replace").decode()  # a name that is no Unicode must not cost the run its beginning
        event = RunStarted(self._now_ms() if time_ms is None else time_ms, name, who, good or {}, resumed)
        return self._attempt(lambda: self._keep(event))

    def _value(self, check: Callable[[], Any]) -> Any:
        """Return what a check returns; None when it refuses, which is counted and said."""
        try:
            return check()
        except EventRefused as refused:
            self._refuse(refused, "start_run")
            return None

    # -- common ground

    def _attempt(self, log: Callable[[], bool], about: object = "") -> bool:
        """Run one logging call; a refusal is counted and said once per reason and key, or raised when strict.

        Args:
            log: the call.
            about: the key, or path, that it is about.
        """
        try:
            return bool(log())
        except EventRefused as refused:
            return self._refuse(refused, about)
        except Exception as error:  # a logging call never raises into the experiment; counted and said
            if self._settings.strict:
                raise
            self._counters.add("internal_errors")
            self._counters.warn_once(
                ("internal", type(error), _about(about)),
                f"mlflow-outbox: a logging call failed: {printable(repr(error), 300)}",
            )
            return False

    def _refuse(self, refused: EventRefused, about: object) -> bool:
        if not isinstance(refused, OutboxFull):  # the journal has counted that
            self._counters.add(f"refused_{refused.reason}")
        if self._settings.strict:
            raise refused
        self._counters.warn_once((refused.reason, _about(about)), f"mlflow-outbox: not logged: {refused}")
        return False

    def _not_kept(self) -> bool:
        if self._settings.strict and self._journal is not None:
            reason = "full"
            msg = "the event was not kept: the disk or the outbox is full, or fails; see the warning before"
            raise OutboxFull(reason, msg)
        return False

    def _keep(self, event: Event) -> bool:
        return True if self._append_event(event) else self._not_kept()

    def _key(self, key: object, what: str) -> str:
        if type(key) is str and key in self._keys:
            return key
        name = checked_key(key, what)
        if len(self._keys) < _KEYS_REMEMBERED:
            self._keys.add(name)
        return name

    def _each(self, given: Iterable[tuple[Any, Any]], what: str, convert: Any) -> tuple[dict[str, Any], bool]:
        """Return the items that can be kept, and whether that is all of them; the others are refused one by one."""
        good: dict[str, Any] = {}
        first: EventRefused | None = None
        number = 0
        for key, value in given:
            number += 1
            try:
                name = self._key(key, what)
                good[name] = convert(name, value)
            except EventRefused as refused:
                if self._settings.strict:
                    first = first or refused
                else:
                    self._refuse(refused, key)
        if first is not None:
            raise first
        return good, len(good) == number

    def _time(self, what: str, given: Time | None) -> int:
        if given is None:
            return self._now_ms()
        if looks_like_seconds(given):
            self._counters.warn_once(
                ("seconds", what),
                f"mlflow-outbox: the time {given!r} of {printable(what)!r} looks like seconds; times are ms",
            )
        return checked_time_ms(what, given)

    @staticmethod
    def _now_ms() -> int:
        return _time_ns() // 1_000_000


def _append_nowhere(_: Event) -> bool:
    """Stand in for a journal when nothing can be kept; the tracker said so once."""
    return False


def _status_after(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and error.code in {None, 0}):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _about(key: object) -> str:
    """Return a key that a warning is remembered under; of what is no string, which may have no text, its type."""
    return key[:MAX_KEY_CHARS] if type(key) is str else type(key).__name__


def _shown(path: object) -> str:
    try:
        return printable(os.fspath(path))  # type: ignore[call-overload]
    except TypeError:
        return type(path).__name__


def _path_text(path: object) -> str:
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        msg = f"{printable(repr(path))} is no path but a {type(path).__name__}"
        raise InvalidEventType("bad_path", msg) from None
    return os.fsdecode(text)


def _walk(root: str, unreadable: Callable[[OSError], None]) -> Iterator[tuple[str, str]]:
    """Yield every file below root with its folder relative to root, in a stable order."""
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders.sort()
        below = os.path.relpath(folder, root)
        for name in sorted(files):
            yield os.path.join(folder, name), "" if below == "." else Path(below).as_posix()


def _rendered(figure: Any, artifact_file: object) -> bytes:
    """Return a figure as bytes in the format that the name's extension says."""
    kind = os.path.splitext(_path_text(artifact_file))[1].lower().lstrip(".")
    target = io.BytesIO()
    try:
        if hasattr(figure, "savefig"):
            figure.savefig(target, format=kind or "png", bbox_inches="tight")
            return target.getvalue()
        if kind in {"html", "htm"} and hasattr(figure, "to_html"):
            return str(figure.to_html(include_plotlyjs="cdn")).encode()
        if hasattr(figure, "to_image"):
            return bytes(figure.to_image(format=kind or "png"))
        if hasattr(figure, "save"):
            figure.save(target, format={"jpg": "jpeg"}.get(kind, kind or "png"))
            return target.getvalue()
    except Exception as error:  # noqa: BLE001 - any plotting library may raise anything; refused and counted
        msg = f"the figure for {printable(artifact_file)!r} could not be rendered: {printable(repr(error), 200)}"
        raise InvalidEvent("bad_figure", msg) from None
    msg = f"the figure for {printable(artifact_file)!r} is a {type(figure).__name__}; use a matplotlib or plotly figure"
    raise InvalidEventType("bad_figure", msg)
