"""A run as the experiment holds it: every method writes to the journal and returns.

No method raises (unless ``Settings(strict=True)``), waits for MLflow, or imports anything. What cannot be kept is
refused with one warning per kind and key, and counted.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlflow_outbox import handles
from mlflow_outbox.beginning import Beginning
from mlflow_outbox.counters import Counters, shown
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.doubts import Doubts
from mlflow_outbox.entries import Entries, pieces
from mlflow_outbox.errors import EventRefused, OutboxFull
from mlflow_outbox.files import RunFiles, files_below, shown_path
from mlflow_outbox.refusals import Refusals
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.events import (
    GOING_ON,
    INT64_MAX,
    INT64_MIN,
    Event,
    Metric,
    Metrics,
    Params,
    RunEnded,
    Tags,
)
from mlflow_outbox.validation import (
    checked_mapping,
    checked_status,
    checked_step,
    checked_value,
    status_after,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlflow_outbox.spool.journal import Journal

Time = int | float | dt.datetime

_time_ns = time.time_ns


class Run(handles.Handle):
    """One run. Made by ``MLflowTracker.start_run``; may be used from any thread, in forked processes, and pickled.

    Used as a context manager it ends FINISHED, FAILED when an exception leaves the block, or KILLED on
    KeyboardInterrupt; as it was ended, if it was ended within.

    Attributes:
        run_id: the run's id in the outbox, 32 hex digits; MLflow's own id when the run is one that existed in MLflow.
    """

    def __init__(self, journal: Journal | None, run_id: str, settings: Settings, counters: Counters) -> None:
        self.run_id = run_id
        self._journal = journal
        self._settings = settings
        self._ended = False
        self._doubts = Doubts(counters)
        self._refusals = Refusals(counters, strict=settings.strict)
        self._entries = Entries(self._refusals)
        self._beginning = Beginning(self._entries, self._doubts, self._refusals)
        self._keys = self._entries.keys
        self._good = self._entries.good  # held like _append_event below: a look-up less in each call
        self._files = RunFiles(journal, settings, self._now_ms, self._doubts.unreadable)
        self._append_event = journal.append if journal is not None else _append_nowhere
        if journal is not None:  # a run that is dropped and not ended gives its descriptor back all the same
            weakref.finalize(self, journal.leave).atexit = False

    def __repr__(self) -> str:
        return f"<Run {self.run_id}, {'ended' if self._ended else 'running'}>"

    def __reduce__(self) -> tuple[Callable[..., Run], tuple[Any, ...]]:
        journal = self._journal
        path, identity = (journal.directory.path, tuple(journal.run)) if journal is not None else ("", (self.run_id,))
        return _rejoined, (str(path), identity, handles.noted(self._settings), self._ended)

    def __enter__(self) -> Self:
        self._ended = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self.end(status_after(error))
        elif self._journal is not None:  # logged to since
            self._journal.close()

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
            try:
                now = _time_ns()
                event: Event = Metric(key, value, now // 1_000_000, step)
                kept = self._append_event(event)
                if now >= courtesy.due:
                    courtesy.give_way(now)
                return True if kept else self._not_kept()
            except MemoryError as error:  # whatever else is raised here is a signal handler's, and meant for its host
                return self._refusals.failed(error, key)
        try:
            return self._metric(key, value, step, timestamp)
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self._refusals.failed(error, key)

    def log_metrics(self, metrics: Mapping[str, Any], step: Any = None, timestamp: Time | None = None) -> bool:
        """Log several metric points of one step and time; a value that is refused does not hold back the others.

        Args:
            metrics: values by key, as for ``log_metric``.
            step: as for ``log_metric``.
            timestamp: as for ``log_metric``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        try:
            return self._metrics(metrics, step, timestamp)
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self._refusals.failed(error)

    def _metric(self, key: object, value: object, step: object, timestamp: Time | None) -> bool:
        name = key if type(key) is str and key in self._keys else self._entries.key(key, "metric")
        return self._keep(
            Metric(name, checked_value(name, value), self._time(name, timestamp), checked_step(name, step))
        )

    def _metrics(self, metrics: object, step: object, timestamp: Time | None) -> bool:
        good = checked_mapping(metrics, "log_metrics")
        plain_step = type(step) is int and INT64_MIN <= step <= INT64_MAX
        whole_step: Any = step if plain_step else checked_step("log_metrics", step)
        now = _time_ns()
        time_ms = now // 1_000_000 if timestamp is None else self._time("log_metrics", timestamp)
        known, whole = self._keys, True
        for key, value in good.items():  # most often all is as it should be, and nothing needs to be made of it
            if type(value) is not float or type(key) is not str or key not in known:
                good, whole = self._good(good.items(), "metric", checked_value, float)
                break
        kept = not good or self._keep(Metrics(good, time_ms, whole_step))
        if now >= courtesy.due:
            courtesy.give_way(now)
        return kept and whole

    # -- params and tags

    def log_param(self, key: str, value: Any) -> Any:
        """Log one parameter; its first value stays. Returns the value, as MLflow does.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        try:
            self._params([(key, value)])
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            self._refusals.failed(error, key)
        return value

    def log_params(self, params: Mapping[str, Any]) -> bool:
        """Log parameters; the first value of each stays.

        Args:
            params: values by key; kept as text. MLflow keeps the first 6000 characters of a value.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        try:
            return self._params(checked_mapping(params, "log_params").items())
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self._refusals.failed(error)

    def set_tag(self, key: str, value: Any) -> bool:
        """Set one tag; its last value stays.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        try:
            return self._tags([(key, value)])
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self._refusals.failed(error, key)

    def set_tags(self, tags: Mapping[str, Any]) -> bool:
        """Set tags; the last value of each stays.

        Args:
            tags: values by key; kept as text. MLflow keeps the first 8000 characters of a value.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        try:
            return self._tags(checked_mapping(tags, "set_tags").items())
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self._refusals.failed(error)

    def _params(self, given: Iterable[tuple[Any, Any]]) -> bool:
        good, whole = self._good(given, "param", self._doubts.param)
        return self._keep_texts(Params, good) and whole

    def _tags(self, given: Iterable[tuple[Any, Any]]) -> bool:
        good, whole = self._good(given, "tag", self._doubts.tag)
        return self._keep_texts(Tags, good) and whole

    def _keep_texts(self, kind: type[Params | Tags], good: dict[str, str]) -> bool:
        if len(good) <= 1:
            return not good or self._keep(kind(good, self._now_ms()))
        kept = [self._keep(kind(piece, self._now_ms())) for piece in pieces(good)]
        return all(kept)

    # -- files

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> bool:
        """Copy a file into the outbox, as it is now, for upload.

        Args:
            path: a regular file.
            artifact_path: folder for it among the run's artifacts; None is their root.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._refusals.attempt(
            lambda: self._files.copy(path, artifact_path) or self._not_kept(),
            (shown_path(path), "" if artifact_path is None else shown_path(artifact_path)),
        )

    def log_artifacts(self, directory: str | os.PathLike[str], artifact_path: str | None = None) -> bool:
        """Copy all files of a directory and those below it; a file that is refused does not hold back the others.

        Args:
            directory: the directory; links to directories in it are not followed, and outboxes in it are left out.
            artifact_path: folder for its content among the run's artifacts; None is their root.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """

        def log() -> bool:
            found = files_below(directory, artifact_path, self._refusals.pass_over)
            kept = [self._each_file(file, folder) for file, folder in found]
            return all(kept)

        return self._refusals.attempt(log, shown_path(directory))

    def log_text(self, text: str, artifact_file: str) -> bool:
        """Keep text as an artifact.

        Args:
            text: the content, written as UTF-8.
            artifact_file: its path among the run's artifacts, for instance ``"notes/reasoning.txt"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._refusals.attempt(
            lambda: self._files.text(text, artifact_file) or self._not_kept(), shown_path(artifact_file)
        )

    def log_dict(self, dictionary: Any, artifact_file: str) -> bool:
        """Keep a mapping or list as a JSON artifact, or as YAML when the name ends so.

        Args:
            dictionary: anything that JSON can hold; NaN and infinities become null, other objects their text.
            artifact_file: its path among the run's artifacts, for instance ``"config.json"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._refusals.attempt(
            lambda: self._files.document(dictionary, artifact_file) or self._not_kept(), shown_path(artifact_file)
        )

    def log_figure(self, figure: Any, artifact_file: str) -> bool:
        """Render a matplotlib or plotly figure, or save a PIL image, and keep it as an artifact.

        Args:
            figure: an object with ``savefig`` (matplotlib), ``to_html``/``to_image`` (plotly) or ``save`` (PIL).
            artifact_file: its path among the run's artifacts; the extension says the format, as in ``"loss.png"``.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        return self._refusals.attempt(
            lambda: self._files.figure(figure, artifact_file) or self._not_kept(), shown_path(artifact_file)
        )

    def _each_file(self, path: str, folder: str) -> bool:
        """Keep one file of several: one that is refused does not hold back the others, unless strict."""
        try:
            return self._files.copy(path, folder) or self._not_kept()
        except EventRefused as refused:
            return self._refusals.pass_over(refused, shown_path(path))

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
            how = checked_status(status)
            given_ms = None
            try:
                given_ms = self._doubts.time_ms("end", end_time) if end_time is not None else None
            except EventRefused as refused:  # which must not cost the run its end
                self._refusals.pass_over(refused, "end")
            kept = self._keep(RunEnded(how, self._now_ms(), given_ms))
            self._ended = how not in GOING_ON
            if self._journal is not None:
                self._journal.close()
            return kept

        return self._refusals.attempt(log, shown(status))

    def begin(self, run_name: object, user: str, tags: Mapping[str, Any], time: Time | None, *, resumed: bool) -> bool:
        """Write the events with which a writer begins; called once, by the tracker.

        Args:
            run_name: its name, or None.
            user: who runs it.
            tags: first tags; one that is refused does not hold back the run.
            time: when it started; None is now.
            resumed: the run existed before.
        """
        events = self._beginning.events(run_name, user, tags, time, self._now_ms(), resumed=resumed)
        kept = [self._refusals.attempt(functools.partial(self._keep, event)) for event in events]
        return all(kept)

    # -- common ground

    def _not_kept(self) -> bool:
        if self._settings.strict and self._journal is not None:
            reason = "full"
            msg = "the event was not kept: the disk or the outbox is full, or fails; see the warning before"
            raise OutboxFull(reason, msg)
        return False

    def _keep(self, event: Event) -> bool:
        return True if self._append_event(event) else self._not_kept()

    def _time(self, what: str, given: Time | None) -> int:
        return self._now_ms() if given is None else self._doubts.time_ms(what, given)

    @staticmethod
    def _now_ms() -> int:
        return _time_ns() // 1_000_000


def _rejoined(path: str, identity: tuple[Any, ...], note: dict[str, Any], ended: bool) -> Run:  # noqa: FBT001 - of a pickle
    journal, settings, counters = handles.rejoined(path, identity, note)
    run = Run(journal, identity[0], settings, counters)
    run._ended = ended  # noqa: SLF001 - its own class's
    return run


def _append_nowhere(_: Event) -> bool:
    """Stand in for a journal when nothing can be kept; the tracker said so once."""
    return False
