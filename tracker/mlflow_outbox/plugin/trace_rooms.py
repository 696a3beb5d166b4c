"""Where the traces of this process are: what changes one that has not arrived yet has to follow it in its room.

Rooms are delivered side by side, so a change in another room would be there before its trace, which the server does
not know then. So a trace is remembered until it was delivered, however many wait; from then on any room will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mlflow_outbox import delivery
from mlflow_outbox.spool.frame import SEQUENCE_MASK

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.plugin.journals import OpenRun

#: Traces that are remembered without a look at what was delivered.
_REMEMBERED: Final = 256


class _Place(NamedTuple):
    experiment: str
    room: str
    writer: str
    end: int


class TraceRooms:
    """The traces of this process that may still be on their way.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._places: dict[str, _Place] = {}
        self._most = _REMEMBERED

    def __len__(self) -> int:
        return len(self._places)

    def remember(self, trace_id: str, experiment: str, room: OpenRun) -> None:
        """Take note of a trace that was just written to the room of its experiment."""
        self._places[trace_id] = _Place(experiment, room.run_id, room.journal.writer, room.journal.events)
        if len(self._places) > self._most:
            self._forget()
            self._most = max(_REMEMBERED, 2 * len(self._places))  # so that looking costs little for each trace

    def experiment(self, trace_id: str) -> str:
        """Return the experiment of a trace, or "" when it is none of this process or was delivered."""
        place = self._places.get(trace_id)
        return place.experiment if place is not None else ""

    def _forget(self) -> None:
        reading = delivery.reading(self._outbox)
        places = list(self._places.items())
        reached = {place.room: reading.reached(place.room) for _, place in places}
        for trace_id, place in places:
            number = reached[place.room].get(place.writer, 0)
            if (number - place.end) & SEQUENCE_MASK < 1 << 31:
                self._places.pop(trace_id, None)
