"""How soon and how often a server in trouble is tried: as it asks, within bounds, and within each attempt's time."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
import threading
import time
from email.utils import formatdate
from itertools import count
from pathlib import Path

import pytest

from faults import workload
from faults.network import HURRIED, PATIENT, Connects, Session
from faults.oracle import kind_of
from faults.table import Row
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer, eventually

#: Seconds of the longest pause where Retry-After is tested: more than its smallest number.
CAP = 1.1


@pytest.mark.fault("F52", "429 and 503 with Retry-After: seconds, a date, the past, 10^9, garbage")
def test_every_form_of_retry_after_is_honoured_up_to_the_cap(
    mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """The next attempt comes no sooner than the server asked or the cap allows, and not much later."""
    given = dataclasses.replace(PATIENT, retry_max=CAP)
    session = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", given)
    forms = [  # the commit tier takes every other one
        ("1", 1.0),
        ("7", CAP),
        (None, CAP),  # a date a minute from now: on a busy machine one soon is past when it is told
        ("0", 0.0),
        (formatdate(0, usegmt=True), 0.0),
        ("-3", 0.0),
        ("1000000000", CAP),
        ("", 0.0),
        ("soon", 0.0),
    ]
    for _ in range(row.pick(1, 10, 100)):
        for form, stated in row.sample(forms, 5, len(forms)):
            text = formatdate(time.time() + 60, usegmt=True) if form is None else form
            refusal, before = faults.status(rng.choice([429, 503]), {"Retry-After": text}), len(proxy.requests)
            proxy.on("runs/log-batch", refusal)
            session.log(5)
            session.arrives(row, later=stated)  # without a flush, which would not wait
            batches = [request for request in proxy.requests[before:] if "log-batch" in request.path]
            refused, next_one = batches[:2]
            assert refusal.name == refused.action
            waited = next_one.arrived - (refused.ended or 0.0)
            # What was asked for is waited for; otherwise a first pause, which is short. Neither is exceeded by far.
            assert stated <= next_one.arrived - refused.arrived, (text, waited)
            assert waited < max(stated, given.retry_initial) + 2 * workload.PATIENCE, (text, waited)
            row.done()
    session.settle(row)
    session.tracker.close(1)


@pytest.mark.fault("F56", "a connection that is never made: the listener's queue is full")
def test_a_connect_that_hangs_ends_with_its_time(
    mlflow_server: MlflowServer, experiment_name: str, connects: Connects, row: Row, tmp_path: Path
) -> None:
    """Each attempt ends when a request has taken as long as it may, no call waits, and all arrives afterwards."""
    longest = 0.0
    for number in range(row.pick(1, 10, 50)):
        with contextlib.ExitStack() as queue:
            listener = queue.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            with contextlib.suppress(TimeoutError):  # fill the queue, until somebody has to wait
                for _ in range(20):
                    queue.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.2))
            uri, outbox = f"http://127.0.0.1:{port}", tmp_path / f"outbox{number}"
            before = len(connects.to(uri))
            session = Session(mlflow_server, uri, f"{experiment_name}-{number}", outbox, HURRIED)
            session.log(20)
            hung = eventually(lambda uri=uri, before=before: connects.to(uri)[before + 1 :], 60, "two attempts")
        for each in [*connects.to(uri)[before : before + 1], *hung]:
            assert HURRIED.request_timeout - 0.1 < each.ended - each.began, "it did not hang"
            assert each.ended - each.began < HURRIED.request_timeout + 1
            longest = max(longest, each.ended - each.began)
        with FaultProxy(mlflow_server.url, port=port):
            session.arrives(row, later=HURRIED.request_timeout)
            session.settle(row)
            session.tracker.close(1)
        row.done()
    row.measure(longest_attempt_s=longest)


@pytest.mark.fault("F70", "the server goes up and down every 200 ms")
def test_a_flapping_server_gets_everything_without_a_storm(
    mlflow_server: MlflowServer,
    proxy: FaultProxy,
    experiment_name: str,
    connects: Connects,
    row: Row,
    tmp_path: Path,
) -> None:
    """Delivery makes progress meanwhile, and the attempts of each second stay within bounds."""
    # Windows of one request each, which fits between two breaks; pauses of which a break has room for few.
    given = dataclasses.replace(PATIENT, batch_points=5, retry_initial=0.2, retry_max=0.2)
    session = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", given)
    numbers = (number for number in count() if kind_of(number) == "metric")
    run = session.start()
    session.log_to(run, [next(numbers) for _ in range(5)])
    session.arrives(row)
    over = threading.Event()

    def flap() -> None:
        while not over.wait(0.2):
            proxy.down()
            over.wait(0.2)
            proxy.up()

    flapper = threading.Thread(target=flap)
    before, tried, asked = len(session.held().events), len(connects.to(proxy.url)), len(proxy.requests)
    accepted, began = proxy.accepted, time.monotonic()
    flapper.start()
    try:
        least, most = row.pick(3, 600, 3600), row.pick(33, 630, 3630)
        while (spent := time.monotonic() - began) < most:
            arrived = len(session.held().events)
            # A window that was carried out may have been sent again; of four some were recorded, or it stands still.
            if spent > least and arrived >= before + 4 * given.batch_points:
                break
            if len(session.issued) - arrived < 200:  # what a busy machine cannot deliver in time is not logged either
                session.log_to(run, [next(numbers) for _ in range(5)])
                row.done()
            over.wait(0.05)
        arrived = len(session.held().events) - before
        seconds = time.monotonic() - began
        tries = (len(connects.to(proxy.url)) - tried) / seconds
        connections = (proxy.accepted - accepted) / seconds
        requests = (len(proxy.requests) - asked) / seconds
    finally:
        over.set()
        flapper.join()
    row.measure(arrived=arrived, connects_per_s=tries, accepted_per_s=connections, requests_per_s=requests)
    assert arrived >= 4 * given.batch_points, "no progress while flapping"
    # Pauses with jitter are half of the longest one on average; twice as many as that makes are a storm.
    assert tries < 2 / (given.retry_max / 2), "a storm of attempts"
    session.arrives(row, later=30.0)  # the backlog; what is fresh is checked below
    run.end()
    session.settle(row, timeout=60)
    session.tracker.close(1)
