"""What all parts of the plugin's store share: outbox, server, journals, ids, and the names of experiments."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from mlflow_outbox import delivery, pool, stopwatch
from mlflow_outbox.destination import resolve
from mlflow_outbox.outbox import Outbox
from mlflow_outbox.outboxes import shared
from mlflow_outbox.plugin.answers import Answers
from mlflow_outbox.plugin.arrivals import Arrivals
from mlflow_outbox.plugin.ids import Ids, NotYet
from mlflow_outbox.plugin.integers import Integers
from mlflow_outbox.plugin.journals import Journals, OpenRun
from mlflow_outbox.plugin.made_here import MadeHere
from mlflow_outbox.plugin.rest import Pulse
from mlflow_outbox.plugin.wrapped import READING, Away, Server
from mlflow_outbox.settings import Settings, tell_root
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory, is_run_id

if TYPE_CHECKING:
    from mlflow_outbox_worker.ondisk import LocalRun

T = TypeVar("T")

#: MLflow's code for what is not there.
UNKNOWN: Final = "RESOURCE_DOES_NOT_EXIST"
#: And for what somebody may not do.
_FORBIDDEN: Final = "PERMISSION_DENIED"
#: And for what cannot be said now.
LATER: Final = "TEMPORARILY_UNAVAILABLE"

_DEFAULT_ROOT: Final = ".mlflow-outbox"
#: Where an experiment's name is not known because the server is away; MLflow itself has an experiment 0 of this name.
_DEFAULT_EXPERIMENT: Final = ("0", "Default")


class Base:
    """One tracking URI in one process.

    Args:
        store_uri: ``outbox+<tracking URI>``.
        artifact_uri: given by MLflow for embedded stores; the destination decides.

    Raises:
        DestinationError: what follows ``outbox+`` is no tracking URI.
        OutboxUnusable: the outbox directory cannot be made, or is not safe to use.
    """

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__()
        settings = Settings.from_environment()
        destination = resolve(store_uri)
        root = settings.root or Path(_DEFAULT_ROOT)
        directory = OutboxDirectory.create(root, destination, now_ms=time.time_ns() // 1_000_000)
        if settings.root is None:
            tell_root(root)  # a subprocess in another directory has to find what began here
        self.outbox: Outbox = shared(directory, destination, settings, pool.worker_for(settings.worker))
        self.outbox.stands_back = pool.is_member()
        delivery.prepare(self.outbox)
        self.server = Server(self.outbox)
        self.arrivals = Arrivals(self.outbox, self.server)
        self.ids = Ids(self.outbox)
        self.integers = Integers(embedded=destination.scheme not in {"http", "https", "databricks"})
        self.made_here = MadeHere(self.outbox)
        self._experiment_names: dict[str, str] = dict([_DEFAULT_EXPERIMENT])
        self.pulse = Pulse(self)
        self.server.asked = self.pulse.beat
        self.journals = Journals(self.outbox, self._experiment_names, self.pulse.beat)
        self._handed_out: set[str] = set()
        self._artifact_uris: dict[str, str] = {}
        self.answers = Answers()
        self._models_have_metrics = False
        #: Runs that were deleted when this process last heard of them.
        self._deleted: set[str] = set()
        #: Experiments that this process deleted.
        self._gone: set[str] = set()
        if destination.scheme == "sqlite":
            # As MLflow's own store does: its tables are there before anybody else, the worker too, looks for them.
            self.ask(lambda store: store)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self.server.uri}>"

    def rest(self, timeout: float) -> bool:
        """Give back threads, connections and descriptors if everything was delivered; the next call takes new ones.

        Args:
            timeout: seconds for the delivery of what is left.

        Returns:
            Whether it rests.
        """
        return self.outbox.rest(timeout) and self.server.rest()

    # -- delegation

    def _delegate(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the server's store that the outbox has no part in.

        One that changes what is not there yet, a trace that this process has just logged for instance, is called again
        once that has arrived, which is waited for as long as for an answer.

        Raises:
            MlflowException: the server is away, or said no.
        """
        is_settled = self.settle(asks_next=True)
        try:
            given = [self.ids.outgoing(arg) for arg in args]
            named = {key: self.ids.outgoing(value) for key, value in kwargs.items()}
            try:
                return self.server.ask(lambda store: getattr(store, name)(*given, **named))
            except MlflowException as error:
                if is_settled or error.error_code != UNKNOWN or READING.match(name) or not self._arrives():
                    raise
            return self.server.ask(lambda store: getattr(store, name)(*given, **named))
        except Away as away:
            raise self.server.needed(name, away, call=name) from None
        except NotYet as missing:
            raise self.server.needed(name, self.server.lacks(missing), call=name) from None

    def _arrives(self) -> bool:
        """Wait for what was logged until now to arrive, and return whether it has, but for what waits for a person."""
        if self.outbox.worker_kind == "none" or self.server.is_away():
            return False
        return self.outbox.flush(self.outbox.settings.read_timeout).pending == 0

    def __getattr__(self, name: str) -> Any:
        """Find what MLflow's stores have beyond their abstract base, for instance in a newer version."""
        if name.startswith("_") or "server" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self.server.kind(), name, None)
        if not callable(found):
            raise AttributeError(name)  # noqa: TRY004 - what __getattr__ raises
        return lambda *args, **kwargs: self._delegate(name, *args, **kwargs)

    def settle(self, *, asks_next: bool = False) -> bool:
        """Let what this process logged arrive first, for a moment: the next question is about it as often as not.

        Args:
            asks_next: the caller puts a question next, which tells an outage from a slow delivery; else it is put here.

        Returns:
            Whether it has.
        """
        end = stopwatch.seconds() + self.outbox.settings.create_timeout
        if self.server.is_away() or self.outbox.worker_kind == "none":
            return False
        if not self.journals.wrote():
            return True
        if self.server.was_away() and not self.server.answers():
            return False
        settled = bool(self.outbox.flush(max(0.0, end - stopwatch.seconds())))
        if not settled and not asks_next:
            self.server.answers()
        return settled

    def ask(self, question: Callable[[Any], T], *, quick: bool = True) -> T | None:
        """Return the server's answer, or None when it is away.

        Raises:
            MlflowException: the server said no.
        """
        try:
            return self.server.ask(question, quick=quick)
        except Away:
            return None

    def ask_about(self, subject: str, question: Callable[[Any, str], T], *, quick: bool = True) -> T:
        """Return the server's answer about a run or model, whose id there may have changed: it may be sent once more.

        Args:
            subject: its id here.
            question: gets the store and the id there, returns the answer.
            quick: as for ``Server.ask``.

        Raises:
            NotYet: it has no id there yet.
            Away: the server cannot be asked now.
            MlflowException: the server said no.
        """
        remote = self.ids.remote(subject)
        try:
            return self.server.ask(lambda store: question(store, remote), quick=quick)
        except MlflowException as error:
            if error.error_code != UNKNOWN or not self.ids.has_moved(subject):
                raise
        remote = self.ids.remote(subject)
        return self.server.ask(lambda store: question(store, remote), quick=quick)

    def ask_alone(self, what: str, subject: str, question: Callable[[Any, str], T]) -> T:
        """Return the server's answer about what the disk does not have: a slow server is waited for.

        Args:
            what: begins the sentence that says who needs the server.
            subject: as for ``ask_about``.
            question: as for ``ask_about``.

        Raises:
            MlflowException: the server cannot be asked now, or said no.
        """
        try:
            return self.ask_about(subject, question, quick=False)
        except NotYet as missing:
            away = Away(f"{missing} has not been delivered yet", sent=False)
        except Away as error:
            away = error
        raise self.server.needed(what, away) from None

    # -- runs

    def canonical(self, run_id: str) -> str:
        """Return the id under which the outbox keeps a run.

        Raises:
            MlflowException: it is no run id at all.
        """
        if not is_run_id(run_id) or provisional.is_room(run_id):
            raise MlflowException.invalid_parameter_value(f"Invalid run ID: '{run_id}'")
        return self.ids.local(run_id)

    def writable(self, run_id: str) -> OpenRun:
        """Return a run to write to, a deleted one too.

        Raises:
            MlflowException: there is no such run.
        """
        local = self.canonical(run_id)
        held = self.journals.get(local)
        if held is not None:
            return held
        known = self.local_run(local) if self.journals.exists(local) else None
        if known is not None and (
            known.view.lifecycle == "deleted" or self.shown_experiment(known.view.experiment_id) in self._gone
        ):
            self._deleted.add(local)
        if known is None and provisional.is_provisional(local) and not delivery.reading(self.outbox).remote_id(local):
            raise no_such("Run", run_id)
        params: dict[str, str] = dict(known.view.params) if known is not None else {}
        experiment = ""
        if known is None or not known.view.start_time_ms:  # what is on disk is not all
            theirs = self._asked_for(local, known)
            if theirs is not None:
                params |= theirs.data.params
                experiment = self.experiment_name(theirs.info.experiment_id) if known is None else ""
        run = self.journals.open(local, experiment)
        for key, value in params.items():
            run.params.setdefault(key, value)
        return run

    def _asked_for(self, local: str, known: LocalRun | None) -> Any:
        """Return what the server says of a run that is to be written to, or None.

        Raises:
            MlflowException: it does not know the run, and the outbox has nothing of it.
        """
        try:
            theirs = self.ask_about(local, lambda store, remote: store.get_run(remote))
        except (Away, NotYet):
            return None
        except MlflowException as error:
            # What is written waits until somebody allows it, or has the run there again.
            if error.error_code != _FORBIDDEN and known is None:
                raise
            return None
        if theirs.info.lifecycle_stage != "active":
            self._deleted.add(local)
        self._artifact_uris[local] = theirs.info.artifact_uri
        self.answers.keep(local, theirs)
        return theirs

    def active(self, run_id: str) -> OpenRun:
        """Return a run to write to as MLflow lets one write to runs that are not deleted.

        Raises:
            MlflowException: there is no such run, or it is deleted.
        """
        run = self.writable(run_id)
        if run.run_id in self._deleted:
            try:
                self._check_active(self.run_as_known(run_id))  # it may have been restored, here or elsewhere
            except MlflowException as error:
                if error.error_code != LATER:
                    raise
                local = self.local_run(run.run_id)
                if local is not None and local.view.lifecycle == "deleted":
                    raise not_active("run", run_id) from None
            else:
                self._deleted.discard(run.run_id)
        return run

    @abc.abstractmethod
    def run_as_known(self, run_id: str) -> Any:
        """Return a run; see ``RunReads``."""

    def _check_active(self, run: Any) -> None:
        if run.info.lifecycle_stage != "active":
            raise not_active("run", run.info.run_id)

    def local_run(self, run_id: str) -> LocalRun | None:
        """Return what the outbox has of a run or room, by the id under which it keeps it."""
        found: LocalRun | None = delivery.reading(self.outbox).local_run(run_id)
        return found

    # -- experiments

    def experiment_name(self, experiment_id: str) -> str:
        """Return an experiment's name, which the server is asked for if need be, else its id.

        Journals say it, because at another server it is all that tells which experiment was meant.
        """
        if experiment_id not in self._experiment_names and not provisional.is_provisional(experiment_id):
            theirs = None
            with contextlib.suppress(MlflowException):  # the server said no, which is not the matter here
                theirs = self.ask(lambda store: store.get_experiment(experiment_id))
            if theirs is not None:
                self.know_experiment(experiment_id, theirs.name)
        return self._experiment_names.get(experiment_id, experiment_id)

    def shown_experiment(self, experiment_id: str) -> str:
        """Return the id by which this process knows an experiment; MLflow compares ids, so a given one stays.

        A provisional one that another process was given is what it has become: this one finds it by its name so.
        """
        if experiment_id in self._handed_out:
            return experiment_id
        known = self.ids.become([*self._handed_out, experiment_id])  # other threads hand out more meanwhile
        theirs = known.pop(experiment_id, experiment_id)
        if provisional.is_provisional(experiment_id):
            return theirs
        return next((local for local, remote in known.items() if remote == experiment_id), experiment_id)

    def shown_experiments(self, experiment_ids: Iterable[str]) -> dict[str, str]:
        """Return what ``shown_experiment`` does of several, each of which is looked for once."""
        return {one: self.shown_experiment(one) for one in dict.fromkeys(experiment_ids) if one}

    def know_experiment(self, experiment_id: str, name: str) -> None:
        """Remember an experiment's name."""
        self._experiment_names[experiment_id] = name
        if provisional.is_provisional(experiment_id):
            self._handed_out.add(experiment_id)


def no_such(what: str, subject: str) -> MlflowException:
    """Return MLflow's error for something that is not there."""
    return MlflowException(f"{what} with id={subject} not found", error_code=RESOURCE_DOES_NOT_EXIST)


def not_active(what: str, subject: str) -> MlflowException:
    """Return MLflow's error for a write to a run or experiment that is deleted."""
    return MlflowException.invalid_parameter_value(
        f"The {what} {subject} must be in the 'active' state. Current state is deleted."
    )
