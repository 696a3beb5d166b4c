"""What a journal expects of whoever looks after it in the background (``caretaker``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mlflow_outbox.spool.journal import Journal


class Registry(Protocol):
    """Whoever looks after open journals in the background: syncs them and empties their memory."""

    def watch(self, journal: Journal) -> bool:
        """Look after a journal from now on; return False where nobody is there to do so."""
        ...

    def hurry(self) -> None:
        """Look at what is looked after soon; may be called in the middle of anything."""
        ...
