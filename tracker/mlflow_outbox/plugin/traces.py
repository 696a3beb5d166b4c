"""The traces of the plugin's store: upserts with ids made by the client, so they only have to be carried."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.json_format import SerializeToJsonError  # type: ignore[import-untyped]  # no stubs in the package
from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.tracing.constant import TraceTagKey
from mlflow.utils.mlflow_tags import MLFLOW_ARTIFACT_LOCATION
from mlflow.utils.validation import _validate_trace_tag

from mlflow_outbox.plugin.models import Models
from mlflow_outbox.plugin.spans import Spans
from mlflow_outbox.plugin.trace_rooms import TraceRooms, place_in
from mlflow_outbox.plugin.wrapped import Away

#: Traces of this process that are remembered until the server can be asked for them.
_REMEMBERED: Final = 256
#: Of a trace that the server has not, or is too old to be asked for.
_MAY_BE_THERE: Final = frozenset({"RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND"})
#: Where an assessment names the run that it was made in.
_SOURCE_RUN: Final = "mlflow.assessment.sourceRunId"
#: Traces that MLflow links to a run in one request.
_MOST_LINKS: Final = 100


class Traces(Models):
    """Traces of one tracking URI; each goes to the room of its experiment."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        self._recent: OrderedDict[str, TraceInfo] = OrderedDict()
        self._spans = Spans(self.outbox)
        self._rooms = TraceRooms(self.outbox)
        self._recent_lock = threading.RLock()  # a signal handler may log while its thread is in here
        #: The last change of traces that this process has written, and the one up to which all were found delivered.
        self._written = self._settled = 0
        self._turns = itertools.count(1)
        #: Traces of others that the server was found to have.
        self._met: dict[str, None] = {}

    @property
    def _has_spans(self) -> bool:
        # MLflow's file store keeps traces as files only, and so do the experiments of a Databricks workspace.
        return self.outbox.destination.scheme not in {"file", "databricks"}

    def start_trace(self, trace_info: TraceInfo) -> TraceInfo:
        """Record a trace."""
        experiment = str(trace_info.experiment_id)
        for assessment in trace_info.assessments or ():
            if assessment.assessment_id is None:  # a server gives it another one each time that the trace is sent
                assessment.assessment_id = f"a-{uuid.uuid4().hex}"
        room = self.journals.room(experiment)
        room.request("start_trace", trace_info=trace_info)
        self._wrote()
        place = place_in(experiment, room)
        self._rooms.remember(trace_info.trace_id, place)
        self._spans.follow(trace_info.trace_id, place)
        shown = self._copied(trace_info)
        shown.tags[MLFLOW_ARTIFACT_LOCATION] = (
            f"{self.own_uri('experiment', experiment)}/traces/{trace_info.trace_id}/artifacts"
        )
        if self._has_spans:
            shown.tags[TraceTagKey.SPANS_LOCATION] = "TRACKING_STORE"
        with self._recent_lock:
            self._recent[trace_info.trace_id] = shown
            while len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        return shown

    def _copied(self, info: TraceInfo) -> TraceInfo:
        if not self.integers.embedded:
            with contextlib.suppress(SerializeToJsonError):  # else it becomes a dead letter: no server can be sent it
                return TraceInfo.from_dict(info.to_dict())
        bare = copy.copy(info)  # with texts for values, as MLflow sends them: some cannot be copied
        bare.tags, bare.trace_metadata = (
            {key: str(value) for key, value in (given or {}).items()} for given in (info.tags, info.trace_metadata)
        )
        return copy.deepcopy(bare)

    def log_spans(self, location: str, spans: list[Span], tracking_uri: str | None = None) -> list[Span]:
        """Record spans.

        Raises:
            NotImplementedError: the store behind keeps no spans, so that MLflow uploads the trace as a file.
        """
        if not self._has_spans:
            raise NotImplementedError
        if spans:
            experiment = str(location)
            room = self.journals.room(experiment)
            size = room.request("log_spans", location=experiment, spans=list(spans))
            self._wrote()
            self._spans.add(list(spans), size, place_in(experiment, room))
        return spans

    async def log_spans_async(self, location: str, spans: list[Span]) -> list[Span]:
        """Record spans; nothing is waited for."""
        return self.log_spans(location, spans)

    def _wrote(self) -> None:
        """Take note that a change of traces was written; to be called after that, or a wait could leave it out."""
        self._written = next(self._turns)

    def _settle_traces(self, *, asks_next: bool) -> bool:
        """Let what this process did to traces arrive first, for a moment: who reads them sees what he wrote.

        Returns:
            Whether it has. What other threads write while this one waits is for the next who asks.
        """
        written = self._written
        if written != self._settled:
            if not self.settle(asks_next=asks_next):
                return False
            self._settled = written
        return True

    def _request_of_trace(self, operation: str, trace_id: str, **arguments: Any) -> None:
        room = self.journals.room(self._rooms.home(trace_id))
        room.request(operation, trace_id=trace_id, **arguments)
        self._wrote()

    def set_trace_tag(self, trace_id: str, key: str, value: str) -> None:
        """Set a tag of a trace.

        Raises:
            MlflowException: the key is none that MLflow takes, or there is no such trace.
        """
        key, value = _validate_trace_tag(key, value)
        self._check_trace(trace_id)
        self._request_of_trace("set_trace_tag", trace_id, key=key, value=value)
        held = self._recent.get(trace_id)
        if held is not None:
            held.tags[key] = value

    def _check_trace(self, trace_id: str) -> None:
        """Refuse to write to a trace that is nowhere; the server is asked once for one that this process did not make.

        Raises:
            MlflowException: it has none of this id, and none can be on its way from another process.
        """
        if trace_id in self._recent or trace_id in self._met or self._rooms.experiment(trace_id):
            return
        for is_last in (False, True):
            try:
                self.server.ask(lambda store: store.get_trace_info(trace_id), quick=True)
            except Away:
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    return
                if is_last:
                    raise
                if not self.outbox.flush(self.outbox.settings.create_timeout):
                    return
            else:
                break
        self._met[trace_id] = None
        for earlier in list(self._met)[:-_REMEMBERED]:
            self._met.pop(earlier, None)

    def delete_trace_tag(self, trace_id: str, key: str) -> None:
        """Delete a tag of a trace.

        Raises:
            MlflowException: it has no such tag.
        """
        if self._lacks_tag(trace_id, key):
            msg = f"No trace tag with key '{key}' for trace with ID '{trace_id}'"
            raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)
        self._request_of_trace("delete_trace_tag", trace_id, key=key)
        held = self._recent.get(trace_id)
        if held is not None:
            held.tags.pop(key, None)

    def _lacks_tag(self, trace_id: str, key: str) -> bool:
        """Return whether the server says that a trace has no such tag, and none is on its way from here."""
        held = self._recent.get(trace_id)
        if held is not None and key in held.tags:
            return False
        if not self._settle_traces(asks_next=False):
            return False
        try:
            return key not in self.server.ask(lambda store: store.get_trace_info(trace_id), quick=True).tags
        except Away:
            return False
        except MlflowException as error:
            if error.error_code not in _MAY_BE_THERE:
                raise
            return False  # it may be on its way from another process

    def delete_traces(
        self,
        experiment_id: str,
        max_timestamp_millis: int | None = None,
        max_traces: int | None = None,
        trace_ids: list[str] | None = None,
    ) -> int:
        """Delete traces at the server, after those of this process have had a moment to arrive there.

        Those that are named have more than a moment: a server says nothing of what it does not have, which would arrive
        later and stay.

        Raises:
            MlflowException: the server is away, or said no, or does not have a trace yet that is named.
        """
        if (
            trace_ids
            and not self._settle_traces(asks_next=False)
            and self._rooms.on_their_way(trace_ids)
            and not self._arrives()
            and self._is_lacking(self._rooms.on_their_way(trace_ids))
        ):
            waits = Away("one of the traces has not been delivered yet", sent=False)
            raise self.server.needed("delete_traces", waits, call="delete_traces")
        deleted: int = self._delegate("delete_traces", experiment_id, max_timestamp_millis, max_traces, trace_ids)
        with self._recent_lock:
            until = -1 if max_timestamp_millis is None else max_timestamp_millis
            old = [trace_id for trace_id, info in self._recent.items() if info.timestamp_ms <= until]
            gone = {*(trace_ids or ()), *old}
            for trace_id in gone:
                self._recent.pop(trace_id, None)
                self._met.pop(trace_id, None)
        self._rooms.forget(trace_ids or ())  # what comes later of the others, if they are on their way, follows them
        self._spans.forget(gone)
        return deleted

    def _is_lacking(self, trace_ids: Iterable[str]) -> bool:
        """Return whether the server lacks one of some traces: another machine may have delivered what waits here."""
        for trace_id in trace_ids:
            try:
                self.server.ask(lambda store, one=trace_id: store.get_trace_info(one), quick=True)  # type: ignore[misc]  # mypy infers no default
            except Away:
                return True
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return True
        return False

    def link_traces_to_run(self, trace_ids: list[str], run_id: str) -> None:
        """Link traces to a run.

        Raises:
            MlflowException: they are more than MLflow takes at once, the store behind links none, or there is no such
                run.
        """
        self._check_offered("link_traces_to_run", trace_ids, run_id)
        scheme = self.outbox.destination.scheme
        if len(trace_ids) > _MOST_LINKS and scheme != "databricks":  # whose client sends as many at once
            raise MlflowException.invalid_parameter_value(
                f"Cannot link more than {_MOST_LINKS} traces to a run in a single request. "
                f"Provided {len(trace_ids)} traces."
            )
        run = self.writable(run_id)
        if scheme == "file":  # it says that it has no links
            self.ask(lambda store: store.link_traces_to_run(trace_ids, run_id))
        # A database takes a link once, and none of the others if it is named twice.
        run.request("link_traces_to_run", trace_ids=list(dict.fromkeys(trace_ids)), run_id=run.run_id)

    def unlink_traces_from_run(self, trace_ids: list[str], run_id: str) -> None:
        """Take links of traces to a run away, which only Databricks does."""
        self._check_offered("unlink_traces_from_run", trace_ids, run_id)
        run = self.writable(run_id)
        run.request("unlink_traces_from_run", trace_ids=list(trace_ids), run_id=run.run_id)

    def _check_offered(self, name: str, *args: Any) -> None:
        """Refuse a call that MLflow's store behind has not, as it does: nobody would look for it in a dead letter.

        Raises:
            NotImplementedError: it has not.
        """
        if getattr(self.server.kind(), name) is getattr(AbstractStore, name, None):
            getattr(AbstractStore, name)(self, *args)

    def get_trace_info(self, trace_id: str) -> TraceInfo:
        """Return what is known of a trace: by the server, or by this process while it is on its way.

        Raises:
            MlflowException: neither knows it.
        """
        has_arrived = self._settle_traces(asks_next=True)
        try:
            return self._called(self.server.ask(lambda store: store.get_trace_info(trace_id)))
        except (Away, MlflowException) as error:
            held = self._recent.get(trace_id)
            if held is not None and (isinstance(error, Away) or not has_arrived):
                return held
            if isinstance(error, Away):
                raise self.server.needed(f"the trace {trace_id}", error) from None
            raise

    def get_trace(self, trace_id: str, **options: Any) -> Trace:
        """Return a trace; see ``get_trace_info``.

        Raises:
            MlflowException: neither the server nor this process knows it.
        """
        has_arrived = self._settle_traces(asks_next=True)
        held = self._held(trace_id)
        try:
            found: Trace = self.server.ask(lambda store: store.get_trace(trace_id, **options))
            self._called(found.info)
            return found
        except (Away, MlflowException) as error:
            if held is not None and (isinstance(error, Away) or not has_arrived):
                return held
            if isinstance(error, Away):
                raise self.server.needed(f"the trace {trace_id}", error) from None
            raise

    def batch_get_traces(self, trace_ids: list[str], location: str | None = None, **options: Any) -> list[Trace]:
        """Return traces; those on their way from this process.

        Raises:
            MlflowException: the server is away and this process does not know them all.
        """
        self._settle_traces(asks_next=True)
        held = {trace_id: trace for trace_id in trace_ids if (trace := self._held(trace_id)) is not None}
        try:
            found = {
                t.info.trace_id: t
                for t in self.server.ask(lambda store: store.batch_get_traces(trace_ids, location, **options))
            }
        except Away as away:
            if set(trace_ids) - held.keys():
                raise self.server.needed("traces that this process did not make", away) from None
            found = {}
        self._all_called(trace.info for trace in found.values())
        everything = {**held, **found}
        return [everything[trace_id] for trace_id in trace_ids if trace_id in everything]

    def batch_get_trace_infos(self, *args: Any, **options: Any) -> list[TraceInfo]:
        """Return what the server knows of traces.

        Raises:
            MlflowException: the server is away, or said no.
        """
        return self._all_called(self._delegate("batch_get_trace_infos", *args, **options))

    def search_traces(self, *args: Any, **options: Any) -> tuple[list[TraceInfo], str | None]:
        """Return the traces that the server finds.

        Raises:
            MlflowException: the server is away, or said no.
        """
        found, token = self._delegate("search_traces", *args, **options)
        return self._all_called(found), token

    def _called(self, info: TraceInfo) -> TraceInfo:
        return self._all_called([info])[0]

    def _all_called(self, infos: Iterable[TraceInfo]) -> list[TraceInfo]:
        """Have an answer call the experiments of traces, and the runs of their assessments, as this process does.

        MLflow compares them with those of a run: an evaluation copies the traces of another experiment, and shows what
        was said of them in its own run alone.
        """
        found = list(infos)
        experiments = self.shown_experiments(info.experiment_id for info in found)
        names: dict[str, str] | None = None
        for info in found:
            if info.experiment_id:  # tables of a workspace have none
                info.experiment_id = experiments[info.experiment_id]
            for assessment in info.assessments or ():
                source = (assessment.metadata or {}).get(_SOURCE_RUN)
                if source:
                    names = self.ids.names() if names is None else names
                    assessment.run_id = names.get(source, source)
                    assessment.metadata = {**assessment.metadata, _SOURCE_RUN: assessment.run_id}
        return found

    def _held(self, trace_id: str) -> Trace | None:
        info, spans = self._recent.get(trace_id), self._spans.of(trace_id)
        return Trace(info, TraceData(spans=spans)) if info is not None and spans is not None else None

    def rest(self, timeout: float) -> bool:
        """Do as the others, and let go of the traces that were delivered."""
        self._spans.forget_arrived()
        return super().rest(timeout)
