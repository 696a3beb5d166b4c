"""The logged models of the plugin's store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import LoggedModel, LoggedModelParameter, LoggedModelTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, RESOURCE_DOES_NOT_EXIST
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.validation import _validate_logged_model_name

from mlflow_outbox.plugin import made_here, reads
from mlflow_outbox.plugin.asynchronous import AsynchronousRuns
from mlflow_outbox.plugin.base import LATER, no_such
from mlflow_outbox.plugin.homes import NO_RUN
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import OpenRun
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional

if TYPE_CHECKING:
    from mlflow_outbox.plugin.remembered import Journal

#: Models whose params are remembered; those of others are looked up on the disk.
_MODELS: Final = 512


class Models(AsynchronousRuns):
    """Logged models: made online first, everything after goes through the journal of the run that made them."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        self._model_params: dict[str, dict[str, str]] = {}

    def create_logged_model(
        self,
        experiment_id: str,
        name: str | None = None,
        source_run_id: str | None = None,
        tags: list[LoggedModelTag] | None = None,
        params: list[LoggedModelParameter] | None = None,
        model_type: str | None = None,
    ) -> LoggedModel:
        """Create a logged model: by the server if it answers in time, else here, with a provisional id.

        Raises:
            MlflowException: the name is none that MLflow takes, the server said no, or the experiment is known to be
                deleted.
        """
        if name or self.integers.embedded:  # a server takes an empty name for none
            _validate_logged_model_name(name)
        experiment_id = str(experiment_id)
        home = self._home_of_new(experiment_id, source_run_id)
        local = provisional.new_model_id()
        labels = [*(tags or ()), LoggedModelTag(provisional.MODEL_ID_TAG, local)]
        arguments: dict[str, Any] = {
            "experiment_id": experiment_id,
            "name": name or _generate_random_name(),
            "source_run_id": self.ids.local(source_run_id) if source_run_id else None,
            "tags": labels,
            "params": list(params or ()),
            "model_type": model_type,
        }
        made = self._made_by_server(arguments)
        if made is None:
            self.refuse_deleted(experiment_id)
        model_id = made.model_id if made is not None else local
        self.ids.called(model_id)
        self._model_homes[model_id] = home.run_id
        self._model_params[model_id] = {param.key: param.value for param in params or ()}
        home.request(
            "create_logged_model", known=made.model_id if made is not None else "", model_id=model_id, **arguments
        )
        if made is not None:
            made._artifact_location = self.shown_uri("model", model_id, made.artifact_location)
            made._tags.pop(provisional.MODEL_ID_TAG, None)
            return self.named(made)
        return self._folded(self.made_here.journal(home.run_id), model_id, None)

    def _home_of_new(self, experiment_id: str, source_run_id: str | None) -> OpenRun:
        if source_run_id:
            try:
                return self.writable(source_run_id)
            except MlflowException as error:  # MLflow takes any source
                if error.error_code not in NO_RUN:
                    raise
        return self.journals.room(experiment_id)

    def _made_by_server(self, arguments: dict[str, Any]) -> LoggedModel | None:
        try:
            ids = {
                key: self.ids.remote(arguments[key]) if arguments[key] else None
                for key in ("experiment_id", "source_run_id")
            }
            return self.server.ask(lambda store: store.create_logged_model(**{**arguments, **ids}), quick=True)
        except (Away, NotYet):
            return None

    def _folded(
        self, local: Journal | None, model_id: str, theirs: LoggedModel | None, *, allow_deleted: bool = False
    ) -> LoggedModel:
        requests: Any = self._calls_about(local, model_id)
        is_deleted = not allow_deleted and reads.is_deleted(requests, model_id)
        if local is not None and theirs is not None:  # it has what was delivered, and what others did later
            requests = local.unsent
        found = reads.model_of(requests, model_id, theirs, self.own_uri("model", model_id))
        if found is None or is_deleted:
            raise no_such("Logged model", model_id)
        return found

    def _calls_about(self, local: Journal | None, model_id: str) -> list[Any]:
        """Return the calls of the journal of a model, its creation also where there was no room to write it."""
        unwritten = self.journals.unwritten(self._model_homes.get(model_id, ""))
        return [*unwritten, *(local.requests if local is not None else ())]

    def get_logged_model(self, model_id: str, allow_deleted: bool = False) -> LoggedModel:
        """Return a logged model.

        Raises:
            MlflowException: there is none of this id, or only the server would know and is away.
        """
        return self._model(model_id, allow_deleted=allow_deleted, patient=True)

    def _model(self, model_id: str, *, allow_deleted: bool = False, patient: bool = False) -> LoggedModel:
        """Return a logged model as ``get_logged_model`` does; ``patient`` is as for ``run_as_known``."""
        if self._models_have_metrics:  # points that any run logged for the model, which only the server puts together
            self._models_have_metrics = False
            self.settle()
        home = self.model_home(model_id)
        self.ids.called(model_id)
        local = self.made_here.journal(home.run_id)  # before the server is asked, see ``reads``
        theirs: LoggedModel | None = None
        options = {"allow_deleted": True} if allow_deleted else {}

        def ask(store: Any, remote: str) -> LoggedModel:
            return store.get_logged_model(remote, **options)

        try:
            theirs = self.ask_about(model_id, ask)
        except NotYet:
            pass
        except Away as away:
            if not self.began_here("model", model_id):  # what is on disk is not all of it
                if not patient:
                    raise self.server.needed(f"the model {model_id}", away) from None
                theirs = self.ask_alone(f"the model {model_id}", model_id, ask)
        if theirs is not None:
            theirs._artifact_location = self.shown_uri("model", model_id, theirs.artifact_location)
            self.named(theirs)._model_id = model_id
        found = self._folded(local, model_id, theirs, allow_deleted=allow_deleted)
        found._model_uri = f"models:/{model_id}"
        return found

    def finalize_logged_model(self, model_id: str, status: Any) -> LoggedModel:
        """Set the status of a logged model."""
        home = self.model_home(model_id)
        home.request("finalize_logged_model", model_id=model_id, status=status)
        return self._after(model_id)

    def _after(self, model_id: str) -> LoggedModel:
        home = self.model_home(model_id)
        local = self.made_here.journal(home.run_id)
        found = reads.model_of(self._calls_about(local, model_id), model_id, None, self._location(model_id))
        return found if found is not None else self._model(model_id)

    def _location(self, model_id: str) -> str:
        return self.shown_uri("model", model_id, self._artifact_uris.get(model_id))

    def set_logged_model_tags(self, model_id: str, tags: list[LoggedModelTag]) -> None:
        """Set tags of a logged model."""
        self.model_home(model_id).request("set_logged_model_tags", model_id=model_id, tags=list(tags))

    def delete_logged_model_tag(self, model_id: str, key: str) -> None:
        """Delete a tag of a logged model.

        Raises:
            MlflowException: it has no such tag.
        """
        try:
            found = self._model(model_id)
        except MlflowException as error:
            if error.error_code != LATER:
                raise
        else:
            if key not in found.tags:
                msg = f"No tag with key {key!r} found for model with ID {model_id!r}."
                raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)
        self.model_home(model_id).request("delete_logged_model_tag", model_id=model_id, key=key)

    def log_logged_model_params(self, model_id: str, params: list[LoggedModelParameter]) -> None:
        """Log params of a logged model.

        Raises:
            MlflowException: one of them is known to have another value, or there is no such model.
        """
        home = self.model_home(model_id)
        held = self._params_of(home, model_id)
        if self.outbox.destination.scheme != "file":  # which overwrites them
            for param in params:
                if held.get(param.key, param.value) != param.value:
                    msg = (
                        f"Changing param values is not allowed. Param with key='{param.key}' was already logged with "
                        f"value='{held[param.key]}' for model ID='{model_id}'. "
                        f"Attempted logging new value '{param.value}'."
                    )
                    raise MlflowException(msg, error_code=BAD_REQUEST)
        home.request("log_logged_model_params", model_id=model_id, params=list(params))
        held.update({param.key: param.value for param in params})

    def _params_of(self, home: OpenRun, model_id: str) -> dict[str, str]:
        """Return the params of a model as far as this outbox knows them; the server is not asked for a write."""
        held = self._model_params.get(model_id)
        if held is None:
            requests = self._calls_about(self.made_here.journal(home.run_id), model_id)
            found = reads.model_of(requests, model_id, None, "")
            held = self._model_params[model_id] = dict(found.params) if found is not None else {}
            while len(self._model_params) > _MODELS:
                self._model_params.pop(next(iter(self._model_params)), None)
        return held

    def delete_logged_model(self, model_id: str) -> None:
        """Delete a logged model."""
        self.model_home(model_id).request("delete_logged_model", model_id=model_id)

    def search_logged_models(self, experiment_ids: list[str], *args: Any, **kwargs: Any) -> Any:
        """Return logged models: the server's, those made here while it is away; see ``made_here.search``."""
        found = made_here.search(self, self._location, experiment_ids, *args, **kwargs)
        for model in found:
            model._tags.pop(provisional.MODEL_ID_TAG, None)
        return found
