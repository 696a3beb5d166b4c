"""The events with which a writer begins: the run's name, user, first tags and time, as far as they can be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlflow_outbox.doubts import Doubts
from mlflow_outbox.entries import Entries, pieces
from mlflow_outbox.refusals import Refusals
from mlflow_outbox.spool.events import NAME_TAG, Event, RunStarted, Tags
from mlflow_outbox.validation import checked_mapping


class Beginning:
    """Makes the first events of a writer; what of them is refused holds back nothing else.

    Args:
        entries: checks the tags.
        doubts: checks the name and the time.
        refusals: where what is refused ends.
    """

    def __init__(self, entries: Entries, doubts: Doubts, refusals: Refusals) -> None:
        self._entries = entries
        self._doubts = doubts
        self._refusals = refusals

    def events(
        self, run_name: object, user: str, tags: Mapping[str, Any], time: Any, now_ms: int, *, resumed: bool
    ) -> list[Event]:
        """Return the events, of which the first is that of the beginning.

        Args:
            run_name: the run's name, or None. Beside a tag of the same meaning, as MLflow does it, this one counts;
                a run that existed before is renamed.
            user: who runs it.
            tags: first tags.
            time: when it started; None is now.
            now_ms: wall-clock milliseconds since the epoch.
            resumed: the run existed before.

        Raises:
            EventRefused: only when strict.
        """
        given_ms = self._value(lambda: self._doubts.time_ms("start_run", time)) if time is not None else None
        name = self._value(lambda: self._doubts.name(run_name)) if run_name is not None else None
        given = self._value(lambda: checked_mapping(tags, "tags").items())
        good = self._value(lambda: self._entries.good(given or (), "tag", self._doubts.tag)[0]) or {}
        if name is not None and (resumed or NAME_TAG in good):
            good = {**good, NAME_TAG: name}
        who = user.encode("utf-8", "replace").decode()  # a name that is no Unicode must not cost the run its beginning
        first, *others = [*pieces(good)] or [{}]
        started = RunStarted(now_ms, name, who, first, resumed, given_ms=given_ms)
        return [started, *(Tags(more, now_ms) for more in others)]

    def _value(self, check: Callable[[], Any]) -> Any:
        """Return what a check returns; None when it refuses or fails, which is counted and said."""
        try:
            return check()
        except Exception as error:  # noqa: BLE001 - start_run never raises into the experiment; counted and said
            self._refusals.failed(error, "start_run")
            return None
