"""What was made through this outbox, as its journals say: all that is known of a model while the server is away.

Of a run or model that began here everything is on disk: that it has no file, or no file of some name, can be said
without the server. The same goes for a search. MLflow makes one for a model's name whenever it lists a folder of a
run (the model may be what the folder is called after) and to choose an active model, which it makes when there is
none; so a search for a name is answered while the server is away, with what was made here. Other searches are where
something here is in the experiments that are searched, but for those by metrics of models, which need the server: the
points that belong to a model are in the journals of any runs, and not all there any more once they were delivered.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking import SEARCH_LOGGED_MODEL_MAX_RESULTS_DEFAULT
from mlflow.utils.search_utils import SearchLoggedModelsUtils

from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import say_once
from mlflow_outbox.plugin.remembered import Journal, Remembered
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import argument_of
from mlflow_outbox.views import Kept

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.plugin.base import Base

#: Journals whose requests are remembered, a few kilobytes of each; fewer where they have many.
_REMEMBERED: Final = 10_000
_OF_A_NAME: Final = re.compile(r"\s*(?:attributes?\.)?name\s*=\s*'[^']*'\s*")


class MadeHere:
    """The runs and models that the journals of one outbox say were made.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._journals = Remembered(outbox, _REMEMBERED, files=False)

    def forked(self) -> None:
        """Renew the lock in a forked child."""
        self._journals.forked()

    def began(self, kind: str, subject: str, home: str) -> bool:
        """Return whether a "run" or "model" was made through this outbox, so that what is on disk is all there is.

        That is not known of one whose journal is gone, after the retention time, or that another outbox made.

        Args:
            kind: what it is.
            subject: its id here.
            home: the run or room whose journal it is in.
        """
        found = self.journal(home)
        if found is None:
            return False
        return _makes(found.requests, subject) if kind == "model" else kind == "run" and found.began

    def journal(self, home: str) -> Journal | None:
        """Return what the outbox has of a run or room but for its points and files, or None when it has nothing."""
        return self._journals.journal(home)

    def home_of_model(self, model_id: str) -> str | None:
        """Return the run or room whose journal says that a model was made, by any process with this outbox."""
        return next((one.home for one in self._all() if _makes(one.requests, model_id)), None)

    def models(self, location: Callable[[str], str]) -> Iterator[LoggedModel]:
        """Yield the models that were made here and not deleted.

        Args:
            location: gives the artifact URI of a model.
        """
        for journal in self._all():
            for model in journal.models():
                shown = copy.copy(model)  # the caller's own, to be named and changed
                shown._artifact_location = location(model.model_id)
                shown._tags, shown._params, shown._metrics = dict(model.tags), dict(model.params), list(model.metrics)
                yield shown

    def _all(self) -> list[Journal]:
        directory = self._outbox.directory
        return self._journals.journals(dict.fromkeys([*directory.run_ids(), *directory.delivered_ids()]))


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
    made = list(store.made_here.models(location))
    known = store.ids.become([*wanted, *(model.experiment_id for model in made)])
    numbers = {*wanted, *(known.get(number, number) for number in wanted)}
    found = [m for m in made if {m.experiment_id, known.get(m.experiment_id, m.experiment_id)} & numbers]
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
    experiments = store.shown_experiments(model.experiment_id for model in page)
    names = {**store.ids.names(), **experiments, **store.ids.asked(wanted)}
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


def _makes(requests: list[Kept], model_id: str) -> bool:
    return any(
        kept.operation == "create_logged_model" and argument_of(kept.arguments, "model_id") == model_id
        for kept in requests
    )
