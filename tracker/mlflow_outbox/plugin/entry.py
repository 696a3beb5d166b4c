"""MLflow's entry points: loaded by every ``import mlflow`` beside this package, so they import nothing yet."""

from __future__ import annotations

from typing import Any

_PREFIX = "outbox+"


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Return the tracking store of an ``outbox+`` URI."""
    from mlflow_outbox.plugin.tracking_store import OutboxStore

    return OutboxStore(store_uri, artifact_uri)


def registry_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """Return the model registry store of an ``outbox+`` URI."""
    from mlflow_outbox.plugin.registry_store import OutboxRegistry

    return OutboxRegistry(store_uri, tracking_uri)


def staged_artifacts(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an ``outbox-artifacts:`` URI."""
    from mlflow_outbox.plugin.artifacts import StagedArtifacts

    return StagedArtifacts(artifact_uri, tracking_uri, registry_uri)


def proxied_artifacts(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an ``mlflow-artifacts:`` URI: MLflow's own, unless the tracking URI is an outbox."""
    from mlflow.tracking import get_tracking_uri

    uri = str(tracking_uri or get_tracking_uri())
    if uri.startswith(_PREFIX):
        return staged_artifacts(artifact_uri, uri, registry_uri)
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    return MlflowArtifactsRepository(artifact_uri, tracking_uri=tracking_uri, registry_uri=registry_uri)
