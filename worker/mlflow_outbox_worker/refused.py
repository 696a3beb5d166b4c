"""What MLflow refused for good of one window: the dead letters, and how many of its events they are.

Letters and events are counted apart, because one event can yield many letters (a call of ``log_params`` one for each of
its params) or one letter for a part of it. What counts as what:

* A *letter* is one thing that MLflow refused: a point, a param, a tag, a file, a status, a request or a part of one.
* An event is *dead* when all that it says was refused. Of every other one something has arrived, or something later
  stands in its place: it is *delivered*.

So of the events of a window each is delivered or dead, and neither number can be less than nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mlflow_outbox.spool.events import Artifact, Event, FileFor, Metric, Metrics, Params, Request, RunEnded, Tags
from mlflow_outbox_worker.records import DeadLetter

#: One thing that an event says; never equal for two that differ.
_Part = tuple[object, ...]


class Refused:
    """Collects what is refused while a window is sent.

    Attributes:
        letters: in the order of the refusals.
    """

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        self._parts: set[_Part] = set()

    def add(self, event: Event, letter: DeadLetter) -> None:
        """Take a refusal into account.

        Args:
            event: what was refused: an event of the window, or a part of one or several.
            letter: for the queue.
        """
        self.letters.append(letter)
        if not isinstance(event, Request):
            self._parts.update(_parts(event))

    def add_request(self, request: Request) -> None:
        """Note that all parts of a request were refused, for each of which there is a letter."""
        self._parts.update(_parts(request))

    def take(self, other: Refused) -> None:
        """Take what was refused of another part of the window into account, behind what was refused before."""
        self.letters += other.letters
        self._parts |= other._parts

    def dead(self, events: Sequence[tuple[str, Event]]) -> int:
        """Return how many of a window's events were refused as a whole."""
        return sum(self._is_dead(event) for _, event in events) if self._parts else 0

    def _is_dead(self, event: Event) -> bool:
        parts = set(_parts(event))
        return bool(parts) and parts <= self._parts


def _parts(event: Event) -> Iterator[_Part]:
    """Yield what an event says; nothing for one that cannot be refused, as the start of a run."""
    if isinstance(event, Metric):
        yield _point(event.key, event.value, event.time_ms, event.step)
    elif isinstance(event, Metrics):
        for key, value in event.values.items():
            yield _point(key, value, event.time_ms, event.step)
    elif isinstance(event, (Params, Tags)):
        yield from _labels(type(event), event.values.items())
    elif isinstance(event, RunEnded):
        yield RunEnded, event.status, event.time_ms
    elif isinstance(event, (Artifact, FileFor)):
        yield (event,)
    elif isinstance(event, Request):
        yield Request, id(event)  # of a window, which is there as long as this is; two can be equal


def _point(key: str, value: float, time_ms: int, step: int) -> _Part:
    return Metric, key, repr(value), time_ms, step  # not a number is equal to nothing, as text it is


def _labels(kind: type, items: Iterable[tuple[str, str]]) -> Iterator[_Part]:
    return ((kind, key, value) for key, value in items)
