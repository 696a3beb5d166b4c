"""Where the traces of this process are: what changes one that has not arrived yet has to follow it in its room.

Rooms are delivered side by side, so a change in another room would be there before its trace, which the server does
not know then. So a trace is remembered until it was delivered; from then on any room will do. Of more than memory is to
be spent on, as in a service whose server is away for days, the latest are, and of the others only of which experiments
they are: of one, as a rule, and then its room is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from mlflow_outbox import delivery
from mlflow_outbox.spool.frame import SEQUENCE_MASK

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.plugin.journals import OpenRun

#: Traces that are remembered without a look at what was delivered, and at the most: some 230 bytes of memory each.
_REMEMBERED: Final = 256
_MOST: Final = 100_000


class Place(NamedTuple):
    """Where something of a trace was written: up to an event of a writer, in the room of an experiment."""

    experiment: str
    room: str
    writer: str
    end: int


def place_in(experiment: str, room: OpenRun) -> Place:
    """Return the place of what was just written to the room of an experiment."""
    return Place(experiment, room.run_id, room.journal.writer, room.journal.events)


def arrived(outbox: Outbox, places: Mapping[str, Place]) -> list[str]:
    """Return those keys of places up to which all was delivered, after one look at the ledger for each room."""
    reading = delivery.reading(outbox)
    reached = {room: reading.reached(room) for room in {place.room for place in places.values()}}
    return [
        key
        for key, place in places.items()
        if (reached[place.room].get(place.writer, 0) - place.end) & SEQUENCE_MASK < 1 << 31
    ]


class TraceRooms:
    """The traces of this process that may still be on their way.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._places: dict[str, Place] = {}
        self._most = _REMEMBERED
        #: Of the traces that were forgotten before they had arrived the last one's place, by experiment.
        self._behind: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def remember(self, trace_id: str, place: Place) -> None:
        """Take note of where a trace was just written."""
        self._places[trace_id] = place
        if len(self._places) > self._most:
            for there in arrived(self._outbox, dict(self._places)):
                self._places.pop(there, None)
            for there in arrived(self._outbox, dict(self._behind)):
                self._behind.pop(there, None)
            for earlier in list(self._places)[: -(_MOST // 2)]:
                gone = self._places.pop(earlier, None)  # another thread may be at it too
                if gone is not None:
                    self._behind[gone.experiment] = gone
            self._most = max(_REMEMBERED, 2 * len(self._places))  # so that looking costs little for each trace

    def forget(self, trace_ids: Iterable[str]) -> None:
        """Take note that traces were deleted."""
        for trace_id in trace_ids:
            self._places.pop(trace_id, None)

    def on_their_way(self, trace_ids: Iterable[str]) -> list[str]:
        """Return those of some traces that have not arrived, as far as this machine knows."""
        places = {one: place for one in trace_ids if (place := self._places.get(one)) is not None}
        there = set(arrived(self._outbox, places)) if places else set()
        return [one for one in places if one not in there]

    def experiment(self, trace_id: str) -> str:
        """Return the experiment of a trace, or "" when it is none of this process or was delivered."""
        place = self._places.get(trace_id)
        return place.experiment if place is not None else ""

    def home(self, trace_id: str) -> str:
        """Return the experiment in whose room a change of a trace follows it, or "" where that is not known."""
        others = list(self._behind)
        return self.experiment(trace_id) or (others[0] if len(others) == 1 else "")
