"""Objects that are in use, none of which is kept alive by that.

In place of ``weakref.WeakSet``, which is looked through by code of Python's: another thread that adds to it meanwhile
makes that raise.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """A set of objects that are there as long as somebody else has them; may be used from any thread."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def __bool__(self) -> bool:
        return bool(self.members())

    def add(self, one: T) -> None:
        """Take one more."""
        self._held[id(one)] = one

    def discard(self, one: T) -> None:
        """Let go of one, if it is among them."""
        self._held.pop(id(one), None)

    def members(self) -> list[T]:
        """Return those that are there now."""
        return [one for held in self._held.valuerefs() if (one := held()) is not None]
