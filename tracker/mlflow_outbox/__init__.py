"""Logging to MLflow that costs microseconds, survives ``kill -9``, and arrives exactly once."""

from mlflow_outbox.errors import OutboxError, TrackingUnavailable
from mlflow_outbox.outbox import FlushResult
from mlflow_outbox.run import Run
from mlflow_outbox.settings import Settings
from mlflow_outbox.tracker import MLflowTracker, create_tracker

__all__ = [
    "FlushResult",
    "MLflowTracker",
    "OutboxError",
    "Run",
    "Settings",
    "TrackingUnavailable",
    "create_tracker",
]
__version__ = "0.1.0"
