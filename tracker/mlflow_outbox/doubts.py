"""What is kept although it can hardly be meant so, or without what could not be read; each is said once."""

from __future__ import annotations

from typing import Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.spool.events import MAX_NAME_CHARS, MAX_PARAM_CHARS, MAX_TAG_CHARS
from mlflow_outbox.spool.provisional import RUN_ID_TAG
from mlflow_outbox.validation import checked_text, checked_time_ms, looks_like_seconds

#: Characters of a value or name that are kept, a hundred times what MLflow keeps of one: it must not fill an event.
_LONGEST: Final = 1_000_000


class Doubts:
    """Checks values that may be doubtful, and says so.

    Args:
        counters: where over-long values and unreadable ones are counted, and all is said.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def param(self, key: str, value: object) -> str:
        """Return a parameter's value as text.

        Raises:
            EventRefused: it has none.
        """
        return self._bounded(key, checked_text(key, value, "param"), "param", MAX_PARAM_CHARS)

    def tag(self, key: str, value: object) -> str:
        """Return a tag's value as text.

        Raises:
            EventRefused: it has none, or the tag is the one by which a run is found in MLflow.
        """
        if key == RUN_ID_TAG:
            msg = f"the tag {key!r} is how a run of the outbox is found in MLflow, and cannot be set; leave it out"
            raise InvalidEvent("bad_key", msg)
        return self._bounded(key, checked_text(key, value, "tag"), "tag", MAX_TAG_CHARS)

    def name(self, name: object) -> str:
        """Return a run's name.

        Raises:
            EventRefused: it has no text.
        """
        text = checked_text("run_name", name, "name")
        if len(text) > MAX_NAME_CHARS:
            self._counters.add("over_long_values")
            self._counters.warn_once(
                ("long", "name", text[:MAX_NAME_CHARS]),
                f"mlflow-outbox: the run name {printable(text, 80)!r} has {len(text)} characters; most of MLflow's "
                f"databases take {MAX_NAME_CHARS}, and where one refuses it the run gets its beginning for a name",
            )
        return text[:_LONGEST]

    def _bounded(self, key: str, text: str, what: str, limit: int) -> str:
        """Say that MLflow will cut a long value; the outbox keeps as much, for it is MLflow that decides."""
        if len(text) > limit:
            self._counters.add("over_long_values")
            self._counters.warn_once(
                ("long", what, key),
                f"mlflow-outbox: the {what} {printable(key)!r} has {len(text)} characters; "
                f"MLflow keeps the first {limit}, or refuses it; log_text keeps all",
            )
        return text[:_LONGEST]

    def unreadable(self, thing: str, reason: str) -> None:
        """Count and say that something could not be read, and is left out of what holds it.

        Args:
            thing: what.
            reason: why.
        """
        self._counters.add("unreadable_fields")
        self._counters.warn_once(("field", thing), f"mlflow-outbox: {printable(thing, 160)} is not logged: {reason}")

    def time_ms(self, what: str, time: object) -> int:
        """Return a time as milliseconds since the epoch.

        Args:
            what: the key, or the call, that it was given for.
            time: an int or float of milliseconds, or a datetime.

        Raises:
            EventRefused: it is none.
        """
        if looks_like_seconds(time):
            self._counters.warn_once(
                ("seconds", what),
                f"mlflow-outbox: the time {time!r} of {printable(what)!r} looks like seconds; times are ms",
            )
        return checked_time_ms(what, time)
