"""Requests of MLflow's own that travel through a journal, with MLflow's ids in them, and what an answer means.

Once in effect: most of these requests change nothing when they are made again. The others are recognised by their
answers (a row that exists; a model's param has to have the value, too), or carry a tag of the outbox by which what they
create is found before it is created, and made whole.

A database keeps one point of a model's metric for each run, time and step. Another one of those is refused with all
that is beside it, for ever, in the words in which it says that two requests met at a row. So each point of such a
request is sent once more, alone, and what is refused then is refused for good.

A trace that was deleted, or put into the server's archive, never takes again what is refused for that. So that is
refused for good, unless the trace may be on its way: what is behind it in its room are other traces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from mlflow_outbox import linked
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request, arguments_of
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.precedence import Precedence, Waits
from mlflow_outbox_worker.remote_ids import RemoteIds
from mlflow_outbox_worker.requeue import REFUSED
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source

_ROW_EXISTS: Final = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry|already been logged", re.IGNORECASE)
#: Operations whose list argument is sent one by one, so that one row that exists does not hold back the others.
_ONE_BY_ONE: Final = {"log_outputs": "models", "log_logged_model_params": "params"}
_OF_EXPERIMENTS: Final = frozenset(
    {"create_experiment", "set_experiment_tag", "delete_experiment_tag"}
    | {"rename_experiment", "delete_experiment", "restore_experiment"}
)
#: What is done to a model that is there.
_OF_MODELS: Final = frozenset(
    {"finalize_logged_model", "set_logged_model_tags", "delete_logged_model_tag"}
    | {"log_logged_model_params", "delete_logged_model"}
)
#: The table, or a rule of it, that names itself where a model has a point of that time and step.
_POINTS_OF_MODELS: Final = "logged_model_metrics"
#: Where an experiment is in the state already that these lead to, MLflow says that there is none.
_LIFECYCLE: Final = frozenset({"delete_experiment", "restore_experiment"})
#: What is said where a trace is not there: by a database of a row that names none, by all else in MLflow's words.
_NO_TRACE: Final = re.compile(r"foreign key|\btrace with id\b.* not found", re.IGNORECASE)
#: And where its spans are in the server's archive.
_ARCHIVED: Final = re.compile(r"archived trace|DB-backed")
_DELETES: Final = frozenset(
    {"delete_tag", "delete_experiment_tag", "delete_logged_model_tag", "delete_trace_tag", "delete_logged_model"}
)


class Calls:
    """Makes the requests of one outbox; used by several threads.

    Args:
        source: where the runs come from.
        sink: the tracking store.
        ledger: where ids are recorded.
        precedence: of others that make requests of the same outbox; None makes one.

    Attributes:
        precedence: what waits for what.
        ids: what ids in a request have become.
    """

    def __init__(self, source: Source, sink: Sink, ledger: Ledger, precedence: Precedence | None = None) -> None:
        self._source = source
        self._sink = sink
        self._ledger = ledger
        self.precedence = precedence or Precedence(source, ledger)
        self.ids = RemoteIds(source, sink, ledger, self.precedence)

    # -- requests

    def make(self, request: Request, refuse: Callable[[Request, SinkError], bool], *, of: str) -> bool:
        """Make one request; return False when MLflow refused all of it.

        Args:
            request: as logged.
            of: the run that it was logged to.
            refuse: told what MLflow refuses, the request or a part of it; returns False when it has it already.

        Raises:
            Waits: something that it names is not there yet.
            SinkError: it is about a model that MLflow refused to make.
            LedgerUnavailable: the ledger could not be used.
        """
        if request.operation in _OF_EXPERIMENTS and self._source.experiment(""):
            return True  # all goes into one experiment, which is not the one that it was about
        if request.operation == "create_logged_model":
            return self._create_model(request, refuse, of)
        if request.operation == "create_experiment":
            return self._create_experiment(request, refuse, of)
        if request.known:
            return True
        if request.operation in _OF_MODELS:
            self.ids.check_model(_text(request.arguments, "model_id"))
        if request.operation == "delete_experiment":
            self._await_runs(request, of)
        if request.operation == "rename_experiment":
            request = self._await_name(request)
        if request.operation == "set_trace_tag":
            refuse = self._unless_on_its_way(refuse, of)
        parts = _parts(request.operation, self.ids.rewritten(self._placed(request, of).decode(), of=of))
        made = [self._call(request, part, refuse) for part in parts]
        return any(made) or not made

    def make_together(self, requests: Sequence[Request], *, of: str) -> bool:
        """Make requests of points as one; return False when a database refuses one of them for what it has.

        Args:
            requests: a group of ``linked``.
            of: the run that they were logged to.

        Raises:
            SinkError: nothing of them is there.
            Waits: something that they name is not there yet.
            LedgerUnavailable: the ledger could not be used.
        """
        body = self.ids.rewritten(self._placed(linked.joined(requests), of).decode(), of=of)
        try:
            self._sink.call(linked.OPERATION, body)
        except SinkError as error:
            if not _is_about_points_of_models(linked.OPERATION, error):
                raise
            return False
        return True

    def _await_runs(self, request: Request, of: str) -> None:
        """Let the runs come first that were logged in an experiment before it was deleted: MLflow takes none later.

        Raises:
            Waits: one of them is not delivered up to there.
        """
        local = _text(request.arguments, "experiment_id")
        run_id = self.precedence.run_before(of, request.time_ms, {local, self.ids.experiment(local, of)})
        if run_id:
            what = f"run {run_id}, which was logged before its experiment was deleted"
            raise Waits(what, run_id)

    def _await_name(self, request: Request) -> Request:
        """Return the request of a rename, when the experiment whose name it was has another one by now.

        Raises:
            Waits: it has not.
        """
        arguments = arguments_of(request.arguments)
        for earlier in arguments.pop("after", None) or ():
            self.ids.await_rename(earlier, request.time_ms)
        return msgspec.structs.replace(request, arguments=msgspec.json.encode(arguments))

    def _unless_on_its_way(
        self, refuse: Callable[[Request, SinkError], bool], of: str
    ) -> Callable[[Request, SinkError], bool]:
        """Return what is told of a tag that MLflow refuses, once the tag's trace cannot be on its way any more."""

        def told(part: Request, error: SinkError) -> bool:
            if error.kind == "answer" and _NO_TRACE.search(str(error)):
                self.precedence.await_trace(_text(part.arguments, "trace_id"), part.time_ms, of)
                try:
                    self._sink.call(part.operation, part.arguments.decode())
                except SinkError as again:
                    is_none = again.kind == "answer" and _NO_TRACE.search(str(again))
                    error = _for_good(again) if is_none else again
                else:
                    return False  # the trace has arrived in between
            return refuse(part, error)

        return told

    def _call(self, request: Request, body: str, refuse: Callable[[Request, SinkError], bool]) -> bool:
        try:
            self._sink.call(request.operation, body)
        except SinkError as error:
            if _is_about_points_of_models(request.operation, error):
                made = [self._point(request, part, refuse) for part in _split(body, "metrics")]
                return any(made)
            verdict = self._verdict(request.operation, body, error)
            if verdict is not None:
                return not refuse(msgspec.structs.replace(request, arguments=body.encode()), verdict)
        return True

    def _point(self, request: Request, body: str, refuse: Callable[[Request, SinkError], bool]) -> bool:
        try:
            self._sink.call(request.operation, body)
        except SinkError as error:
            verdict = error
            if _is_about_points_of_models(request.operation, error):
                msg = "the model has another point of this metric for the run, time and step, and MLflow takes only one"
                verdict = SinkError(msg, kind="answer", status=HTTPStatus.BAD_REQUEST, code="INVALID_PARAMETER_VALUE")
            return not refuse(msgspec.structs.replace(request, arguments=body.encode()), verdict)
        return True

    def _verdict(self, operation: str, body: str, error: SinkError) -> SinkError | None:
        """Return what stands against a request that failed; None when the store has what was asked for.

        Raises:
            SinkError: it had to be asked, and could not be.
        """
        if operation in _ONE_BY_ONE and _ROW_EXISTS.search(str(error)) is not None:
            if operation != "log_logged_model_params" or self._has_params(arguments_of(body.encode())):
                return None
            msg = "the model has this param with another value, and MLflow does not change it"
            return SinkError(msg, kind="answer", status=HTTPStatus.BAD_REQUEST, code="INVALID_PARAMETER_VALUE")
        if operation in {"start_trace", "log_spans"} and error.code == "INVALID_STATE" and _ARCHIVED.search(str(error)):
            return _for_good(error)
        applied = operation == "create_experiment" and error.code == "RESOURCE_ALREADY_EXISTS"
        if operation in _DELETES:
            applied = error.code == "RESOURCE_DOES_NOT_EXIST" or "No tag with name" in str(error)
        if operation in _LIFECYCLE and error.code == "RESOURCE_DOES_NOT_EXIST":
            applied = self._is_there(_text(body.encode(), "experiment_id"))
        return None if applied else error

    def _is_there(self, experiment_id: str) -> bool:
        """Return whether there is an experiment, deleted or not: then it is in the state that was asked for."""
        try:
            self._sink.artifact_location("experiment", experiment_id)
        except SinkError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _has_params(self, wanted: dict[str, Any]) -> bool:
        """Return whether a model has params with these values, of which only the keys are known to be there."""
        try:
            held = self._sink.model_params(str(wanted["model_id"]))
        except SinkError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True  # it was deleted, and there is nobody left to read them
        given = (param["v"] for param in wanted["params"])
        return all(held.get(param["key"]) == param.get("value", "") for param in given)

    def _placed(self, request: Request, of: str) -> bytes:
        if self.ids.copies is None:
            return request.arguments
        given = arguments_of(request.arguments)
        return msgspec.json.encode(
            self.ids.copies.placed(request.operation, given, lambda experiment: self.ids.experiment(experiment, of))
        )

    def _create_experiment(self, request: Request, refuse: Callable[[Request, SinkError], bool], of: str) -> bool:
        if request.known and self.ids.copies is None:
            return True
        local = _text(request.arguments, "experiment_id")
        remote = self._asked(request, refuse, lambda: self.ids.experiment(local, of))
        if remote and self.ids.copies is not None:  # who came first made it by its name, without tags
            given: dict[str, str] = arguments_of(request.arguments).get("tags") or {}
            for key, value in given.items():
                tag = {"$": "ExperimentTag", "v": {"key": key, "value": value}}
                body = msgspec.json.encode({"experiment_id": remote, "tag": tag})
                part = msgspec.structs.replace(request, operation="set_experiment_tag")
                self._call(part, body.decode(), refuse)
        return bool(remote)

    def _create_model(self, request: Request, refuse: Callable[[Request, SinkError], bool], of: str) -> bool:
        wanted = arguments_of(self._placed(request, of))
        local = wanted.pop("model_id", "")
        if (request.known and self.ids.copies is None) or self._ledger.meta(f"model/{local}"):
            return True
        mark = mark_of(wanted, local)
        body = self.ids.rewritten(msgspec.json.encode(wanted).decode(), of=of, but=mark)

        def create() -> str:
            experiment = _text(body.encode(), "experiment_id")
            found = min(self._sink.find_models(experiment, mark), default="")
            if found:
                self._add_params(request, found, body, refuse)
            return found or self._sink.call(request.operation, body)

        with self.precedence.making(local):
            if self._ledger.meta(f"model/{local}"):
                return True
            remote = self._asked(request, refuse, create)
            if remote:
                self._ledger.set_meta(f"model/{local}", remote.encode())
            else:  # what names it is not to wait for it
                self._ledger.set_meta(f"{REFUSED}/{local}", b"yes")
        return bool(remote)

    def _add_params(
        self, request: Request, model_id: str, body: str, refuse: Callable[[Request, SinkError], bool]
    ) -> None:
        """Give a model that was there those of its params that it lacks.

        MLflow's client sends a hundred with the creation and the others behind it, so that a model whose creation did
        not come to its end may be there without them.
        """
        wanted: list[Any] = arguments_of(body.encode()).get("params") or []
        held = self._sink.model_params(model_id) if wanted else {}
        lacking = [param for param in wanted if param["v"]["key"] not in held]
        rest = msgspec.json.encode({"model_id": model_id, "params": lacking}).decode()
        part = msgspec.structs.replace(request, operation="log_logged_model_params")
        for one in _parts(part.operation, rest):
            self._call(part, one, refuse)

    @staticmethod
    def _asked(request: Request, refuse: Callable[[Request, SinkError], bool], ask: Callable[[], str]) -> str:
        try:
            return ask()
        except SinkError as error:
            refuse(request, error)
            return ""


def mark_of(wanted: dict[str, Any], local: str) -> str:
    """Return what the tag of a logged model says by which it is found.

    Args:
        wanted: the arguments of its creation, as logged.
        local: its id here, which the tag says as a rule.
    """
    labels = (tag["v"] for tag in wanted.get("tags") or ())
    return next((str(tag["value"]) for tag in labels if tag["key"] == provisional.MODEL_ID_TAG), local)


def _for_good(error: SinkError) -> SinkError:
    """Return a refusal as one of which nobody has to see to anything."""
    return SinkError(str(error), kind="answer", status=HTTPStatus.BAD_REQUEST, code="INVALID_PARAMETER_VALUE")


def _text(arguments: bytes, name: str) -> str:
    return str(arguments_of(arguments).get(name) or "")


def _parts(operation: str, body: str) -> list[str]:
    name = _ONE_BY_ONE.get(operation)
    return [body] if name is None else _split(body, name)


def _is_about_points_of_models(operation: str, error: SinkError) -> bool:
    return operation == "log_batch" and _POINTS_OF_MODELS in str(error) and _ROW_EXISTS.search(str(error)) is not None


def _split(body: str, name: str) -> list[str]:
    arguments = arguments_of(body.encode())
    return [msgspec.json.encode({**arguments, name: [item]}).decode() for item in arguments.get(name) or ()]
