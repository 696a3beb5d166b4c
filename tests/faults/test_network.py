"""Networks and servers that fail, scripted by a proxy in front of a real server: retried, and exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from faults import workload
from faults.network import HURRIED, PATIENT, Connects, Session
from faults.table import Row
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from mlflow_outbox.testing.wire import Request
from servers import MlflowServer, eventually


@pytest.mark.fault("F50", "connection refused, then accepted")
def test_a_refused_connection_is_retried_until_it_is_accepted(
    session: Session, proxy: FaultProxy, connects: Connects, row: Row
) -> None:
    """Nothing is dead-lettered or refused while nobody listens, and the pauses have grown no longer than they may."""
    for _ in range(row.pick(1, 20, 200)):
        proxy.down()
        before = len(connects.to(proxy.url))
        session.log(20)
        eventually(lambda before=before: len(connects.to(proxy.url)) >= before + 20, 60, "twenty refusals")
        proxy.up()
        session.settle(row)
        row.done()


@pytest.mark.fault("F51", "408, 425, 429, 500, 502, 503, 504 for some requests in a row")
def test_statuses_that_pass_are_retried_and_never_dead_lettered(session: Session, proxy: FaultProxy, row: Row) -> None:
    """Each status, three times in a row, at whatever request comes next."""
    for _ in range(row.pick(1, 20, 200)):
        for status in (408, 425, 429, 500, 502, 503, 504):
            proxy.on("runs/log-batch", faults.status(status), times=2)  # the one request that carries events
            proxy.script(*[faults.status(status)] * 3)
            session.log(8)
            session.arrives(row)
            row.done()
    session.settle(row)


@pytest.mark.fault("F51", "503 to every batch while segments rotate")
def test_no_segment_is_moved_or_deleted_before_its_events_are_answered(
    mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """As long as a batch is refused, every segment from the first on is where the writer left it."""
    given = dataclasses.replace(PATIENT, segment_bytes=1024)  # one window spans several segments
    each = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", given)
    proxy.on("runs/log-batch", faults.status(503), times=None)
    each.log(60)
    # So many, that a pause which doubles without an end would be longer by now than a fresh event may take.
    eventually(lambda: 12 <= sum("log-batch" in request.path for request in proxy.requests), 60, "twelve refusals")
    assert each.tracker.outbox_path is not None
    ordinals = sorted(int(path.stem.rpartition("-")[2]) for path in each.tracker.outbox_path.glob("runs/*/*.log"))
    assert list(range(len(ordinals))) == ordinals
    assert len(ordinals) > 3
    assert [] == list((each.tracker.outbox_path / "delivered").glob("*"))
    proxy.clear()
    row.done()
    each.settle(row)
    each.tracker.close(5)


@pytest.mark.fault("F55", "the server carries a request out and its answer is lost, at each request of a session")
def test_an_answer_lost_at_any_request_doubles_nothing(
    session: Session, proxy: FaultProxy, mlflow_server: MlflowServer, row: Row, tmp_path: Path
) -> None:
    """Also the create: there is one run, with every event once."""
    session.log(60)
    assert session.tracker.flush(60)
    count = len(proxy.requests)
    assert count > 5
    create = next(place for place, request in enumerate(proxy.requests) if request.path.endswith("runs/create"))
    places = {create, *row.sample(range(count), 10, count)}
    for place in sorted(places) * row.pick(1, 1, 5):
        lost, before = faults.forward_then_drop_response(), len(proxy.requests)
        proxy.script(*[faults.forward()] * place, lost)
        each = Session(mlflow_server, proxy.url, f"{session.experiment}-{row.times}", tmp_path / f"outbox{row.times}")
        each.log(60)
        each.arrives(row)

        def met_by(before: int = before, lost: Action = lost) -> list[Request]:
            return [request for request in proxy.requests[before:] if request.action == lost.name and request.ended]

        eventually(lambda each=each: each.tracker.flush(5))
        if not met_by():  # it is the read-back, or this session took fewer requests than the first one
            each.log(10)
        (met,) = eventually(met_by, 60, "an answer was lost")
        each.arrives(row)
        eventually(lambda each=each: each.tracker.flush(5))
        each.judge(row)
        assert met.backend_status in {200, 404}, "it was carried out: what the session asks for first is not there yet"
        assert met.status is None, "nobody was told"
        proxy.clear()
        each.tracker.close(1)
        row.done()
    row.measure(requests=count)
    session.settle(row)


def _ended(proxy: FaultProxy, before: int, actions: Sequence[Action]) -> list[Request]:
    """What became of the requests that met actions, after so many before; nothing until the proxy is done with all."""
    met = {request.action: request for request in proxy.requests[before:] if request.ended is not None}
    found = [met[action.name] for action in actions if action.name in met]
    return found if len(found) == len(actions) else []


@pytest.mark.fault("F58", "reset after n bytes of the answer, and of the request, for every n")
def test_a_reset_at_any_byte_doubles_and_loses_nothing(
    part: slice, session: Session, proxy: FaultProxy, row: Row
) -> None:
    """The batch is sent again, and the server holds each event once."""
    for size in (row.sample(range(513), 8, 513) * row.pick(1, 1, 3))[part]:
        resets, before = (faults.rst_after(size), faults.rst_request_after(size)), len(proxy.requests)
        for action in resets:
            proxy.on("runs/log-batch", action)
            session.log(5)
            row.done()
        session.arrives(row)
        # The server commits before it answers: what is cut can have arrived before the proxy has its answer.
        answered, cut = eventually(partial(_ended, proxy, before, resets), message="the proxy is done with both")
        assert (200, 200 if size else None) == (answered.backend_status, answered.status)
        assert (None, None) == (cut.backend_status, cut.status), "the server never saw it"
        assert size >= len(cut.body)
        proxy.clear()
    session.settle(row)


#: Made when they are needed: to press the bomb takes half a second.
BODIES: Final[dict[str, Callable[[], Action]]] = {
    "hangs": faults.accept_hang,
    "hangs after it was carried out": faults.forward_then_hang,
    "drips a byte at a time": partial(faults.drip, 20),
    "is cut off": faults.forward_then_truncate_body,
    "is a captive portal": faults.html_page,
    "is not JSON": partial(faults.status, 200, {"Content-Type": "application/json"}, "[{"),
    "is empty": partial(faults.status, 200),
    "is no HTTP": faults.garbage,
    "is a gzip bomb": partial(faults.gzip_bomb, 50_000_000),
    "has a wrong length": partial(faults.status, 200, {"Content-Length": "4000"}, "{}"),
    "redirects elsewhere": partial(faults.redirect, "http://127.0.0.1:9"),
    "is dropped": faults.drop,
}


@pytest.mark.fault(
    "F56", "an answer that hangs, drips, is cut, a portal, no JSON, empty, a gzip bomb, a redirect (F57, F59, F61)"
)
@pytest.mark.parametrize("what", BODIES)
def test_an_answer_that_is_none_is_never_taken_for_success(
    what: str, mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """Whichever request it meets, it takes no longer than a request may, and everything arrives once afterwards."""
    session = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", HURRIED)
    action = BODIES[what]()
    for place in range(row.pick(1, 10, 50)):
        proxy.script(*[faults.forward()] * (place % 7), action)
        proxy.on("runs/log-batch", action)
        session.log(20)
        session.arrives(row, later=2 * HURRIED.request_timeout + workload.PATIENCE)
        proxy.clear()
        row.done()

    def met() -> list[Request]:
        return [request for request in proxy.requests if request.action == action.name]

    assert len(met()) > row.times, "a batch each, and the one in the script"
    eventually(lambda: all(request.ended for request in met()), message="the proxy is done with each of them")
    longest = max((request.ended or 0.0) - request.arrived for request in met())
    row.measure(what=what, longest_attempt_s=longest)
    assert longest < HURRIED.request_timeout + 1
    session.settle(row)
    session.tracker.close(1)
