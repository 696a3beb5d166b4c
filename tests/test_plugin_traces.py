"""Traces through the plugin, whatever is in them and however large they are."""

from __future__ import annotations

import contextlib
import math
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.plugin import codec, trace_rooms
from mlflow_outbox.plugin import spans as held_spans
from mlflow_outbox.plugin.journals import MOST_INLINE
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.testing.faults import delay, drop, forward_then_drop_response, status
from mlflow_outbox.testing.proxy import Action, FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.letters import send_again
from plugin_world import NOWHERE, deliver, store, tracking
from servers import MlflowServer


def spans(mlflow: Any, experiment: str) -> list[Any]:
    """Return all spans of an experiment as its server has them."""
    number = mlflow.get_experiment_by_name(experiment).experiment_id
    found = mlflow.MlflowClient().search_traces(locations=[number])
    return [span for trace in found for span in trace.data.spans]


def log(mlflow: Any, experiment: str, inputs: Any = None, **attributes: float) -> None:
    """Log a trace of one span with an event."""
    from mlflow.entities import SpanEvent

    mlflow.set_experiment(experiment)
    with mlflow.start_span("span") as span:
        span.set_inputs(inputs)
        span.add_event(SpanEvent("step", attributes=attributes))
    mlflow.flush_trace_async_logging()


def test_what_was_said_of_a_trace_while_it_went_on_is_there_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Feedback goes with the trace, which is sent again when the answer is lost; a server gives it an id each time."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            proxy.on(
                lambda method, path: method == "POST" and path.endswith("mlflow/traces"), forward_then_drop_response()
            )
            with mlflow.start_span("span") as span:
                mlflow.log_feedback(trace_id=span.trace_id, name="good", value=True)
                mlflow.log_expectation(trace_id=span.trace_id, name="answer", value=42)
            mlflow.flush_trace_async_logging()
            deliver(uri)
            assert 2 == sum(request.path.endswith("mlflow/traces") for request in proxy.requests)
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        said = mlflow.get_trace(span.trace_id).info.assessments
        assert [("answer", 42), ("good", True)] == sorted((one.name, one.value) for one in said)


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_what_a_database_takes_of_a_trace_it_gets_uncut(
    prefix: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's message to a server cuts texts, and has no whole numbers; a journal is no reason for either."""
    uri = f"{prefix}{sqlite_uri}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_span("span") as span:
            mlflow.update_current_trace(tags={"long": "t" * 5000}, metadata={"long": "m" * 5000})
            mlflow.log_feedback(trace_id=span.trace_id, name="number", value=2**60)
            mlflow.log_feedback(trace_id=span.trace_id, name="numbers", value={"of": [1, 2.5]})
            mlflow.log_expectation(trace_id=span.trace_id, name="answer", value=1)
        mlflow.flush_trace_async_logging()
        deliver(uri)
    with tracking(sqlite_uri, tmp_path) as mlflow:
        held = mlflow.get_trace(span.trace_id).info
    assert ("t" * 5000, "m" * 5000) == (held.tags["long"], held.trace_metadata["long"])
    said = sorted((one.name, repr(one.value)) for one in held.assessments)
    assert [("answer", "1"), ("number", str(2**60)), ("numbers", "{'of': [1, 2.5]}")] == said


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_trace_has_feedback_that_is_no_number_where_a_database_takes_that(
    prefix: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """JSON has no word for it, nor MLflow's message to a server; the trace was lost with it."""
    uri = f"{prefix}{sqlite_uri}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_span("span") as span:
            mlflow.log_feedback(trace_id=span.trace_id, name="loss", value=math.nan)
            mlflow.log_feedback(trace_id=span.trace_id, name="losses", value={"of": [0.5, math.inf]})
        mlflow.flush_trace_async_logging()
        deliver(uri)
    with tracking(sqlite_uri, tmp_path) as mlflow:
        said = mlflow.get_trace(span.trace_id).info.assessments
    assert [("loss", "nan"), ("losses", "{'of': [0.5, inf]}")] == sorted((one.name, repr(one.value)) for one in said)


def test_a_trace_whose_feedback_no_server_can_be_sent_is_a_dead_letter_and_holds_up_no_other(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's client loses it at the call; here a person can mend it."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        for value in (math.nan, 1.0):
            with mlflow.start_span("span") as span:
                mlflow.log_feedback(trace_id=span.trace_id, name="loss", value=value)
        mlflow.flush_trace_async_logging()
        outbox = store(uri).outbox
        assert 1 == outbox.flush(60).dead
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        assert [1.0] == [one.value for one in mlflow.get_trace(span.trace_id).info.assessments]


@pytest.mark.parametrize("kind", ["http", "sqlite", "file"])
def test_a_trace_with_a_tag_that_cannot_be_copied_is_logged_with_its_text(
    kind: str, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow takes the client of a language model for its name, say; its exporter keeps no span of one that fails."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    uri = {"http": NOWHERE, "sqlite": f"outbox+{sqlite_uri}", "file": f"outbox+{file_uri}"}[kind]
    client = threading.Lock()
    labels: Any = {"tags": {"client": client}, "trace_metadata": {"number": 7}}
    with tracking(uri, tmp_path, worker="none", exit_timeout=0) as mlflow:
        place = TraceLocation.from_experiment_id(mlflow.create_experiment(experiment_name))
        given = TraceInfo("tr-1", place, 1_700_000_000_000, TraceState.OK, **labels)
        shown = store(uri).start_trace(given)
        assert (str(client), "7") == (shown.tags["client"], shown.trace_metadata["number"])
        assert client is given.tags["client"]


@pytest.mark.parametrize("kind", ["http", "sqlite"])
def test_what_opentelemetry_says_of_the_program_is_there_as_tags_of_its_traces(
    kind: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """The name of the service and what ``OTEL_RESOURCE_ATTRIBUTES`` has, as with the plain URI."""
    from opentelemetry.sdk.resources import Resource

    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    said = {"service.name": "checkout", "deployment.environment": "staging", "replica": 3, "telemetry.sdk.name": "us"}
    for uri, name in ((plain, "plain"), (f"outbox+{plain}", "outbox")):
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(f"{experiment_name}-{name}")
            with mlflow.start_span("span") as span:
                span._span._resource = Resource(said)
            mlflow.flush_trace_async_logging()
            deliver(uri)
    with tracking(plain, tmp_path) as mlflow:
        plainly, found = [
            [{key: value for key, value in trace.info.tags.items() if key in said} for trace in traces]
            for traces in (
                mlflow.MlflowClient().search_traces(
                    locations=[mlflow.get_experiment_by_name(f"{experiment_name}-{name}").experiment_id]
                )
                for name in ("plain", "outbox")
            )
        ]
    assert plainly == found


def test_a_span_comes_back_from_json_with_what_opentelemetry_says_of_the_program(
    experiment_name: str, tmp_path: Path
) -> None:
    """But for what it says of itself, and bytes, which no store keeps."""
    from opentelemetry.sdk.resources import Resource

    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_span("span") as span:
            told = {"service.name": "shop", "zones": [1, 2], "telemetry.sdk.name": "us", "keys": [b"1"], "key": b"2"}
            span._span._resource = Resource(told)
        (found,) = codec.loads(codec.dumps({"spans": [span]}))["spans"]
    assert {"service.name": "shop", "zones": (1, 2)} == dict(found._span.resource.attributes)


def test_a_trace_that_is_logged_while_another_thread_waits_for_earlier_ones_can_be_had_at_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of an evaluation log and read their traces side by side; what one waited for says nothing of the next."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_span("first") as first:
                pass
            mlflow.flush_trace_async_logging()
            held = store(uri)
            settle, later = held.settle, []

            def settle_while_another_is_logged(**options: Any) -> bool:
                has_arrived = bool(settle(**options))
                if not later:
                    proxy.on(lambda method, path: method == "POST" and path.endswith("/traces"), drop(), times=None)
                    with mlflow.start_span("later") as span:
                        later.append(span.trace_id)
                    mlflow.flush_trace_async_logging()
                return has_arrived

            deliver(uri)
            monkeypatch.setattr(held, "settle", settle_while_another_is_logged)
            assert ["first"] == [span.name for span in mlflow.get_trace(first.trace_id).data.spans]
            (trace_id,) = later
            assert ["later"] == [span.name for span in mlflow.get_trace(trace_id).data.spans]
            proxy.clear()
            deliver(uri)


@pytest.mark.parametrize("worker", ["thread", "none"])
@pytest.mark.parametrize("kind", ["http", "sqlite"])
def test_numbers_that_json_has_no_word_for_arrive_in_events_of_spans(
    kind: str, worker: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """NaN and the infinities, as with the plain URI; delivered at once, or by a later program."""
    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    numbers = {"nan": math.nan, "most": math.inf, "least": -math.inf, "loss": 0.5}
    for uri, name in ((plain, "plain"), (f"outbox+{plain}", "outbox")):
        with tracking(uri, tmp_path, worker=worker) as mlflow:
            log(mlflow, f"{experiment_name}-{name}", **numbers)
        with tracking(uri, tmp_path):
            deliver(uri)
    with tracking(plain, tmp_path) as mlflow:
        plainly, found = [
            repr([span.events[0].attributes for span in spans(mlflow, f"{experiment_name}-{name}")])
            for name in ("plain", "outbox")
        ]
    assert repr([numbers]) == plainly == found


@pytest.mark.parametrize("worker", ["thread", "none"])
def test_a_span_that_is_larger_than_an_event_arrives(
    worker: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Twenty megabytes of inputs become a file of the outbox, which the event names."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path, worker=worker) as mlflow:
        log(mlflow, experiment_name, {"document": "x" * 20_000_000})
        counters = store(uri).outbox.counters
        assert 0 == counters["refused_too_large"]
    with tracking(uri, tmp_path):
        deliver(uri)
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        (found,) = spans(mlflow, experiment_name)
        assert {"document": "x" * 20_000_000} == found.inputs


def test_a_large_span_is_refused_beyond_the_setting_and_counted(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's exporter keeps the error to itself, so the outbox counts and says it."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path, artifact_bytes=MOST_INLINE, worker="none") as mlflow:
        log(mlflow, experiment_name, {"document": "x" * (MOST_INLINE + 1)})
        assert 1 == store(uri).outbox.counters["requests_refused"]
    assert "log_spans cannot be kept" in caplog.text
    assert "artifact_bytes" in caplog.text


def test_a_large_span_whose_file_is_gone_becomes_a_dead_letter_that_can_be_sent_again(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The letter names the file, and holds none of it; once the file is back, it is sent."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path, worker="none") as mlflow:
        log(mlflow, experiment_name, {"document": "x" * 20_000_000})
        outbox = store(uri).outbox
        (copy,) = outbox.directory.runs.glob("*/files/*")
        aside = copy.rename(tmp_path / "aside")
    with tracking(uri, tmp_path) as mlflow:
        outbox = store(uri).outbox
        assert 1 == outbox.flush(60).dead
        outbox.close(10)
        (folder,) = outbox.directory.path.glob("*/experiment-*/files")  # the room may have been filed by now
        aside.rename(folder / copy.name)
        with contextlib.closing(Ledger.open(outbox.directory.ledger)) as ledger:
            (letter,) = ledger.dead_letters()
            assert len(letter.payload) < 10_000
            send_again(outbox.directory, ledger, outbox.settings, letter)
            assert [] == list(ledger.dead_letters())
    with tracking(uri, tmp_path):
        assert store(uri).outbox.flush(60)
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        assert 1 == len(spans(mlflow, experiment_name))


def test_arguments_come_back_from_json_as_they_were() -> None:
    """Also an object that looks like the codec's own marks, at any depth."""
    given = {"a": {"$": "Span", "v": {"$": 1, "v": [math.inf]}}, "b": [{"$": 2, "v": None}], "c": "x" * 5000}
    assert given == codec.loads(codec.dumps(given))
    assert {"a": given["a"], "b": given["b"]} == codec.loads(codec.short(given))


def test_an_argument_that_cannot_be_written_is_counted_and_refused_at_the_call(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As MLflow refuses bad input."""
    from mlflow.entities import Feedback, TraceInfo, TraceLocation, TraceState
    from mlflow.exceptions import MlflowException

    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path, worker="none") as mlflow:
        number = mlflow.create_experiment(experiment_name)
        held = store(uri)
        with pytest.raises(MlflowException, match="log_spans cannot be kept") as raised:
            held.log_spans(number, [object()])
        assert "INVALID_PARAMETER_VALUE" == raised.value.error_code
        assert 1 == held.outbox.counters["requests_refused"]
        said = [Feedback(name="of MLflow's own message", value=object())]
        place = TraceLocation.from_experiment_id(number)
        with pytest.raises(MlflowException, match="start_trace cannot be kept"):
            held.start_trace(TraceInfo("tr-1", place, 1_700_000_000_000, TraceState.OK, assessments=said))
        assert 2 == held.outbox.counters["requests_refused"]
        assert [] == [
            request
            for run in held.outbox.directory.runs.iterdir()
            for _, request in RunReader(run).each(Request, {})
            if request.operation in {"log_spans", "start_trace"}
        ]


def start_traces(uri: str, experiment_id: str, count: int) -> list[str]:
    """Record traces without spans, and return their ids."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    ids = [f"tr-{uuid.uuid4().hex}" for _ in range(count)]
    for trace_id in ids:
        place = TraceLocation.from_experiment_id(experiment_id)
        store(uri).start_trace(TraceInfo(trace_id, place, 1_700_000_000_000, TraceState.OK, tags={"given": "first"}))
    return ids


def test_changes_of_a_trace_follow_it_however_many_wait(experiment_name: str, tmp_path: Path) -> None:
    """In the room of its experiment: in another one they can be sent before it, and come to nothing."""
    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        number = mlflow.create_experiment(experiment_name)
        ids = start_traces(NOWHERE, number, 260)
        mlflow.set_trace_tag(ids[0], "late", "yes")
        mlflow.MlflowClient().delete_trace_tag(ids[1], "given")
        rooms = {
            (request.operation, codec.loads(request.arguments).get("trace_id")): run.name
            for run in store(NOWHERE).outbox.directory.runs.iterdir()
            for _, request in RunReader(run).each(Request, {})
        }
        room = provisional.room_of(number)
        assert [room, room] == [rooms["set_trace_tag", ids[0]], rooms["delete_trace_tag", ids[1]]]


def test_what_is_remembered_of_traces_that_wait_has_an_end_and_their_changes_follow_them(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service logs millions while its server is away for a day."""
    monkeypatch.setattr(trace_rooms, "_REMEMBERED", 10)
    monkeypatch.setattr(trace_rooms, "_MOST", 40)
    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        number = mlflow.create_experiment(experiment_name)
        ids = start_traces(NOWHERE, number, 100)
        rooms = store(NOWHERE)._rooms
        assert len(rooms) <= 40
        assert ["", number] == [rooms.experiment(trace_id) for trace_id in (ids[0], ids[-1])]
        held = store(NOWHERE)._recent
        held.clear()  # which has the latest, too
        for trace_id in (ids[0], ids[-1]):
            mlflow.set_trace_tag(trace_id, "late", "yes")
        written = [
            run.name
            for run in store(NOWHERE).outbox.directory.runs.iterdir()
            for _, request in RunReader(run).each(Request, {})
            if request.operation == "set_trace_tag"
        ]
        assert [provisional.room_of(number)] * 2 == written


def test_traces_that_were_delivered_are_forgotten(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered is bounded by what waits, not by what was ever logged."""
    monkeypatch.setattr(trace_rooms, "_REMEMBERED", 20)
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        number = mlflow.create_experiment(experiment_name)
        for _ in range(4):
            start_traces(uri, number, 15)
            deliver(uri)
        assert len(store(uri)._rooms) <= 20


def one_trace(mlflow: Any, size: int, *children: str) -> str:
    """Log a trace with inputs of so many bytes, and children; return its id."""
    with mlflow.start_span("span") as span:
        span.set_inputs({"document": "x" * size})
        for child in children:
            with mlflow.start_span(child):
                pass
    mlflow.flush_trace_async_logging()
    return str(span.trace_id)


def test_spans_that_wait_are_held_up_to_a_number_of_bytes(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest go first, and a trace is held in full or not at all; the last one is held however large it is."""
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(held_spans, "_MOST_BYTES", 1_000_000)
    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        ids = [one_trace(mlflow, 300_000, "child") for _ in range(5)]
        held = store(NOWHERE)._spans
        assert 600_000 < held.size < 1_000_000
        assert {"span", "child"} == {span.name for span in mlflow.get_trace(ids[-1]).data.spans}
        with pytest.raises(MlflowException, match="needs the tracking server"):
            store(NOWHERE).get_trace(ids[0])
        last = one_trace(mlflow, 2_000_000, "child")
        assert 1 == len(held)
        assert {"span", "child"} == {span.name for span in mlflow.get_trace(last).data.spans}
        one_trace(mlflow, 1)
        assert held.size < 10_000


def test_spans_that_were_delivered_are_not_held(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the server's to answer: it is noticed when some more are logged, and when the store is put to rest."""
    monkeypatch.setattr(held_spans, "_LOOK", 100_000)
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        ids = []
        for _ in range(3):
            ids.append(one_trace(mlflow, 200_000))
            deliver(uri)
        held = store(uri)._spans
        assert held.size < 500_000
        assert store(uri).rest(20)
        assert (0, 0) == (len(held), held.size)
        assert [1, 1, 1] == [len(mlflow.get_trace(trace_id).data.spans) for trace_id in ids]


def test_the_spans_of_a_trace_on_its_way_come_in_the_order_in_which_a_server_gives_them(
    experiment_name: str, tmp_path: Path
) -> None:
    """The root first and the others as they began; they are written as they end, the root last."""
    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_span("root"):
            with mlflow.start_span("first"), mlflow.start_span("inner"):
                pass
            with mlflow.start_span("second"):
                pass
        mlflow.flush_trace_async_logging()
        trace = mlflow.get_trace(mlflow.get_last_active_trace_id())
        assert ["root", "first", "inner", "second"] == [span.name for span in trace.data.spans]


def test_a_deletion_of_traces_is_of_those_alone(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """One that is on its way can be had as before; one that is gone takes no tag, which nobody would see again."""
    from mlflow.exceptions import MlflowException

    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5) as mlflow:
            number = mlflow.set_experiment(experiment_name).experiment_id
            traces = []
            for name in ("gone", "stays"):
                with mlflow.start_span(name):
                    pass
                mlflow.flush_trace_async_logging()
                traces.append(mlflow.get_last_active_trace_id())
                if name == "gone":
                    deliver(uri)
                    proxy.on(lambda method, path: method == "POST" and path.endswith("/traces"), drop(), times=None)
            gone, stays = traces
            api = mlflow.MlflowClient()
            assert 1 == api.delete_traces(number, trace_ids=[gone])
            assert ["stays"] == [span.name for span in api.get_trace(stays).data.spans]
            proxy.clear()
            deliver(uri)
            with pytest.raises(MlflowException, match="not found"):
                api.set_trace_tag(gone, "a", "b")
            assert ["stays"] == [span.name for span in spans(mlflow, experiment_name)]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_trace_that_is_on_its_way_is_deleted_too_or_the_call_says_that_it_is_not(
    is_late: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server deletes what it has, and says nothing of the others: such a trace arrived behind that, and stayed."""
    from mlflow.exceptions import MlflowException

    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5, **({"read_timeout": 2} if is_late else {})) as mlflow:
            number = mlflow.create_experiment(experiment_name)
            deliver(uri)
            mlflow.set_experiment(experiment_name)
            slow = delay(6.0 if is_late else 1.5)
            proxy.on(lambda method, path: method == "POST" and path.endswith("/traces"), slow, times=None)
            trace_id = one_trace(mlflow, 1)
            api = mlflow.MlflowClient()
            if is_late:
                with pytest.raises(MlflowException, match="This call was not kept"):
                    api.delete_traces(number, trace_ids=[trace_id])
                proxy.clear()
                deliver(uri)
            assert 1 == api.delete_traces(number, trace_ids=[trace_id])
            deliver(uri)
            assert [] == spans(mlflow, experiment_name)


@pytest.mark.parametrize("depth", [100, 400])
def test_a_span_that_no_message_can_hold_holds_up_no_other(
    depth: int, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """What is nested too deeply is refused by the library of messages, each time; what comes after it arrives."""
    uri = f"outbox+{mlflow_server.url}"
    deep: Any = {}
    for _ in range(depth):
        deep = {"a": deep}
    with tracking(uri, tmp_path) as mlflow:
        log(mlflow, experiment_name, deep)
        log(mlflow, experiment_name, "plain")
        result = store(uri).outbox.flush(60)
        assert (0, 0) == (result.pending, result.parked)
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        assert "plain" in [span.inputs for span in spans(mlflow, experiment_name)]


@pytest.mark.parametrize(
    "answer",
    [
        status(
            501,
            {"Content-Type": "application/json"},
            '{"detail": "REST OTLP span logging is not supported by FileStore"}',
        ),
        status(
            404,
            {"Content-Type": "text/html; charset=utf-8"},
            "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>The requested URL "
            "was not found on the server. If you entered the URL manually please check your spelling.</p>",
        ),
    ],
    ids=["a store of files", "no such address"],
)
@pytest.mark.parametrize("begun", ["up", "away"])
def test_a_server_that_keeps_no_spans_has_them_in_a_file(
    begun: str, answer: Action, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """One whose own store is one of files refuses them for good; MLflow's client uploads the trace there, too.

    So it does where one has no address for them, as before 3.4, or with gunicorn in whichever version.
    """
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("/v1/traces", answer, times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            if begun == "away":
                proxy.down()
            with mlflow.start_span("root") as span:
                span.set_inputs({"question": "\u00e4"})
                for name in ("first", "second"):
                    with mlflow.start_span(name):
                        pass
            mlflow.flush_trace_async_logging()
            mlflow.set_experiment_tag("behind", "it")
            proxy.up()
            deliver(uri)
            assert ["root", "first", "second"] == [one.name for one in mlflow.get_trace(span.trace_id).data.spans]
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        assert "it" == mlflow.get_experiment_by_name(experiment_name).tags["behind"]
        assert [("root", {"question": "\u00e4"}), ("first", None), ("second", None)] == [
            (one.name, one.inputs) for one in spans(mlflow, experiment_name)
        ]


def test_a_trace_is_had_from_a_server_that_knows_only_the_older_question_for_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's client asks the older one when it is told so, by an error of its own; that is no outage."""
    words = '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Trace with ID \'get\' not found."}'
    with tracking(mlflow_server.url, tmp_path) as mlflow:
        log(mlflow, experiment_name)
        (trace,) = mlflow.MlflowClient().search_traces(
            locations=[mlflow.get_experiment_by_name(experiment_name).experiment_id]
        )
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(
            lambda _method, path: path.partition("?")[0].endswith("/traces/get"),
            status(404, {"Content-Type": "application/json"}, words),
            times=None,
        )
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none") as mlflow:
            found = mlflow.get_trace(trace.info.trace_id)
            assert ["span"] == [span.name for span in found.data.spans]
            assert not store(uri).server.is_away()
