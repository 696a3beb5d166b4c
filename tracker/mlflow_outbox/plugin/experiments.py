"""The experiments of the plugin's store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_STATE, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST
from mlflow.utils.uri import validate_query_string
from mlflow.utils.validation import _validate_experiment_name, _validate_experiment_tag

from mlflow_outbox.plugin import reads
from mlflow_outbox.plugin.base import UNKNOWN, no_such, not_active
from mlflow_outbox.plugin.homes import Homes
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import now_ms
from mlflow_outbox.plugin.mentions import Mentions
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import INT64_MAX, INT64_MIN, Request
from mlflow_outbox.spool.reader import RunReader

if TYPE_CHECKING:
    from mlflow_outbox_worker.ondisk import LocalRun


class Experiments(Homes):
    """Experiments are made online first; a name met offline gets a provisional id, one for all processes."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        #: Those that were there, and not deleted, when this process made them or asked last.
        self._active_experiments: set[str] = set()
        #: Names that are free again once the rename of an experiment, by its id, has arrived.
        self._left: dict[str, str] = {}
        #: Names of which the server was asked in vain whether there is one.
        self._unanswered: set[str] = set()
        self._mentions = Mentions(self.outbox)

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        """Create an experiment and return its id, a provisional one when the server is away.

        Raises:
            TypeError: the value of a tag is no text, and MLflow's client sends nothing else.
            MlflowException: the name, the place or a tag is none that MLflow takes, or the experiment exists.
        """
        _validate_experiment_name(name)
        for tag in tags or ():
            _validate_experiment_tag(tag.key, tag.value)
            if not self.integers.embedded:
                tag.to_proto()
        if artifact_location and not self.integers.embedded:
            _check_place(artifact_location)
        after: list[str] = []
        try:
            local = self._created(name, artifact_location, list(tags or ()))
        except Away:
            if self._named_here(name) is not None:
                raise _exists(name) from None
            *after, local = self._ids_here(name)
            after = [*after[-1:], *([self._left[name]] if name in self._left else [])]
        self._unanswered.discard(name)
        self.know_experiment(local, name)
        self._active_experiments.add(local)
        self.journals.room(local).request(
            "create_experiment",
            known="" if provisional.is_provisional(local) else local,
            experiment_id=local,
            name=name,
            artifact_location=artifact_location or None,
            tags={tag.key: tag.value for tag in tags or ()},
            **({"after": after} if after else {}),
        )
        return local

    def _created(self, name: str, artifact_location: str | None, tags: list[Any]) -> str:
        """Return the id of an experiment that the server makes, or has, if nobody could be told that before.

        MLflow makes one where it heard of none. It takes a refusal for somebody else's being faster, and goes on
        without that experiment: its runs would be in the default one.

        Raises:
            Away: the server cannot be asked now, for either.
            MlflowException: it said no.
        """
        try:
            return str(
                self.server.ask(lambda store: store.create_experiment(name, artifact_location, tags), quick=True)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or name not in self._unanswered:
                raise
        theirs = self.server.ask(lambda store: store.get_experiment_by_name(name), quick=True)
        if theirs is None or theirs.lifecycle_stage != LifecycleStage.ACTIVE:
            raise _exists(name)
        return str(theirs.experiment_id)

    def _ids_here(self, name: str) -> list[str]:
        """Return the provisional ids that experiments of a name were given, and last the one that the next would be."""
        found: list[str] = []
        while not found or self.journals.exists(provisional.room_of(found[-1])):
            found.append(provisional.experiment_id(self.outbox.directory.identity.id, name, len(found)))
        return found

    def get_experiment(self, experiment_id: str) -> Experiment:
        """Return an experiment.

        Raises:
            MlflowException: there is none of this id.
        """
        given = str(experiment_id)
        local = self._room(given)  # before the server is asked, see ``reads``
        theirs: Experiment | None = None
        is_away = False
        try:
            remote = self.ids.remote(given)
            theirs = self.server.ask(lambda store: store.get_experiment(remote), quick=True)
        except NotYet:
            pass
        except Away:
            is_away = True
        found = self._with_pending(local, given, theirs)
        if found is not None:
            self.know_experiment(given, found.name)
            return found
        if is_away:  # of a provisional one there would be something on disk
            self._refuse_no_id(given)
            # It was named by its id, so it exists; its name is asked for again when the server is back.
            shown = Experiment(
                given, self.experiment_name(given), self.own_uri("experiment", given), "active", creation_time=now_ms()
            )
            requests = local.view.requests if local is not None else []
            return reads.experiment_of(requests, shown, given, self.own_uri("experiment", given)) or shown
        raise no_such("Experiment", given)

    def _room(self, given: str) -> LocalRun | None:
        return self.local_run(provisional.room_of(given))

    def _with_pending(self, local: LocalRun | None, given: str, theirs: Experiment | None) -> Experiment | None:
        """Return an experiment, the server's answer if there is one, with what is pending folded in."""
        requests: Any = local.view.requests if local is not None else []
        if local is not None and theirs is not None:  # which has what arrived or was done there, and more
            requests = [event for _, event in local.pending if isinstance(event, Request) and not event.known]
        requests = [*self.journals.unwritten(provisional.room_of(given)), *requests]
        return reads.experiment_of(requests, theirs, given, self.own_uri("experiment", given))

    def get_experiment_by_name(self, experiment_name: str) -> Experiment | None:
        """Return the experiment of a name, or None."""
        called = [number for number, name in list(self._experiment_names.items()) if name == experiment_name]
        rooms = {number: self._room(number) for number in called}  # before the server is asked, see ``reads``
        theirs: Experiment | None = None
        try:
            theirs = self.server.ask(lambda store: store.get_experiment_by_name(experiment_name), quick=True)
        except Away:
            self._unanswered.add(experiment_name)
        else:
            self._unanswered.discard(experiment_name)
        if theirs is not None:
            shown = self.shown_experiment(theirs.experiment_id)
            if shown != theirs.experiment_id:
                return self.get_experiment(shown)
            self.know_experiment(theirs.experiment_id, theirs.name)
            local = rooms[shown] if shown in rooms else self._room(shown)
            found = self._with_pending(local, shown, theirs)
            if found is not None and found.name == experiment_name:  # it may be on its way to another
                return found
        return self._named_here(experiment_name)

    def _named_here(self, experiment_name: str) -> Experiment | None:
        """Return the experiment of a name that this outbox knows of, or None."""
        for number in self._known_here(experiment_name):
            try:
                found = self.get_experiment(number)
            except MlflowException as error:
                if error.error_code != UNKNOWN:
                    raise
                continue  # another thread is making it: its id is known before it is written
            if found.name == experiment_name:  # it may have been renamed
                return found
        return None

    def _known_here(self, name: str) -> Iterator[str]:
        """Yield the ids of experiments that may have a name, as far as this outbox knows; each is found out on demand.

        While the server is away these are those that this process met, and those that other processes wrote of.
        """
        yield from (known := self._ids_here(name)[:-1])
        yield from sorted(self._handed_out - {*known})
        if not self.server.is_away():
            return
        yield from [number for number, held in list(self._experiment_names.items()) if held == name]
        for number in self._mentions.of(name):
            if number not in self._experiment_names:  # else this process knows better what it is called
                self.know_experiment(number, name)
                yield number

    def set_experiment_tag(self, experiment_id: str, tag: Any) -> None:
        """Set a tag of an experiment.

        Raises:
            MlflowException: the tag is none that MLflow takes, there is no such experiment, or it is deleted.
        """
        _validate_experiment_tag(tag.key, tag.value)
        given = str(experiment_id)
        if given not in self._active_experiments:
            self._check_active_experiment(given)
        self.journals.room(given).request("set_experiment_tag", experiment_id=given, tag=tag)

    def delete_experiment_tag(self, experiment_id: str, key: str) -> None:
        """Delete a tag of an experiment.

        Raises:
            MlflowException: it has no such tag, there is no such experiment, or it is deleted.
        """
        given = str(experiment_id)
        found = self._check_active_experiment(given)
        if key not in found.tags and (provisional.is_provisional(given) or not self.server.is_away()):
            msg = f"No tag with name: {key} in experiment with id {given}"
            raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)
        self.journals.room(given).request("delete_experiment_tag", experiment_id=given, key=key)

    def _check_active_experiment(self, given: str) -> Experiment:
        """Return an experiment that can be written to, as far as that is known; what is active is not asked for again.

        Somebody else may delete it later: then its changes are parked, as those of a run are.
        """
        found = self.get_experiment(given)
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise not_active("experiment", given)
        self._active_experiments.add(given)
        return found

    def delete_experiment(self, experiment_id: str) -> None:
        """Delete an experiment, and with it its runs.

        Raises:
            MlflowException: it is deleted already.
        """
        self._change("delete_experiment", experiment_id)
        self._gone.add(self.shown_experiment(str(experiment_id)))
        self._deleted.update(self.journals.runs())  # any of them may be one of its: it is looked before the next write

    def restore_experiment(self, experiment_id: str) -> None:
        """Restore a deleted experiment, and with it its runs.

        Raises:
            MlflowException: it is not deleted.
        """
        self._change("restore_experiment", experiment_id)
        self._gone.discard(self.shown_experiment(str(experiment_id)))

    def is_gone(self, experiment_id: str) -> bool:
        """Return whether this process deleted an experiment, and the server does not say otherwise."""
        if not self._gone:
            return False
        shown = self.shown_experiment(experiment_id)
        if shown not in self._gone:
            return False
        stage = self.get_experiment(shown).lifecycle_stage
        return self.server.was_away() or stage != LifecycleStage.ACTIVE

    def refuse_deleted(self, experiment_id: str) -> None:
        """Refuse a run in an experiment that is deleted as far as this outbox knows; the server is not there to do it.

        Raises:
            MlflowException: it is.
        """
        self._refuse_no_id(experiment_id)
        if experiment_id not in self._active_experiments and self.journals.exists(provisional.room_of(experiment_id)):
            try:
                self._check_active_experiment(experiment_id)
            except MlflowException as error:
                if error.error_code != UNKNOWN:  # the room was retired
                    raise

    def _refuse_no_id(self, given: str) -> None:
        """Refuse what no experiment's id can be, as MLflow does: a run there would wait for ever.

        Raises:
            MlflowException: it is no number of 64 bits, and no server has had an experiment of that id.
        """
        if self.outbox.destination.scheme == "file" or given in self._experiment_names:
            return
        with contextlib.suppress(ValueError):
            if INT64_MIN <= int(given) <= INT64_MAX:
                return
        msg = f"Invalid experiment ID '{given}'. Experiment ID must be a valid integer."
        raise MlflowException.invalid_parameter_value(msg)

    def rename_experiment(self, experiment_id: str, new_name: str) -> None:
        """Rename an experiment.

        Raises:
            MlflowException: the name is none that MLflow takes, or is taken, or the experiment is deleted.
        """
        _validate_experiment_name(new_name)
        given = str(experiment_id)
        before = self._experiment_names.get(given)
        if not self._change("rename_experiment", given, new_name=new_name) and before is not None:
            self._left[before] = given
        self.know_experiment(given, new_name)

    def _change(self, operation: str, experiment_id: str, **arguments: Any) -> bool:
        """Change an experiment as a whole: at once when the server is there, else in its place in the journal.

        There it goes too while something that it has to come after is on its way.

        Returns:
            Whether it was done at once.
        """
        given = str(experiment_id)
        self._active_experiments.discard(given)
        settled = self.settle() and self.journals.wrote()  # if it wrote nothing, other processes may have
        if settled or not self._has_to_come_after(given, runs=operation == "delete_experiment"):
            try:
                remote = self.ids.remote(given)
                self.server.ask(lambda store: getattr(store, operation)(remote, **arguments), quick=True)
            except (Away, NotYet):
                pass
            else:
                # For other processes, when the server is away. Somebody may undo a deletion before they ask.
                if operation != "delete_experiment":
                    self.journals.room(given).request(operation, known=remote, experiment_id=given, **arguments)
                return True
        self._check_change(operation, given, **arguments)
        before = self._left.get(str(arguments.get("new_name")))  # whose name it was
        more: dict[str, Any] = {"after": [before]} if before is not None and before != given else {}
        self.journals.room(given).request(operation, experiment_id=given, **arguments, **more)
        return False

    def _check_change(self, operation: str, given: str, *, new_name: str = "") -> None:
        """Refuse what the server would refuse, as far as this outbox knows: it would hold up what comes after."""
        self._refuse_no_id(given)
        if operation == "rename_experiment":
            other = self._named_here(new_name)
            if other is not None and self.shown_experiment(other.experiment_id) != self.shown_experiment(given):
                raise _exists(new_name)
            if self.journals.exists(provisional.room_of(given)) and not self._is_active(given):
                raise MlflowException("Cannot rename a non-active experiment.", error_code=INVALID_STATE)
        elif self.journals.exists(provisional.room_of(given)):
            stage = self.get_experiment(given).lifecycle_stage
            wanted = LifecycleStage.ACTIVE if operation == "delete_experiment" else LifecycleStage.DELETED
            if stage != wanted and (operation == "delete_experiment" or provisional.is_provisional(given)):
                raise no_such(f"{wanted.capitalize()} experiment", given)

    def _is_active(self, given: str) -> bool:
        return bool(self.get_experiment(given).lifecycle_stage == LifecycleStage.ACTIVE)

    def _has_to_come_after(self, given: str, *, runs: bool) -> bool:
        """Return whether other changes of an experiment wait, or (runs) a run of it is not filed as delivered."""
        room = self._room(given)
        pending = room.pending if room is not None else ()
        if any(isinstance(event, Request) and not event.known for _, event in pending):
            return True
        if not runs:
            return False
        directory = self.outbox.directory
        started = (RunReader(directory.run(run_id)).started()[0] for run_id in directory.run_ids())
        shown = self.shown_experiment(given)
        return any(run is not None and self.shown_experiment(run.experiment_id) == shown for run in started)


def _check_place(location: str) -> None:
    """Refuse a place for files that MLflow's server refuses: the experiment would wait, and all its runs with it.

    Raises:
        MlflowException: it is none that MLflow takes.
    """
    parts = urlparse(location)
    if parts.fragment or parts.params:
        msg = "'artifact_location' URL can't include fragments or params."
        raise MlflowException.invalid_parameter_value(msg)
    validate_query_string(parts.query)


def _exists(name: str) -> MlflowException:
    return MlflowException(f"Experiment '{name}' already exists.", error_code=RESOURCE_ALREADY_EXISTS)
