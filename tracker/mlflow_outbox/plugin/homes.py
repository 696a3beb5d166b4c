"""Where things are at home: which journal the requests and files of a run, model or trace go to, and their URIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from mlflow.exceptions import MlflowException
from mlflow.utils.uri import get_uri_scheme

from mlflow_outbox import delivery
from mlflow_outbox.plugin.artifacts import claim
from mlflow_outbox.plugin.base import UNKNOWN, Base, no_such
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import OpenRun
from mlflow_outbox.plugin.places import Places
from mlflow_outbox.plugin.remembered import Remembered
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import argument_of

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from mlflow_outbox.views import File

#: What is said of a model's source that is no run, or no id of one.
NO_RUN: Final = frozenset({UNKNOWN, "INVALID_PARAMETER_VALUE"})
#: Runs and rooms whose files are remembered, which may be thousands.
_REMEMBERED: Final = 16


class Homes(Base):
    """Knows the journals and artifact URIs of runs, models and traces."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        self._model_homes: dict[str, str] = {}
        self.places = Places()
        #: The files of those runs that were asked for last.
        self._files = Remembered(self.outbox, _REMEMBERED, files=True)

    def own_uri(self, kind: str, subject: str) -> str:
        """Return the artifact URI of the outbox's own scheme for a "run", a "model" or an "experiment"."""
        slug = self.outbox.directory.identity.id[:12]
        return f"{provisional.ARTIFACT_SCHEME}:/{slug}/{kind}/{subject}/artifacts"

    def shown_uri(self, kind: str, subject: str, theirs: str | None) -> str:
        """Return the artifact URI for readers: the server's when there is one, else one of the outbox's.

        MLflow asks here for the repository of either: see ``artifacts.claim``.
        """
        if theirs and subject in theirs:
            scheme = get_uri_scheme(theirs)
            self.places.show(theirs, kind, subject)
            if scheme != "mlflow-artifacts":  # which is the plugin's anyhow
                claim(scheme)
                delivery.prepare_artifacts(scheme)
            self._artifact_uris[subject] = theirs
            return theirs
        return self.own_uri(kind, subject)

    def home_of(self, kind: str, subject: str) -> OpenRun:
        """Return the journal that the files of a run, a model or (kind "uri", by experiment) a trace go to.

        Raises:
            MlflowException: there is no such run.
        """
        if kind == "run":
            return self.writable(subject)
        if kind == "model":
            return self.model_home(subject)
        return self.journals.room(subject)

    def named(self, model: LoggedModel, names: Mapping[str, str] | None = None) -> LoggedModel:
        """Have an answer call a model, its run and its experiment as this process does; see ``ids``."""
        names = self.ids.names() if names is None else names
        model._model_id = names.get(model.model_id, model.model_id)
        model._model_uri = f"models:/{model.model_id}"
        model._source_run_id = names.get(model.source_run_id, model.source_run_id)
        model._experiment_id = names.get(model.experiment_id) or self.shown_experiment(model.experiment_id)
        return model

    def model_home(self, model_id: str) -> OpenRun:
        """Return the journal that a model's requests go to.

        Raises:
            MlflowException: there is no such model.
        """
        home = self.name_of_model_home(model_id)
        return self.journals.open(home, "") if provisional.is_room(home) else self.writable(home)

    def name_of_model_home(self, model_id: str) -> str:
        """Return the run or room of ``model_home``; the server is asked the first time that a model is met."""
        home = self._model_homes.get(model_id)
        if home is None:
            home = self._model_homes[model_id] = self._find_model_home(model_id)
        return home

    def _find_model_home(self, model_id: str) -> str:
        if provisional.is_provisional(model_id):
            home = self.made_here.home_of_model(model_id)
            if home is None:
                raise no_such("Logged model", model_id)
            return home
        try:
            theirs = self.ask_about(model_id, lambda store, remote: store.get_logged_model(remote))
        except Away:
            return self.made_here.home_of_model(model_id) or provisional.COMMON_ROOM
        if theirs.source_run_id:
            try:
                return self.writable(theirs.source_run_id).run_id
            except MlflowException as error:  # a model outlives its run, and MLflow takes any source
                if error.error_code not in NO_RUN:
                    raise
        return provisional.room_of(theirs.experiment_id)

    def home_of_files(self, kind: str, subject: str) -> str | None:
        """Return the run or room whose journal has files of an owner; None for a model that the server does not know.

        It may be deleted, and a version in the registry have its files: they are the server's to show.

        Raises:
            MlflowException: there is no such run, or model of this outbox.
        """
        try:
            return self.home_of(kind, subject).run_id
        except MlflowException as error:
            if kind != "model" or error.error_code != UNKNOWN or provisional.is_provisional(subject):
                raise
            return None

    def began_here(self, kind: str, subject: str) -> bool:
        """Return whether a run or model was made through this outbox, so that what is on disk is all there is of it."""
        home = self.home_of_files(kind, subject)
        if home is None:
            return False
        return self.made_here.began(kind, subject, home) or self._began_unwritten(kind, subject, home)

    def _began_unwritten(self, kind: str, subject: str, home: str) -> bool:
        """Return whether a run or model began in this process when there was no room to write so."""
        if kind == "run":
            held = self.journals.get(home)
            return held is not None and held.begun is not None and not delivery.reading(self.outbox).remote_id(home)
        return any(argument_of(call.arguments, "model_id") == subject for call in self.journals.unwritten(home))

    def files(self, home: str, owner: str) -> tuple[dict[str, File], dict[str, File]]:
        """Return the files of an owner ("" is the run) that the outbox knows, and those not delivered."""
        found = self._files.journal(home)
        return (found.files.get(owner, {}), found.waiting.get(owner, {})) if found is not None else ({}, {})

    def remote_location(self, kind: str, subject: str, uri: str, *, quick: bool = False) -> str:
        """Return MLflow's artifact URI, after one question to the server.

        Args:
            kind: "run", "model" or "experiment".
            subject: the id here of what the files are of.
            uri: as the program knows it.
            quick: as for ``Server.ask``.

        Raises:
            Away: the server is, or does not know the owner yet.
        """
        try:
            if kind == "run":
                held = self.ask_about(subject, lambda store, remote: store.get_run(remote), quick=quick)
                return str(held.info.artifact_uri)
            if kind == "model":
                try:
                    found = self.ask_about(subject, lambda store, remote: store.get_logged_model(remote), quick=quick)
                except MlflowException as error:
                    if error.error_code != UNKNOWN or get_uri_scheme(uri) == provisional.ARTIFACT_SCHEME:
                        raise
                    return uri  # it is deleted, and its files are where they were
                return str(found.artifact_location)
            if get_uri_scheme(uri) != provisional.ARTIFACT_SCHEME:  # it says itself where it is
                self.server.ask(lambda store: store.search_experiments(max_results=1), quick=quick)
                return uri
            remote = self.ids.remote(subject)
        except NotYet:
            raise Away(f"{subject} has not been delivered yet", sent=False) from None
        root = str(self.server.ask(lambda store: store.get_experiment(remote), quick=quick).artifact_location)
        return provisional.URI_PATTERN.sub(lambda _: root.rstrip("/"), uri)

    def located(self, value: Any) -> Any:
        """Return a value (texts, lists and mappings of them) with MLflow's artifact URIs in place of the outbox's own.

        Raises:
            Away: the server is, or does not know the owner of one yet.
        """
        if isinstance(value, list):
            return [self.located(item) for item in value]
        if isinstance(value, dict):
            return {key: self.located(item) for key, item in value.items()}
        if not isinstance(value, str) or provisional.ARTIFACT_SCHEME not in value:
            return value
        return provisional.URI_PATTERN.sub(
            lambda found: self.remote_location(found[1], found[2], found[0]).rstrip("/"), value
        )
