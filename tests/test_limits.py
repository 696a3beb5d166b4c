"""Ends to waits that libraries leave open: what a driver of a database is told of them, and the search for an address.

That a driver keeps to them is seen in ``test_postgresql``.
"""

from __future__ import annotations

import socket
import threading
import time
import types
from typing import Any

import pytest
import sqlalchemy

from mlflow_outbox_worker.mlflow_sink import limits, open_sink
from mlflow_outbox_worker.outcome import classify
from servers import MlflowServer
from sink_contract import closing, fails

_PROBES = {"keepalives_idle": 6, "keepalives_interval": 2, "keepalives_count": 3}
_POSTGRESQL = {"connect_timeout": 12, **_PROBES, "tcp_user_timeout": 12_000}


class _Told(Exception):
    """Raised in the place of a connect."""


def told(uri: str, seconds: float = 12.0, **named: Any) -> dict[str, Any]:
    """Return what a driver is given beyond what the URI says of the place."""
    mysql = types.SimpleNamespace(paramstyle="pyformat", Error=type("Error", (Exception,), {}))
    engine = sqlalchemy.create_engine(uri, **({"module": mysql} if uri.startswith("mysql") else {}))
    limits.put(engine, seconds, **named)

    def connect(_dialect: object, _record: object, _arguments: object, given: dict[str, Any]) -> None:
        raise _Told(given)

    sqlalchemy.event.listen(engine, "do_connect", connect)
    with pytest.raises(_Told) as caught:
        engine.connect()
    given: dict[str, Any] = caught.value.args[0]
    return {name: value for name, value in given.items() if "timeout" in name or "keepalives" in name}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment say nothing."""
    for name in ("PGCONNECT_TIMEOUT", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_what_nobody_has_set_is_set(driver: str) -> None:
    """A connection ends whose host is silent for as long as a request may take."""
    assert _POSTGRESQL == told(f"postgresql+{driver}://u@h/db")


@pytest.mark.parametrize("seconds", [0.001, 1e12])
def test_what_a_driver_or_a_system_would_not_take_is_not_asked_for(seconds: float) -> None:
    """No libpq takes a second for a connect, and Linux no pause of ten hours between two probes."""
    found = told("postgresql+psycopg2://u@h/db", seconds)
    assert found["connect_timeout"] >= 2
    assert 1 <= found["keepalives_interval"] <= found["keepalives_idle"] <= 32_767
    assert found["tcp_user_timeout"] < 2**31


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_what_the_uri_or_the_environment_sets_is_kept(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says something of probes has said all of them; what a service's file says is not seen."""
    uri = f"postgresql+{driver}://u@h/db"
    assert {**_POSTGRESQL, "connect_timeout": "3"} == told(f"{uri}?connect_timeout=3")
    assert {"connect_timeout": 12, "keepalives_idle": "60"} == told(f"{uri}?keepalives_idle=60")
    assert {"connect_timeout": 12, "tcp_user_timeout": "0"} == told(f"{uri}?tcp_user_timeout=0")
    assert {} == told(f"{uri}?service=tracking")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    assert "connect_timeout" not in told(uri)
    monkeypatch.setenv("PGSERVICE", "tracking")
    assert {} == told(uri)


def test_an_old_libpq_is_not_told_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would refuse to connect at all."""
    monkeypatch.setattr("psycopg2.extensions.libpq_version", lambda: 110_022)
    assert {"connect_timeout": 12, **_PROBES} == told("postgresql+psycopg2://u@h/db")


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_a_driver_that_cannot_tell_a_slow_statement_from_silence_gives_it_ten_times_as_long(driver: str) -> None:
    """No time at all while tables are made or brought up to date: half of that cannot be gone on with."""
    uri = f"mysql+{driver}://u@h/db"
    assert {"connect_timeout": 12, "read_timeout": 120, "write_timeout": 120} == told(uri)
    assert {"connect_timeout": 12, "read_timeout": 7, "write_timeout": 120} == told(f"{uri}?read_timeout=7")
    assert {"connect_timeout": 12} == told(uri, statements=False)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_search_for_an_address_ends_with_the_request(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was sent then. The resolver of names has times of its own, of half a minute and more."""
    over = threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        over.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setenv("NO_PROXY", "*")
    with closing(open_sink(f"{scheme}://tracking.example:5000", timeout=0.5)) as sink:
        begun = time.monotonic()
        error = fails(lambda: sink.get_run("a" * 32))
        assert time.monotonic() - begun < 15
    over.set()
    assert ("timeout", False, "retry") == (error.kind, error.sent, classify(error, "get_run").kind)
    assert "the address of tracking.example was not found in time" in str(error)


def test_a_name_is_looked_up_once_for_each_connection(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes seconds where the first server of names is dead; of what was found, one address may answer."""
    resolve = socket.getaddrinfo

    def slow(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "localhost":
            return resolve(host, *rest, **more)
        time.sleep(3.0)
        return [*resolve("127.0.0.2", *rest, **more), *resolve("127.0.0.1", *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setenv("NO_PROXY", "*")
    with closing(open_sink(f"http://localhost:{mlflow_server.port}", timeout=5.0)) as sink:
        assert "0" == sink.find_experiment("Default")
