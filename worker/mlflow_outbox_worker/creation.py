"""Creates a run in MLflow, with what its database takes of a name and first tags."""

from __future__ import annotations

from collections.abc import Callable

from mlflow_outbox.spool.events import NAME_TAG, Tags, encode
from mlflow_outbox.validation import is_ordinary_tag, ordinary_name
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.requests import Parked, ask


class Creation:
    """Creates runs.

    Args:
        ledger: where dead letters are kept.
        refused: told of those that were made.
        now_ms: wall-clock milliseconds since the epoch.
    """

    def __init__(
        self, ledger: Ledger, refused: Callable[[list[DeadLetter]], None], *, now_ms: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._refused = refused
        self._now_ms = now_ms

    def create(
        self,
        record: RunRecord,
        name: str | None,
        tags: dict[str, str],
        attempt: Callable[[str | None, dict[str, str]], str],
    ) -> str:
        """Create a run, and return its id: without what only some databases keep, if it is refused with that.

        Those are tags that only a creation can set, and a name that is too long for a column, of which the beginning
        is kept. They are dead letters then, on disk before the run is created without them.

        Args:
            record: the run.
            name: its name; None lets MLflow choose one.
            tags: its first tags.
            attempt: creates it with a name and tags, and returns MLflow's id.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
        """
        ordinary = {key: value for key, value in tags.items() if is_ordinary_tag(key, value)}
        short = None if name is None else ordinary_name(name) or None
        if short is not None and NAME_TAG in tags:
            ordinary[NAME_TAG] = short
        note = f"without_odd_tags/{record.run_id}"
        is_plain = len(ordinary) == len(tags) and short == name
        if is_plain or not self._ledger.meta(note):
            try:
                return ask("create_run", lambda: attempt(name, tags))
            except Parked as parked:
                error = parked.error
                if is_plain or classify(error, "log_batch").kind != "dead_letter":
                    raise
            odd = {key: value for key, value in tags.items() if key not in ordinary}
            if name is not None and short != name:
                odd[NAME_TAG] = name
            letters = [
                DeadLetter(
                    run_id=record.run_id,
                    remote_id="",
                    payload=encode(Tags({key: value}, self._now_ms())),
                    reason=str(error),
                    code=error.code,
                    status=error.status,
                    time_ms=self._now_ms(),
                )
                for key, value in odd.items()
            ]
            record.dead += len(letters)
            self._ledger.commit(record, dead=letters)
            self._ledger.set_meta(note, b"1")
            self._refused(letters)
        return ask("create_run", lambda: attempt(short, ordinary))
