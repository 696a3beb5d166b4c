"""Logging without waiting: MLflow's own is a queue in memory; the journal returns sooner and keeps what it took."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from mlflow.utils.async_logging.run_operations import RunOperations

from mlflow_outbox.counters import described, printable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.plugin.runs import Runs


class AsynchronousRuns(Runs):
    """The asynchronous calls of runs, which log at once."""

    def log_batch_async(self, run_id: str, metrics: Any, params: Any, tags: Any) -> RunOperations:
        """Log at once; the returned operations are complete, and raise when they are waited for what was refused."""
        done: Future[None] = Future()
        try:
            Runs.log_batch(self, run_id, metrics, params, tags)
        except Exception as error:  # noqa: BLE001 - whatever it is, MLflow gives it to who waits; counted and said
            forward(error)
            self.outbox.counters.add("asynchronous_refused")
            self.outbox.counters.warn_once(
                ("asynchronous", run_id, type(error).__name__),
                f"mlflow-outbox: what was logged to run {printable(run_id)} without waiting was refused: "
                f"{described(error)}",
            )
            done.set_exception(error)
        else:
            done.set_result(None)
        return RunOperations([done])

    def log_metric_async(self, run_id: str, metric: Any) -> RunOperations:
        """Log one metric point; see ``log_batch_async``."""
        return self.log_batch_async(run_id, [metric], [], [])

    def log_param_async(self, run_id: str, param: Any) -> RunOperations:
        """Log one param; see ``log_batch_async``."""
        return self.log_batch_async(run_id, [], [param], [])

    def set_tag_async(self, run_id: str, tag: Any) -> RunOperations:
        """Set one tag; see ``log_batch_async``."""
        return self.log_batch_async(run_id, [], [], [tag])

    def flush_async_logging(self) -> None:
        """Make everything logged so far survive a power cut; delivery goes on in the background."""
        self.outbox.sync()

    def end_async_logging(self) -> None:
        """Do as ``flush_async_logging``."""
        self.outbox.sync()

    def shut_down_async_logging(self) -> None:
        """Do nothing: there is no queue to shut down."""
