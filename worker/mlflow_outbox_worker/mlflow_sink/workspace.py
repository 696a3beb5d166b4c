"""Requests to one workspace of a tracking server, whichever the environment of the process names that makes them."""

from __future__ import annotations

from typing import Any, Final

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import FEATURE_DISABLED

from mlflow_outbox_worker.mlflow_sink.transport import Answer, Transport

#: What MLflow calls it (mlflow/utils/workspace_utils.py, since 3.10).
_HEADER: Final = "X-MLFLOW-WORKSPACE"


class WorkspaceTransport(Transport):
    """A transport whose requests go to a workspace.

    Args:
        timeout: seconds that one request may take in all.
        workspace: its name.
        reads: a program reads what it likes.
    """

    def __init__(self, timeout: float, workspace: str, *, reads: bool = False) -> None:
        super().__init__(timeout, reads=reads)
        self._workspace = workspace

    def request(self, host_creds: Any, method: str, endpoint: str, **arguments: Any) -> Answer:
        """Make one request, as ``Transport`` does."""
        headers = {**(arguments.pop("extra_headers", None) or {}), _HEADER: self._workspace}
        return super().request(host_creds, method, endpoint, extra_headers=headers, **arguments)

    def check_support(self, store: Any) -> None:
        """Refuse a server without workspaces, which takes no notice of their names: all would go to the same place.

        Args:
            store: MLflow's store of the server, as ``rest`` has it.

        Raises:
            MlflowException: the server has none.
            SinkError: it could not be asked.
        """
        if not store.supports_workspaces:
            msg = f"the server has no workspaces, and what was logged is for {self._workspace!r}"
            raise MlflowException(msg, error_code=FEATURE_DISABLED)
