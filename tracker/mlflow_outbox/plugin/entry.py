"""MLflow's entry points: loaded by every ``import mlflow`` beside this package, so they import next to nothing yet.

With the setting ``disabled`` an ``outbox+`` URI is what it is without the prefix: MLflow's own stores and repositories.

MLflow looks for a store by what is before the colon. Without one, as in ``outbox+databricks``, it makes a directory of
that name, or says that directories are out of date, and asks no entry point. So the tracking URI of the environment is
looked at where they are loaded, and ``outbox+databricks:`` is what ``databricks`` is without an outbox.
"""

from __future__ import annotations

import atexit
import logging
import sys
from typing import Any

from mlflow_outbox.settings import tracking_uri_from_environment

_PREFIX = "outbox+"


def _warn_of_no_scheme() -> None:
    uri = (tracking_uri_from_environment() or "").strip()
    if uri.startswith(_PREFIX) and ":" not in uri:
        logging.getLogger("mlflow_outbox").warning(
            "mlflow-outbox: MLFLOW_TRACKING_URI=%s has no colon, so MLflow takes it for the name of a directory, and "
            "nothing goes through an outbox; write outbox+databricks: for a workspace, outbox+file: before a directory",
            ascii(uri),
        )


_warn_of_no_scheme()


def _at_exit() -> None:
    """End what MLflow has begun, where a store was made.

    Handlers run in reverse order of their registration. This one is registered before those that a program has, so
    that they log to the run that is active, as without an outbox, and behind the outbox's own, which delivers last.
    """
    stores: Any = sys.modules.get("mlflow_outbox.plugin.tracking_store")
    if stores is not None:
        stores.at_exit()


atexit.register(_at_exit)


def _plain(uri: str) -> str:
    """Return what a URI is without an outbox."""
    plain = uri.removeprefix(_PREFIX)
    return "databricks" if plain.rstrip(":/") == "databricks" else plain


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Return the tracking store of an ``outbox+`` URI."""
    if _is_disabled():
        from mlflow.tracking._tracking_service.utils import _tracking_store_registry

        plain = _plain(store_uri)
        return _tracking_store_registry.get_store_builder(plain)(store_uri=plain, artifact_uri=artifact_uri)
    from mlflow_outbox.plugin.tracking_store import OutboxStore

    return OutboxStore(store_uri, artifact_uri)


def registry_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """Return the model registry store of an ``outbox+`` URI."""
    if _is_disabled():
        import inspect

        from mlflow.tracking._model_registry.utils import _get_store_registry

        plain = _plain(store_uri)
        builder = _get_store_registry().get_store_builder(plain)
        takes_uri = "tracking_uri" in inspect.signature(builder).parameters
        options = {"tracking_uri": _plain(str(tracking_uri or store_uri))} if takes_uri else {}
        return builder(store_uri=plain, **options)
    from mlflow_outbox.plugin.registry_store import OutboxRegistry

    return OutboxRegistry(store_uri, tracking_uri)


def scorer_store(tracking_uri: str) -> Any:
    """Return where the scorers of an ``outbox+`` URI are registered, read and deleted: they go to the server at once.

    MLflow's own asks the tracking store of its URI, which is the outbox; the one of Databricks asks Databricks itself.
    """
    from mlflow.genai.scorers.registry import _scorer_store_registry
    from mlflow.utils.uri import is_databricks_uri

    plain = _plain(tracking_uri)
    builder = _scorer_store_registry.get_store_builder(plain)
    return builder(tracking_uri=plain if _is_disabled() or is_databricks_uri(plain) else tracking_uri)


def labeling_store(tracking_uri: str) -> Any:
    """Return where labeling sessions are kept, which only Databricks has."""
    from mlflow.genai.labeling.stores import _labeling_store_registry

    plain = _plain(tracking_uri)
    return _labeling_store_registry.get_store_builder(plain)(tracking_uri=plain)


def staged_artifacts(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an ``outbox-artifacts:`` URI.

    Raises:
        MlflowException: the outbox, which is all that knows what is there, is switched off, or is not the tracking URI.
    """
    if _is_disabled():
        from mlflow.exceptions import MlflowException

        msg = f"{artifact_uri} is a place in an outbox, and MLFLOW_OUTBOX_DISABLED switches outboxes off"
        raise MlflowException.invalid_parameter_value(msg)
    from mlflow.tracking import get_tracking_uri

    if not any(str(uri).startswith(_PREFIX) for uri in (tracking_uri, get_tracking_uri())):
        from mlflow.exceptions import MlflowException

        msg = (
            f"{artifact_uri} is a place in an outbox; it can be read with the outbox+ tracking URI that it was made by"
        )
        raise MlflowException.invalid_parameter_value(msg)
    from mlflow_outbox.plugin.folders import repository

    return repository(artifact_uri, tracking_uri, registry_uri)


def proxied_artifacts(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an ``mlflow-artifacts:`` URI: MLflow's own, unless the tracking URI is an outbox."""
    from mlflow.tracking import get_tracking_uri

    uri = str(tracking_uri or get_tracking_uri())
    if uri.startswith(_PREFIX):
        if not _is_disabled():
            return staged_artifacts(artifact_uri, uri, registry_uri)
        tracking_uri = _plain(uri)
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    return MlflowArtifactsRepository(artifact_uri, tracking_uri=tracking_uri, registry_uri=registry_uri)


def _is_disabled() -> bool:
    from mlflow_outbox.settings import Settings

    return Settings.from_environment().disabled
