"""Doubles for the tests of programs that log through an outbox; ``testing.faults`` has what a ``FaultProxy`` can do."""

from mlflow_outbox.testing.disk import FailingDisk
from mlflow_outbox.testing.proxy import FaultProxy

__all__ = ["FailingDisk", "FaultProxy"]
