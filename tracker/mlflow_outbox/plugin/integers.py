"""Steps and times as the journal holds them: whole numbers of 64 bits, whatever kind of number the program gave.

MLflow's client for a tracking server puts them into the fields of a message, which takes the whole numbers of any
library and refuses everything else with an error of its own. So the message is the judge here too: what it raises is
what the plain URI raises. The stores of a database or a directory take nearly every number. Of those the journal has
what comes before the decimal point, as it is read from most of these stores; one that has no such form (not a number,
an infinity, more than 64 bits) is refused at the call, because it can be neither kept nor sent.
"""

from __future__ import annotations

import copy
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_outbox.spool.events import INT64_MAX, INT64_MIN


class Integers:
    """Makes whole numbers as one tracking URI takes them.

    Args:
        embedded: the store is a database or a directory, and no server.

    Attributes:
        embedded: as given.
    """

    def __init__(self, *, embedded: bool) -> None:
        self.embedded = embedded

    def whole(self, value: Any, message: Any, field: str) -> int:
        """Return a step or a time.

        Args:
            value: what the program gave.
            message: the class of the message in which MLflow's client would send it.
            field: its name there.

        Raises:
            TypeError: it is no whole number, and MLflow's client takes nothing else.
            ValueError: it has more than 64 bits, and MLflow's client says so.
            MlflowException: the store behind would not take it, or the journal cannot hold it.
        """
        if type(value) is int and INT64_MIN <= value <= INT64_MAX:
            return value
        if not self.embedded:
            filled = message()
            setattr(filled, field, value)
            return int(getattr(filled, field))
        try:
            number = int(value) if not isinstance(value, (str, bytes, bytearray)) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not INT64_MIN <= number <= INT64_MAX:
            raise MlflowException.invalid_parameter_value(
                f"Invalid value {value} for parameter '{field}' supplied: "
                f"{field.capitalize()} must be a valid long (64-bit integer)."
            )
        return number

    def point(self, metric: Any, message: Any) -> Any:
        """Return a metric with a step and a time that the journal holds, the same one if it has them; see ``whole``."""
        timestamp = self.whole(metric.timestamp, message, "timestamp")
        step = self.whole(metric.step, message, "step")
        if timestamp is metric.timestamp and step is metric.step:
            return metric
        taken = copy.copy(metric)
        taken._timestamp, taken._step = timestamp, step
        return taken
