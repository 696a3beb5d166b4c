"""The command ``mlflow-outbox``: deliver, look at and mend outboxes from outside of the programs that log to them."""

from mlflow_outbox_worker.cli import clock  # noqa: F401 - first of all: what is imported next counts as the command's time

# isort: split
from mlflow_outbox_worker.cli.app import main

__all__ = ["main"]
