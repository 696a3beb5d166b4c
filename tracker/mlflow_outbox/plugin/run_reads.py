"""Reading runs: from the server with what is pending, from the outbox while the server is away."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import LifecycleStage, Metric, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking import SEARCH_MAX_RESULTS_DEFAULT, SEARCH_MAX_RESULTS_THRESHOLD
from mlflow.utils.search_utils import SearchUtils

from mlflow_outbox import delivery
from mlflow_outbox.plugin import reads
from mlflow_outbox.plugin.base import no_such
from mlflow_outbox.plugin.experiments import Experiments
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import say_once
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.views import RunView

if TYPE_CHECKING:
    from mlflow_outbox_worker.ondisk import LocalRun

#: Points asked for in one page of a metric's history.
_PAGE: Final = 25_000
#: Runs that are remembered while the server is away, because reading all of one takes long when much has piled up.
_OFFLINE: Final = 16


class RunReads(Experiments):
    """What readers of runs ask."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        self._offline_lock = threading.RLock()  # a signal handler may read a run while its thread does
        #: With the server's last answer of those that began elsewhere.
        self._offline_runs: dict[str, tuple[LocalRun, Run | None]] = {}
        #: A database is behind the outbox, or behind its server, which shows infinities as the largest number.
        self._bounded = self.outbox.destination.scheme not in {"file", "databricks"}

    def get_run(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            MlflowException: there is none of this id, or only the server would know and is away.
        """
        return self.run_as_known(run_id, patient=True)

    def run_as_known(self, run_id: str, *, patient: bool = False) -> Run:
        """Return a run as ``get_run`` does.

        Args:
            run_id: its id.
            patient: ask a slow server that is all that knows it for ``read_timeout``; a call that writes does not.

        Raises:
            MlflowException: as there.
        """
        local_id = self.canonical(run_id)
        self.ids.called(run_id)
        if not self._can_answer(local_id):
            found = self._offline(local_id, run_id)
            if found is not None:
                return found
        else:
            self._offline_runs.clear()
        local = self._waiting(local_id)
        theirs: Run | None = None
        away: Away | None = None
        try:
            theirs = self.ask_about(local_id, lambda store, remote: store.get_run(remote))
        except NotYet:
            pass
        except Away as error:
            away = error
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" or local is None or not local.pending:
                raise
        if theirs is None:
            found = self._offline(local_id, run_id)
            if found is not None:
                return found
            if away is None:
                return self._unwritten(local_id, run_id, local)
            if not patient:
                raise self.server.needed(f"the run {run_id}", away)
            theirs = self.ask_alone(f"the run {run_id}", local_id, lambda store, remote: store.get_run(remote))
        self.answers.keep(local_id, theirs)
        uri = self.shown_uri("run", local_id, theirs.info.artifact_uri)
        pending = local.pending if local is not None else ()
        return self._placed(reads.folded(theirs, pending, run_id, uri, bounded=self._bounded))

    def _can_answer(self, local_id: str) -> bool:
        """Return whether the server has a run and was not away when it was asked last, this time if need be."""
        try:
            remote = self.ids.remote(local_id)
        except NotYet:
            return False
        if self.server.was_away():
            try:
                self.server.ask(lambda store: store.get_run(remote), quick=True)
            except Away:
                return False
            except MlflowException:
                pass  # it is there, and says no again below
        return True

    def _offline(self, local_id: str, run_id: str) -> Run | None:
        """Return a run as the outbox has it, having read no more than what is new since the last time.

        Of one that began elsewhere that is the server's last answer with all in it that is on disk; None without one.
        """
        reading = delivery.reading(self.outbox)
        with self._offline_lock:
            before, theirs = self._offline_runs.pop(local_id, (None, None))
            local = reading.local_run(local_id, before)
            if local is not None and local is not before:
                theirs = None if local.view.start_time_ms else self.answers.of(local_id)
                if theirs is not None:
                    begun = copy.copy(local)
                    begun.view, begun.cursors = reads.view_of(theirs), {}
                    local = reading.local_run(local_id, begun)
            if local is None or not local.view.start_time_ms:
                return None
            local.pending = []
            self._offline_runs[local_id] = local, theirs
            while len(self._offline_runs) > _OFFLINE:
                self._offline_runs.pop(next(iter(self._offline_runs)), None)
            run = reads.local_run_of(local, run_id, self._uri(local_id), theirs=theirs, bounded=self._bounded)
            if theirs is not None:
                return self._placed(run)
            if run.info.experiment_id not in self._handed_out:  # else it is called so, and the ledger need not be asked
                run.info._experiment_id = self.shown_experiment(run.info.experiment_id)
            return self._staged(run)

    def _unwritten(self, local_id: str, run_id: str, local: LocalRun | None) -> Run:
        """Return a run that began in this process when there was no room to write so.

        Args:
            local_id: the id under which the outbox keeps it.
            run_id: as it was asked for.
            local: what was written of it later.

        Raises:
            MlflowException: it began nowhere.
        """
        held = self.journals.get(local_id)
        if held is None or held.begun is None:
            raise no_such("Run", run_id)
        view = local.view if local is not None else RunView()
        view.fold(held.begun, "")
        return self._staged(reads.run_of(view, run_id, self._uri(local_id), bounded=self._bounded))

    def _waiting(self, local_id: str) -> LocalRun | None:
        """Return what the outbox has of a run, or None when all of it was delivered: reading it is for nothing then."""
        return self.local_run(local_id) if self.outbox.directory.segments(local_id) else None

    def _placed(self, run: Run, names: dict[str, str] | None = None) -> Run:
        if names is None:
            names = self.ids.names() if run.inputs.model_inputs or run.outputs.model_outputs else {}
        reads.named(run, names)
        run.info._experiment_id = names.get(run.info.experiment_id) or self.shown_experiment(run.info.experiment_id)
        return self._staged(run)

    def _staged(self, run: Run) -> Run:
        """Show a run as deleted when its experiment is, with which MLflow deletes it."""
        if self.is_gone(run.info.experiment_id):
            run.info._lifecycle_stage = LifecycleStage.DELETED
        return run

    def _uri(self, local_id: str) -> str:
        return self.shown_uri("run", local_id, self._artifact_uris.get(local_id))

    def get_metric_history(
        self, run_id: str, metric_key: str, max_results: int | None = None, page_token: str | None = None
    ) -> PagedList:
        """Return every point of a metric.

        Raises:
            MlflowException: only the server would know and is away.
        """
        local_id = self.canonical(run_id)
        pending: list[Metric] = []
        if self.outbox.directory.segments(local_id):  # as in _waiting
            delivered = delivery.reading(self.outbox).delivered(local_id)
            pending = self._points_on_disk(local_id, metric_key, delivered)
        try:
            found = self.ask_about(
                local_id,
                lambda store, remote: store.get_metric_history(
                    remote, metric_key, max_results=max_results, page_token=page_token
                ),
                quick=False,
            )
        except (Away, NotYet) as away:
            known = self.local_run(local_id)
            # The pages before this one were the server's, which has more than the disk of a run that began elsewhere.
            if known is None or (page_token is not None and not known.view.start_time_ms):
                raise self.server.needed(
                    f"the metric {metric_key} of run {run_id}", Away(str(away), sent=False)
                ) from None
            on_disk = reads.merged_points((), self._points_on_disk(local_id, metric_key), as_logged=self._as_logged)
            return PagedList(on_disk[SearchUtils.parse_start_offset_from_page_token(page_token) :], None)
        token = getattr(found, "token", None)
        if token is not None or not pending:
            return PagedList(list(found), token)
        if page_token is not None:  # a point that the server has, and the outbox does not know it yet, is on any page
            pending = reads.unseen_points(self._history(local_id, metric_key), pending)
        return PagedList(reads.merged_points(found, pending, as_logged=self._as_logged), None)

    @property
    def _as_logged(self) -> bool:
        return self.outbox.destination.scheme == "file"

    def _history(self, local_id: str, key: str) -> list[Metric]:
        """Return what the server has of a metric.

        Raises:
            MlflowException: it has gone away since the question before.
        """
        found: list[Metric] = []
        token = None
        while True:
            try:
                some = self.ask_about(
                    local_id,
                    lambda store, remote: store.get_metric_history(remote, key, max_results=_PAGE, page_token=token),  # noqa: B023 - called before the next turn
                    quick=False,
                )
            except (Away, NotYet) as away:
                raise self.server.needed(f"the metric {key}", Away(str(away), sent=False)) from None
            found += some
            if not some.token or some.token == token:
                return found
            token = some.token

    def _points_on_disk(self, local_id: str, key: str, behind: Mapping[str, Cursor] | None = None) -> list[Metric]:
        found: list[Metric] = []
        directory = self.outbox.directory
        reader = RunReader(directory.run(local_id), directory.delivered / local_id)  # what is filed meanwhile is moved
        cursors: Mapping[str, Cursor] = behind or {}
        while True:
            window = reader.window(cursors, points=_PAGE, items=_PAGE)
            found += reads.points(window.events, key, bounded=self._bounded)
            if not window.more:
                return found
            cursors = window.cursors

    def search_runs(
        self,
        experiment_ids: list[str],
        filter_string: str,
        run_view_type: int,
        max_results: int = SEARCH_MAX_RESULTS_DEFAULT,
        order_by: list[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList:
        """Return runs: the server's and those on their way; those of this outbox while the server is away.

        Raises:
            MlflowException: the server is away and this outbox has no run in these experiments, or the server said
                no.
        """
        return PagedList(
            *self._search_runs(experiment_ids, filter_string, run_view_type, max_results, order_by or [], page_token)
        )

    def _search_runs(
        self,
        experiment_ids: list[str],
        filter_string: str,
        run_view_type: int,
        max_results: int,
        order_by: list[str],
        page_token: str | None,
    ) -> tuple[list[Run], str | None]:
        wanted = [str(number) for number in experiment_ids]
        self.settle(asks_next=bool(self._known(wanted)))  # the server filters and orders by what it has
        known = self._known(wanted)
        local = self._local_runs({*wanted, *known}, filed=False)  # the server has the others
        page: tuple[list[Run], str | None]
        fresh = [run for run in local if not run.remote_id and provisional.is_provisional(run.run_id)]
        mixed = self._matching([self._local_entity(run) for run in fresh], filter_string, run_view_type, None)
        asked = self._outgoing_filter(filter_string)
        runs: list[Run] = []
        token = None
        if mixed and known:
            self._check_size(max_results)
        try:
            if mixed and known:  # they may belong on any page: pages are cut here, from the server's up to this one
                wanted_runs = SearchUtils.parse_start_offset_from_page_token(page_token) + max_results + 1
                runs = self._first(known, asked, run_view_type, wanted_runs, order_by)
            elif known:
                runs, token = self.server.ask(
                    lambda store: store._search_runs(known, asked, run_view_type, max_results, order_by, page_token)
                )
            elif wanted and self.server.was_away() and not self.server.answers():
                # It may know experiments of these names all the same, from others.
                raise Away("what they have begun is not delivered yet", sent=False)
        except Away as away:
            self._check_size(max_results)
            local = self._local_runs({*wanted, *known}, filed=True)
            if not local:
                raise self.server.needed("a search for runs that this outbox did not make", away) from None
            say_once(self.outbox, "search", "the server is away, so a search for runs found only those of this outbox")
            found = self._matching([self._local_entity(run) for run in local], filter_string, run_view_type, order_by)
            page = SearchUtils.paginate(found, page_token, max_results)
            return page
        mine = {run.remote_id or run.run_id: run for run in local}
        experiments = self.shown_experiments(run.info.experiment_id for run in runs)
        names = {**self.ids.names(), **experiments, **self.ids.asked(wanted)}
        shown = [self._shown(run, mine.get(run.info.run_id), names) for run in runs]
        if not mixed:
            return shown, token
        arrived = {run.data.tags.get(provisional.RUN_ID_TAG) for run in runs}  # since the ledger was read
        shown += [run for run in mixed if run.info.run_id not in arrived]
        page = SearchUtils.paginate(SearchUtils.sort(shown, order_by), page_token, max_results)
        return page

    def _check_size(self, size: int) -> None:
        """Refuse the size of a page that is cut here as MLflow does.

        Raises:
            MlflowException: it is none that MLflow takes.
        """
        if size > SEARCH_MAX_RESULTS_THRESHOLD:
            wanted = f"at most {SEARCH_MAX_RESULTS_THRESHOLD}"
        elif size <= 0 and not self._as_logged:  # a file store takes those
            wanted = "a positive integer"
        else:
            return
        msg = f"Invalid value {size} for parameter 'max_results' supplied. It must be {wanted}"
        raise MlflowException.invalid_parameter_value(msg)

    def _known(self, experiments: list[str]) -> list[str]:
        """Return MLflow's ids of those experiments that it has."""
        known = self.ids.become(experiments)
        return [known[number] for number in experiments if number in known]

    def _first(self, known: list[str], asked: str | None, view: int, count: int, order_by: list[str]) -> list[Run]:
        """Return the first runs that the server finds, in as many requests as it takes."""
        found: list[Run] = []
        token = None
        while len(found) < count:
            size = min(count - len(found), SEARCH_MAX_RESULTS_THRESHOLD)
            some, token = self.server.ask(
                lambda store: store._search_runs(known, asked, view, size, order_by, token)  # noqa: B023 - called before the next turn
            )
            found += some
            if not token:
                break
        return found

    def _local_runs(self, experiments: set[str], *, filed: bool) -> list[Any]:
        meant: dict[str, bool] = {}

        def among(number: str) -> bool:
            if number not in meant:
                meant[number] = bool({number, self.ids.become([number]).get(number, number)} & experiments)
            return meant[number]

        found = delivery.reading(self.outbox).local_runs(filed=filed, among=among)
        return [run for run in found if among(run.view.experiment_id)]

    def _outgoing_filter(self, text: str | None) -> str | None:
        try:
            return self.ids.searched(text)
        except NotYet:  # of one; the server has the others
            return self.ids.partly_outgoing(text or "")

    def _local_entity(self, run: Any) -> Run:
        return self._staged(reads.local_run_of(run, run.run_id, self._uri(run.run_id), bounded=self._bounded))

    def _shown(self, run: Run, local: Any, names: dict[str, str]) -> Run:
        home = local.run_id if local is not None else self._home(run)
        uri = self.shown_uri("run", home, run.info.artifact_uri)
        pending = local.pending if local is not None else ()
        run_id = names.get(run.info.run_id, run.info.run_id)
        return self._placed(reads.folded(run, pending, run_id, uri, bounded=self._bounded), names)

    def _home(self, run: Run) -> str:
        """Return the id under which the outbox keeps a run of the server's; of one that it has not, the server's."""
        mark = run.data.tags.get(provisional.RUN_ID_TAG, "")  # of one that began offline, what it was called then
        if provisional.is_provisional(mark) and self.journals.exists(mark):
            with contextlib.suppress(NotYet):
                return mark if self.ids.remote(mark) == run.info.run_id else str(run.info.run_id)
        return str(run.info.run_id)

    @staticmethod
    def _matching(runs: list[Run], filter_string: str, view: int, order_by: list[str] | None) -> list[Run]:
        stages = set(_stages(view))
        runs = [run for run in runs if run.info.lifecycle_stage in stages]
        return list(SearchUtils.sort(SearchUtils.filter(runs, filter_string), order_by))


def _stages(view: int) -> list[str]:
    return {ViewType.ACTIVE_ONLY: ["active"], ViewType.DELETED_ONLY: ["deleted"]}.get(view, ["active", "deleted"])
