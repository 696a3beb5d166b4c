"""The command ``mlflow-outbox``: deliver, look at and mend outboxes from outside of the programs that log to them."""

from mlflow_outbox_worker.cli.app import main

__all__ = ["main"]
