"""Events that wait in memory while the disk takes none: the oldest first, bounded in bytes.

An exception from a signal handler may arrive between any two calls, so the event that is on its way from here to the
file is noted with the number it gets: afterwards the writer's next number says whether it arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class MemoryRing:
    """Payloads that the disk has not taken yet.

    Args:
        most: bytes that it holds at most; what was written once and comes back may go beyond.
        payloads: what it holds from the beginning.
    """

    def __init__(self, most: int, payloads: Sequence[bytes] = ()) -> None:
        self._most = most
        self._payloads = deque(payloads)
        self._bytes = sum(map(len, payloads))
        self._going: tuple[bytes, int] | None = None  # from here to the file: payload, and the number it gets

    def __len__(self) -> int:
        return len(self._payloads)

    def add(self, payload: bytes) -> bool:
        """Keep one more event; return False when it does not fit."""
        if self._bytes + len(payload) > self._most:
            return False
        self._payloads.append(payload)
        self._bytes += len(payload)
        return True

    def behind(self, payloads: Sequence[bytes]) -> MemoryRing:
        """Return a ring that holds some payloads, and behind them what this one holds."""
        return MemoryRing(self._most, [*payloads, *self._payloads])

    def send(self, number: int) -> bytes:
        """Return the oldest payload, which is about to be written under a number."""
        head = self._payloads[0]
        self._going = (head, number)
        return head

    def sent(self) -> None:
        """Forget the oldest payload: it was written."""
        head = self._payloads.popleft()
        self._going = None
        self._bytes = self._bytes - len(head) if self._payloads else 0

    def settle(self, number: int) -> None:
        """Forget a payload that was on its way and was written, as the next number of the file shows."""
        if self._going is None:
            return
        head, given = self._going
        if self._payloads and self._payloads[0] is head and number > given:
            self._payloads.popleft()
        self._bytes = sum(map(len, self._payloads))
        self._going = None
