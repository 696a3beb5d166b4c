"""What ids have become: provisional ones lead to MLflow's, and these back to the journals begun under others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from mlflow_outbox import delivery
from mlflow_outbox.spool import provisional

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox


class NotYet(Exception):
    """Raised when something that exists only here is to be named to the server."""


class Ids:
    """The map of one outbox between provisional ids and MLflow's; what is known is remembered.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._remote: dict[str, str] = {}
        self._local: dict[str, str] = {}
        self._lock = threading.Lock()

    def remote(self, given: str) -> str:
        """Return MLflow's id of a run, model or experiment.

        Raises:
            NotYet: it has none yet.
        """
        if not provisional.is_provisional(given):
            return self._remote.get(given, given)
        found = self._remote.get(given) or self._ask(given)
        if not found:
            raise NotYet(given)
        self._remote[given] = found
        return found

    def has_moved(self, given: str) -> bool:
        """Return whether the id that MLflow gave to a run or model has become another one: it was sent once more.

        Only to be asked when MLflow does not know an id, because that takes a look at the worker's notes.
        """
        before = self._remote.pop(given, given)
        found = self._ask(given)
        if found:
            self._remote[given] = found
        return bool(found) and found != before

    def _ask(self, given: str) -> str:
        reading = delivery.reading(self._outbox)
        if given.isdigit():
            return str(reading.meta(f"experiment/{given}"))
        if given.startswith("m-"):
            return str(reading.meta(f"model/{given}"))
        return str(reading.remote_id(given))

    def local(self, given: str) -> str:
        """Return the id under which this outbox keeps a run: the provisional one, if it began with one."""
        if provisional.is_provisional(given):
            return given
        held = self._local.get(given)
        if held is None:
            held = delivery.reading(self._outbox).local_id(given) or given
            self._local[given] = held
        return held

    def remember(self, given: str) -> None:
        """Take note that a run was made by the server and is kept under its id."""
        self._local[given] = given

    def outgoing(self, value: Any) -> Any:
        """Return a value (texts, lists and mappings of them) with MLflow's ids in place of provisional ones.

        Raises:
            NotYet: one of them has none yet.
        """
        if isinstance(value, str):
            if not provisional.PATTERN.search(value):
                return value  # as it is: members of MLflow's enumerations are strings too
            return provisional.PATTERN.sub(lambda found: self.remote(found.group()), value)
        if isinstance(value, list):
            return [self.outgoing(item) for item in value]
        if isinstance(value, dict):
            return {key: self.outgoing(item) for key, item in value.items()}
        return value
