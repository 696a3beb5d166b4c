"""The server's last answers about runs, for while it is away: of one that began elsewhere only the server has all."""

from __future__ import annotations

from typing import Any, Final

#: Runs whose last answer is kept.
_MOST: Final = 64


class Answers:
    """Keeps the last answers, of so many runs."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def keep(self, run_id: str, run: Any) -> None:
        """Keep what the server says of a run.

        Args:
            run_id: the id under which the outbox keeps it.
            run: MLflow's entity, which nobody changes from now on.
        """
        self._kept.pop(run_id, None)
        self._kept[run_id] = run
        while len(self._kept) > _MOST:
            self._kept.pop(next(iter(self._kept)), None)

    def of(self, run_id: str) -> Any:
        """Return what the server said of a run when it was asked last, or None."""
        return self._kept.get(run_id)
