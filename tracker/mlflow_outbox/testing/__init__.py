"""Doubles for the tests of programs that log through an outbox."""

from mlflow_outbox.testing.disk import FailingDisk

__all__ = ["FailingDisk"]
