"""The model registry for an ``outbox+`` URI: MLflow's own store for the server, asked only while the server is there.

Version numbers, stages and aliases are the server's alone, so nothing of the registry is kept for later: a call while
the server is away fails within the deadline and says so. Before each call what was logged here gets a moment to
arrive, because a model version points to a model, and ids and addresses of files that were given here are replaced by
the server's.
"""

from __future__ import annotations

from typing import Any

from mlflow.tracking._model_registry.utils import _get_store as get_registry_store
from mlflow.tracking._tracking_service.utils import _get_store as get_tracking_store

from mlflow_outbox import delivery
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.wrapped import Away


class OutboxRegistry:
    """MLflow's registry store behind an outbox.

    Args:
        store_uri: ``outbox+<tracking URI>``.
        tracking_uri: MLflow's tracking URI; not used, since the server is the same.
    """

    def __init__(self, store_uri: str, tracking_uri: str | None = None) -> None:
        self._uri = store_uri

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        tracking = get_tracking_store(self._uri)
        destination = tracking.outbox.destination
        uri = destination.secret_uri or destination.uri
        if destination.scheme == "sqlite":
            uri = delivery.database_url(destination)
        if not _is_call(destination.scheme, name):
            theirs = getattr(get_registry_store(uri), name)
            if not callable(theirs):
                return theirs

        def call(*args: Any, **kwargs: Any) -> Any:
            tracking.settle(asks_next=True)
            try:
                given = [tracking.ids.outgoing(tracking.located(arg)) for arg in args]
                named = {key: tracking.ids.outgoing(tracking.located(value)) for key, value in kwargs.items()}
                # One question that ends, because MLflow's own store tries for minutes.
                tracking.server.ask(lambda store: store.search_experiments(max_results=1))
            except Away as error:  # the question before was sent at most, and not the call
                away = Away(str(error), sent=False, answer=error.answer)
                raise tracking.server.needed(f"the model registry ({name})", away, call=name) from None
            except NotYet as missing:
                pending = tracking.server.lacks(missing)
                raise tracking.server.needed(f"the model registry ({name})", pending, call=name) from None
            return getattr(get_registry_store(uri), name)(*given, **named)

        return call


def _is_call(scheme: str, name: str) -> bool:
    """Return whether a name is a method of a database's store, which tries for minutes to connect when it is made."""
    if scheme in {"http", "https", "databricks", "file"}:
        return False
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore  # which other stores do without

    return callable(getattr(SqlAlchemyStore, name, None))
