"""Ends to the waits for a database that has a server, where its URI and the environment set none.

Its driver has none as a rule. A connection that a network drops without a word, as a firewall does with one that rests,
is waited for until TCP gives it up: for a quarter of an hour if something was sent, for two hours if not. As long the
run stands still that uses it; and who opens a store meanwhile keeps all of the process from opening another.

So to connect may take as long as a request to a tracking server, and a connection is given up when nothing has come
from its host for that long, not even what TCP says by itself. No statement is cut short by that, however long it takes:
the host of one that goes well is there. The drivers of MySQL cannot tell these two apart, and get an end that no
statement of a delivery comes near to. Those of SQL Server have ends of their own to a connect.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import sqlalchemy.engine
import sqlalchemy.event

#: The least that libpq waits for a connect; and as much as anybody may want, since TCP takes no more than nine hours.
_LEAST: Final = 2
_MOST: Final = 3600
#: Probes of a connection that is silent.
_PROBES: Final = 3
#: How many times what a request may take a statement may, where a driver cannot tell a slow one from a silent host.
_LONG: Final = 10
#: Limits that a slow statement may run into.
_OF_STATEMENTS: Final = ("read_timeout", "write_timeout")
#: The first libpq that knows ``tcp_user_timeout``.
_KNOWS_USER_TIMEOUT: Final = 120_000


def put(engine: sqlalchemy.engine.Engine, seconds: float, *, statements: bool = True) -> None:
    """Have the connections that an engine makes from now on end their waits.

    Args:
        engine: of whichever database.
        seconds: that one request to a tracking server may take.
        statements: let a driver that can tell no slow statement from a silent host end both; not while tables are made.
    """
    limits = _LIMITS.get(engine.dialect.driver)
    if limits is None:
        return
    whole = math.ceil(min(max(seconds, _LEAST), _MOST))

    def limit(dialect: Any, _record: object, _arguments: object, given: dict[str, Any]) -> None:
        for name, value in limits(dialect.dbapi, given, whole).items():
            if statements or name not in _OF_STATEMENTS:
                given.setdefault(name, value)

    sqlalchemy.event.listen(engine, "do_connect", limit)


def _of_postgresql(dbapi: Any, given: Mapping[str, Any], seconds: int) -> dict[str, int]:
    if "service" in given or "PGSERVICE" in os.environ:
        return {}  # its file may set any of these, and is not seen here
    found = {} if "PGCONNECT_TIMEOUT" in os.environ else {"connect_timeout": seconds}
    if any(name.startswith(("keepalives", "tcp_user_timeout")) for name in given):
        return found
    found["keepalives_idle"] = seconds // 2
    found["keepalives_interval"] = max(1, seconds // 2 // _PROBES)
    found["keepalives_count"] = _PROBES
    version = dbapi.extensions.libpq_version() if hasattr(dbapi, "extensions") else dbapi.pq.version()
    if version >= _KNOWS_USER_TIMEOUT:  # of what was sent and never acknowledged, which no probe is made for
        found["tcp_user_timeout"] = seconds * 1000
    return found


def _of_mysql(_dbapi: Any, _given: Mapping[str, Any], seconds: int) -> dict[str, int]:
    return {"connect_timeout": seconds, **dict.fromkeys(_OF_STATEMENTS, seconds * _LONG)}


#: What to add to the arguments of a connect, by the driver: made from its module, the arguments, and seconds.
_LIMITS: Final[Mapping[str, Callable[[Any, Mapping[str, Any], int], dict[str, int]]]] = {
    "psycopg2": _of_postgresql,
    "psycopg": _of_postgresql,
    "pymysql": _of_mysql,
    "mysqldb": _of_mysql,
}
