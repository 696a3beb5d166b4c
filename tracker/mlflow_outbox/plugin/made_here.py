"""What was made through this outbox, as its journals say: all that is known of a model while the server is away.

Of a run or model that began here everything is on disk: that it has no file, or no file of some name, can be said
without the server. The same goes for a search. MLflow makes one for a model's name whenever it lists a folder of a
run (the model may be what the folder is called after) and to choose an active model, which it makes when there is
none; so a search for a name is answered while the server is away, with what was made here. Other searches are where
something here is in the experiments that are searched, but for those by metrics of models, which need the server: the
points that belong to a model are in the journals of any runs, and not all there any more once they were delivered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking import SEARCH_LOGGED_MODEL_MAX_RESULTS_DEFAULT
from mlflow.utils.search_utils import SearchLoggedModelsUtils

from mlflow_outbox import delivery
from mlflow_outbox.plugin import reads
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import say_once
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import argument_of
from mlflow_outbox.views import Kept

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.plugin.base import Base
    from mlflow_outbox_worker.reading import LocalRun

#: Journals whose reading is remembered, so that the next time only what is new in them is read.
_REMEMBERED: Final = 512
_OF_A_NAME: Final = re.compile(r"\s*(?:attributes?\.)?name\s*=\s*'[^']*'\s*")


class MadeHere:
    """The runs and models that the journals of one outbox say were made.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._read: dict[str, LocalRun] = {}

    def began(self, kind: str, subject: str, home: str) -> bool:
        """Return whether a "run" or "model" was made through this outbox, so that what is on disk is all there is.

        That is not known of one whose journal is gone, after the retention time, or that another outbox made.

        Args:
            kind: what it is.
            subject: its id here.
            home: the run or room whose journal it is in.
        """
        if kind == "model":
            return _makes(self._requests(home), subject)
        local: LocalRun | None = delivery.reading(self._outbox).local_run(home)
        return kind == "run" and local is not None and bool(local.view.start_time_ms)  # a resumption leaves that open

    def home_of_model(self, model_id: str) -> str | None:
        """Return the run or room whose journal says that a model was made, by any process with this outbox."""
        return next((home for home in self._homes() if _makes(self._requests(home), model_id)), None)

    def models(self, location: Callable[[str], str]) -> Iterator[LoggedModel]:
        """Yield the models that were made here and not deleted.

        Args:
            location: gives the artifact URI of a model.
        """
        for home in self._homes():
            requests = self._requests(home)
            for request in requests:
                if request.operation != "create_logged_model":
                    continue
                model_id = argument_of(request.arguments, "model_id")
                found = reads.model_of(requests, model_id, None, location(model_id))
                if found is not None and not reads.is_deleted(requests, model_id):
                    yield found

    def _homes(self) -> list[str]:
        directory = self._outbox.directory
        return list(dict.fromkeys([*directory.run_ids(), *directory.delivered_ids()]))

    def _requests(self, home: str) -> list[Kept]:
        # Whoever reads on takes what was read before out of the way of other threads, which begin anew meanwhile.
        before = self._read.pop(home, None)
        if before is None or self._outbox.directory.run(home).is_dir():  # what is filed does not change any more
            before = delivery.reading(self._outbox).local_run(home, before)
        if before is None:
            return []
        before.pending = []
        requests = list(before.view.requests)
        self._read[home] = before
        while len(self._read) > _REMEMBERED:
            self._read.pop(next(iter(self._read)), None)
        return requests


def search(
    store: Base,
    location: Callable[[str], str],
    experiment_ids: list[str],
    filter_string: str | None = None,
    datasets: list[dict[str, Any]] | None = None,
    max_results: int | None = None,
    order_by: list[dict[str, Any]] | None = None,
    page_token: str | None = None,
) -> PagedList:
    """Return logged models as the server finds them, after what was logged here has had a moment to arrive.

    Args:
        store: the plugin's.
        location: gives the artifact URI of a model.
        experiment_ids: see MLflow for these and the others.
        filter_string: as above.
        datasets: as above.
        max_results: as above.
        order_by: as above.
        page_token: as above.

    Raises:
        MlflowException: the server is away, and it is no search for a name, nor in experiments with models that were
            made here, or it is one by metrics; or the server said no.
    """
    store.settle(asks_next=True)
    wanted = [str(number) for number in experiment_ids]
    try:
        remote, question = store.ids.outgoing(wanted), store.ids.searched(filter_string)
        theirs: PagedList = store.server.ask(
            lambda theirs: theirs.search_logged_models(remote, question, datasets, max_results, order_by, page_token)
        )
        return _named(store, theirs, wanted)
    except Away as error:
        away = error
    except NotYet as missing:
        away = store.server.lacks(missing)
    if datasets or _names_metrics(filter_string, order_by):
        raise store.server.needed("a search for models by their metrics", away) from None
    numbers = {*wanted, *(_remote(store, number) for number in wanted)}
    found = [
        m for m in store.made_here.models(location) if {m.experiment_id, _remote(store, m.experiment_id)} & numbers
    ]
    if not (
        found
        or all(provisional.is_provisional(number) for number in wanted)
        or _OF_A_NAME.fullmatch(filter_string or "")
    ):
        raise store.server.needed("a search for models that this outbox did not make", away) from None
    say_once(store.outbox, "models", "the server is away, so a search for models found only those that were made here")
    matching = SearchLoggedModelsUtils.filter_logged_models(found, filter_string, datasets)
    page, token = SearchLoggedModelsUtils.paginate(
        SearchLoggedModelsUtils.sort(matching, order_by),
        page_token,
        max_results or SEARCH_LOGGED_MODEL_MAX_RESULTS_DEFAULT,
    )
    return _named(store, PagedList(page, token), wanted)


def _named(store: Base, page: PagedList, wanted: list[str]) -> PagedList:
    names = {**store.ids.names(), **store.ids.asked(wanted)}
    for model in page:
        store.named(model, names)
    return page


def _names_metrics(filter_string: str | None, order_by: list[dict[str, Any]] | None) -> bool:
    """Return whether a search needs metrics of models, which any run may have logged: only the server has them all."""
    try:
        clauses = SearchLoggedModelsUtils.parse_search_filter(filter_string)
    except MlflowException:  # no filter; what is to be said of the server comes first
        clauses = []
    return any(clause["type"] == "metric" for clause in clauses) or any(
        str(order.get("field_name", "")).startswith("metrics.") for order in order_by or ()
    )


def _remote(store: Base, experiment_id: str) -> str:
    try:
        return store.ids.remote(experiment_id)
    except NotYet:
        return experiment_id


def _makes(requests: list[Kept], model_id: str) -> bool:
    return any(
        kept.operation == "create_logged_model" and argument_of(kept.arguments, "model_id") == model_id
        for kept in requests
    )
