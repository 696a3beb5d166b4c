"""Which run has yet to make a model that another one names.

The id of a model does not say whose journal holds its creation. A request that names it waits for that run, however
long a person takes with it, and says so; but a model that nobody is going to make must not be waited for.
"""

from __future__ import annotations

from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.spool.events import Request, argument_of
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.sources import Source

#: Seconds for which an answer is good: it takes reading all that is pending.
_GOOD_FOR: Final = 30.0


class Origins:
    """Finds creations of models among what is pending.

    Args:
        source: where the runs come from.
        ledger: how far they are delivered.
    """

    def __init__(self, source: Source, ledger: Ledger) -> None:
        self._source = source
        self._ledger = ledger
        self._found: dict[str, tuple[str, float]] = {}

    def of(self, model_id: str) -> str:
        """Return the run, or room, whose pending events create a model; "" when there is none.

        Args:
            model_id: as in the journals.

        Raises:
            LedgerUnavailable: the ledger could not be read.
        """
        home, until = self._found.get(model_id, ("", 0.0))
        if stopwatch.seconds() >= until:
            home = next((run_id for run_id in self._source.run_ids() if self._creates(run_id, model_id)), "")
            self._found[model_id] = (home, stopwatch.seconds() + _GOOD_FOR)
        return home

    def _creates(self, run_id: str, model_id: str) -> bool:
        record = self._ledger.record(run_id)
        reader = RunReader(*self._source.folders(run_id))
        return any(
            request.operation == "create_logged_model" and argument_of(request.arguments, "model_id") == model_id
            for _, request in reader.each(Request, record.cursors if record is not None else {})
        )
