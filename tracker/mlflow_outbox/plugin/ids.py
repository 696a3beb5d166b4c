"""What ids have become: provisional ones lead to MLflow's, and these back to the journals begun under others.

What answers call a run or model
--------------------------------
A run or model that began offline has two ids for good, and user code and MLflow itself compare ids of an answer with
those that they asked by: MLflow finds the model of ``runs:/<id>/<name>`` by the run's id in a search for that name.
A search does not always say by which id its answer is meant to be read, so one rule holds for all answers: **a run or
model is called what this process called it last** when it began here, was read or was named in a filter. MLflow reads
the run before it searches, so that either id finds its models. What this process has called by none of its ids is
called by the server's. The ids are those fields of an answer that hold nothing else; texts, tags among them, are shown
as they are. An experiment is called what a search asked for if that was a provisional id, else as
``Base.shown_experiment`` says.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import Assessment

from mlflow_outbox import delivery
from mlflow_outbox.spool import provisional

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox

_OF_RUN_OR_MODEL: Final = re.compile(r"\b(?:m-)?[0-9a-f]{32}\b")


class NotYet(Exception):
    """Raised when something that exists only here is to be named to the server."""


class Ids:
    """The map of one outbox between provisional ids and MLflow's; what is known is remembered.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._remote: dict[str, str] = {}
        self._local: dict[str, str] = {}
        self._lock = threading.Lock()
        #: When this process called a run or model last by a provisional id, and by the server's.
        self._called_here: dict[str, int] = {}
        self._called_there: dict[str, int] = {}
        self._turns = itertools.count()

    def remote(self, given: str) -> str:
        """Return MLflow's id of a run, model or experiment.

        Raises:
            NotYet: it has none yet.
        """
        if not provisional.is_provisional(given):
            return self._remote.get(given, given)
        found = self._remote.get(given) or self._ask(given)
        if not found:
            raise NotYet(given)
        self._remote[given] = found
        return found

    def become(self, given: Iterable[str]) -> dict[str, str]:
        """Return MLflow's ids of several runs, models and experiments, of those that have one, with one look for all.

        While the server is away there may be thousands that have none yet, and a look takes a millisecond.
        """
        ids = dict.fromkeys(given)
        unknown = [one for one in ids if provisional.is_provisional(one) and one not in self._remote]
        noted = {note: one for one in unknown if (note := _note_of(one))}
        runs = [one for one in unknown if not _note_of(one)]
        reading = delivery.reading(self._outbox)
        if noted:
            self._remote.update({noted[name]: remote for name, remote in reading.metas([*noted]).items()})
        if runs:
            self._remote.update(reading.remote_ids(runs))
        return {
            one: self._remote.get(one, one) for one in ids if one in self._remote or not provisional.is_provisional(one)
        }

    def has_moved(self, given: str) -> bool:
        """Return whether the id that MLflow gave to a run or model has become another one: it was sent once more.

        Only to be asked when MLflow does not know an id, because that takes a look at the worker's notes.
        """
        before = self._remote.pop(given, given)
        found = self._ask(given)
        if found:
            self._remote[given] = found
        return bool(found) and found != before

    def _ask(self, given: str) -> str:
        reading = delivery.reading(self._outbox)
        note = _note_of(given)
        return str(reading.meta(note) if note else reading.remote_id(given))

    def local(self, given: str) -> str:
        """Return the id under which this outbox keeps a run: the provisional one, if it began with one."""
        if provisional.is_provisional(given):
            return given
        held = self._local.get(given)
        if held is None:
            held = delivery.reading(self._outbox).local_id(given) or given
            self._local[given] = held
        return held

    def called(self, given: str) -> None:
        """Take note that this process called a run or model by an id."""
        calls = self._called_here if provisional.is_provisional(given) else self._called_there
        calls[given] = next(self._turns)

    def names(self) -> dict[str, str]:
        """Return what answers are to call runs and models, by an id of theirs; what is not in it stays as it is."""
        found = {}
        called = list(self._called_here.items())
        known = self.become(local for local, _ in called)
        for local, turn in called:
            remote = known.get(local)
            if remote is None:
                continue
            if turn > self._called_there.get(remote, -1):
                found[remote] = local
            else:
                found[local] = remote
        return found

    def remember(self, given: str) -> None:
        """Take note that a run was made by the server and is kept under its id."""
        self._local[given] = given

    def asked(self, experiments: Iterable[str]) -> dict[str, str]:
        """Return what an answer is to call experiments that were asked for by provisional ids, as ``names``."""
        known = self.become(given for given in experiments if provisional.is_provisional(given))
        return {remote: given for given, remote in known.items()}

    def searched(self, text: str | None) -> str | None:
        """Return a filter with MLflow's ids in place of provisional ones; runs and models are called as it does.

        Raises:
            NotYet: one of them has none yet.
        """
        for given in _OF_RUN_OR_MODEL.findall(text or ""):
            self.called(given)
        found: str | None = self.outgoing(text)
        return found

    def partly_outgoing(self, text: str) -> str:
        """Return a text with MLflow's ids in place of those provisional ones that have become one."""

        def become(found: re.Match[str]) -> str:
            try:
                return self.remote(found.group())
            except NotYet:
                return found.group()

        return provisional.PATTERN.sub(become, text)

    def outgoing(self, value: Any) -> Any:
        """Return a value (texts, lists and mappings of them) with MLflow's ids in place of provisional ones.

        Of an assessment these are the ids that MLflow puts into it; what its author wrote stays.

        Raises:
            NotYet: one of them has none yet.
        """
        if isinstance(value, Assessment):
            sent = copy.copy(value)  # the caller's own goes on calling the run as he does
            sent.run_id, sent.metadata = self.outgoing(value.run_id), self.outgoing(value.metadata)
            return sent
        if isinstance(value, str):
            if not provisional.PATTERN.search(value):
                return value  # as it is: members of MLflow's enumerations are strings too
            return provisional.PATTERN.sub(lambda found: self.remote(found.group()), value)
        if isinstance(value, list):
            return [self.outgoing(item) for item in value]
        if isinstance(value, dict):
            return {key: self.outgoing(item) for key, item in value.items()}
        return value


def _note_of(given: str) -> str:
    """Return under what name the worker notes the id that a model or an experiment was given; "" for a run."""
    if given.isdigit():
        return f"experiment/{given}"
    return f"model/{given}" if given.startswith("m-") else ""
