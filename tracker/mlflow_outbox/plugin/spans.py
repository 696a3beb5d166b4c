"""The spans of this process's latest traces, with which a trace is answered for while it is on its way.

What was delivered is the server's to answer, so it is held no longer than until that is noticed: whenever some more
megabytes are held, and when the store is put to rest. What waits is bounded in number and in bytes, but for the trace
that was written last, of which a part would be no answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from mlflow_outbox.plugin.trace_rooms import Place, arrived

if TYPE_CHECKING:
    from mlflow.entities import Span

    from mlflow_outbox.outbox import Outbox

#: Traces that are held, and bytes of all of them as the journal has them.
_MOST: Final = 256
_MOST_BYTES: Final = 64 * 1024 * 1024
#: Bytes of new spans after which those that were delivered are looked for.
_LOOK: Final = 4 * 1024 * 1024


class _Held:
    """The spans of one trace, by id, with the bytes of each."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[Span, int]] = {}
        self.place: Place | None = None


class Spans:
    """The spans of this process that may still be on their way.

    Args:
        outbox: the outbox.

    Attributes:
        size: bytes of all that are held.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._traces: OrderedDict[str, _Held] = OrderedDict()
        self.size = 0
        self._look_at = _LOOK
        self._lock = threading.RLock()  # a signal handler may trace while its thread is in here

    def __len__(self) -> int:
        return len(self._traces)

    def forked(self) -> None:
        """Renew the lock in a forked child, where the thread that held it is not."""
        self._lock = threading.RLock()

    def add(self, spans: list[Span], size: int, place: Place) -> None:
        """Hold spans that were just written.

        Args:
            spans: at least one.
            size: bytes of all of them.
            place: where they were written.
        """
        share = size // len(spans)
        with self._lock:
            for span in spans:
                held = self._traces.setdefault(span.trace_id, _Held())
                _, before = held.spans.get(span.span_id, (None, 0))
                held.spans[span.span_id] = span, share
                held.place = place
                self.size += share - before
                self._traces.move_to_end(span.trace_id)
            while len(self._traces) > _MOST or (self.size > _MOST_BYTES and len(self._traces) > 1):
                self._drop(next(iter(self._traces)))
        if self.size >= self._look_at:
            self.forget_arrived()

    def follow(self, trace_id: str, place: Place) -> None:
        """Take note that something else of a trace was written, without which the server cannot answer for it."""
        with self._lock:
            held = self._traces.get(trace_id)
            if held is not None:
                held.place = place

    def of(self, trace_id: str) -> list[Span] | None:
        """Return the spans of a trace as a server gives them, the root first, or None when none is held."""
        with self._lock:
            held = self._traces.get(trace_id)
            spans = [span for span, _ in held.spans.values()] if held is not None else None
        if spans is not None:  # they were written as they ended, the root last
            spans.sort(key=lambda span: (span.parent_id is not None, span.start_time_ns))
        return spans

    def forget_arrived(self) -> None:
        """Let go of the traces that the server has."""
        with self._lock:
            places = {trace_id: held.place for trace_id, held in self._traces.items() if held.place is not None}
        there = arrived(self._outbox, places)
        with self._lock:
            for trace_id in there:
                held = self._traces.get(trace_id)
                if held is not None and held.place == places[trace_id]:  # nothing was written of it meanwhile
                    self._drop(trace_id)
            self._look_at = self.size + _LOOK

    def forget(self, trace_ids: Iterable[str]) -> None:
        """Let go of traces that were deleted."""
        with self._lock:
            for trace_id in trace_ids:
                if trace_id in self._traces:
                    self._drop(trace_id)

    def _drop(self, trace_id: str) -> None:
        held = self._traces.pop(trace_id)
        self.size -= sum(size for _, size in held.spans.values())
