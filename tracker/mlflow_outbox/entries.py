"""Keys with their values, as one call gives them: each is checked for itself, and holds back no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from mlflow_outbox.errors import EventRefused
from mlflow_outbox.refusals import Refusals
from mlflow_outbox.validation import checked_key

#: Keys that were checked already, per run; more than these are checked at each call.
_KEYS_REMEMBERED: Final = 10_000

#: Characters of values that one event holds: with four bytes each, and a value of the longest more, it fits a frame.
_EVENT_CHARS: Final = 2_000_000


def pieces(texts: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield texts by key in as many parts as events are needed to hold them: most often one, of nothing none."""
    size, piece = 0, dict[str, str]()
    for key, text in texts.items():
        if size + len(text) > _EVENT_CHARS and piece:
            yield piece
            size, piece = 0, {}
        size += len(text)
        piece[key] = text
    if piece:
        yield piece


class Entries:
    """Checks the entries of calls, and remembers the keys that were found good.

    Args:
        refusals: where a refused entry ends.

    Attributes:
        keys: those that were found good.
    """

    def __init__(self, refusals: Refusals) -> None:
        self.keys: set[str] = set()
        self._refusals = refusals

    def key(self, key: object, what: str) -> str:
        """Return a key that was checked, which is remembered.

        Args:
            key: what the caller gave.
            what: "metric", "param" or "tag".

        Raises:
            EventRefused: it is none.
        """
        name = checked_key(key, what)
        if len(self.keys) < _KEYS_REMEMBERED:
            self.keys.add(name)
        return name

    def good(
        self, given: Iterable[tuple[Any, Any]], what: str, convert: Any, exact: type | None = None
    ) -> tuple[dict[str, Any], bool]:
        """Return the items that can be kept, and whether that is all of them; the others are refused one by one.

        Args:
            given: keys and values.
            what: "metric", "param" or "tag".
            convert: makes of a key and its value what is kept.
            exact: the type of values that are kept as they are.

        Raises:
            EventRefused: the first refusal, only when strict.
        """
        good: dict[str, Any] = {}
        first: EventRefused | None = None
        number, known = 0, self.keys
        for key, value in given:
            number += 1
            try:
                name = key if type(key) is str and key in known else self.key(key, what)
                good[name] = value if type(value) is exact else convert(name, value)
            except EventRefused as refused:
                if self._refusals.strict:
                    first = first or refused
                else:
                    self._refusals.refuse(refused, key)
        if first is not None:
            raise first
        return good, len(good) == number
