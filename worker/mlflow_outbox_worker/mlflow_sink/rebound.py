"""MLflow's ``http_request`` over another transport, and without looking for a module.

It is a second function of the same code, with other globals: MLflow's own stays as it is for everybody else.

MLflow asks its providers of headers at each request, and one of its own, for Databricks, tries to import ``dbruntime``,
``pyspark`` and ``IPython`` each time, in vain almost everywhere. A thread that looks for a module holds CPython's
import lock while it asks the finders of ``sys.meta_path``. MLflow's finder there wants a lock of its own, which
``mlflow.autolog()`` holds in another thread while it imports: both wait for ever. So

* what that provider says is found out once in the life of a process (``prepare`` of the package sees to it that this
  is in a thread of the program's own): its notebook, job and cluster do not change;
* every other provider, above all those of plugins, is asked at each request: their tokens expire.

What the Databricks SDK raises for a refusal MLflow makes an answer of, with status 500 where it does not know the code.
A workspace's gateway gives the status for a code, or a page: a login that is over would be a failure that passes, and a
page with status 400 MLflow's verdict on the events. So what was answered is returned as it came. At 429 and 503 the SDK
sleeps for as long as the answer asks, be it an hour, whatever its time is, and raises a TimeoutError then, as if nobody
had answered. Nobody can end that sleep, so it is not begun: delivery makes its own pauses.
"""

from __future__ import annotations

import builtins
import functools
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

import requests
from mlflow.tracking.request_header import registry
from mlflow.tracking.request_header.databricks_request_header_provider import DatabricksRequestHeaderProvider
from mlflow.utils import rest_utils

_TRANSPORT_NAME = "_get_http_response_with_retries"
_REGISTRY_NAME = "_request_header_provider_registry"
#: MLflow's function that makes a request by the Databricks SDK, and again.
_SDK_NAME: Final = "_retry_databricks_sdk_call_with_exponential_backoff"
#: MLflow's function that makes the SDK's client, one for each set of arguments, and ours has its own.
_CLIENT_NAME: Final = "get_workspace_client"
#: A refusal in plain text, of which MLflow makes as good an answer as there is.
_IN_WORDS: Final = re.compile(rb"[A-Z_]+: ")


@functools.cache
def of_databricks() -> dict[str, str]:
    """Return what MLflow's provider for Databricks says; found out at the first call."""
    provider = DatabricksRequestHeaderProvider()
    return dict(provider.request_headers()) if provider.in_context() else {}


class _OfDatabricks:
    """Stands in for MLflow's provider for Databricks."""

    @staticmethod
    def in_context() -> bool:
        return True

    @staticmethod
    def request_headers() -> dict[str, str]:
        return of_databricks()


class _Providers:
    """MLflow's registry of providers as it is at present, with the stand-in in its place."""

    def __iter__(self) -> Iterator[Any]:
        for provider in getattr(registry, _REGISTRY_NAME):
            yield _OfDatabricks if type(provider) is DatabricksRequestHeaderProvider else provider


def _rebound(original: Any, **names: Any) -> Any:
    """Return a function with the code of another one, for which some global names mean something else."""
    globals_of = {**original.__globals__, **names}
    found = types.FunctionType(
        original.__code__, globals_of, original.__name__, original.__defaults__, original.__closure__
    )
    found.__kwdefaults__ = original.__kwdefaults__
    return found


def _has(function: Any, name: str) -> bool:
    return name in getattr(getattr(function, "__code__", None), "co_names", ())


def _resolve() -> Any:
    original = registry.resolve_request_headers
    if not _has(original, _REGISTRY_NAME):
        return original  # a future MLflow's own, whatever it looks for
    return _rebound(original, **{_REGISTRY_NAME: _Providers()})


#: MLflow's ``resolve_request_headers``, with the stand-in among the providers that it asks.
_resolve_request_headers = _resolve()


def _import(name: str, *details: Any, **more: Any) -> Any:
    """Import what ``http_request`` imports at each request; where its headers come from, something else."""
    if name == registry.__name__:
        return types.SimpleNamespace(resolve_request_headers=_resolve_request_headers)
    return builtins.__import__(name, *details, **more)


def _by_sdk(call_func: Callable[[], requests.Response], **_policy: Any) -> requests.Response:
    """Make a request by the Databricks SDK once; return what was answered where it raises that."""
    try:
        return call_func()
    except OSError as error:  # all of the SDK's own are
        answer = _answered(error)
        if answer is None or (not isinstance(error, TimeoutError) and _IN_WORDS.match(answer.content)):
            raise
        return answer


class _Sleepless:
    """Stands in for the clock of the Databricks SDK."""

    time = staticmethod(time.time)

    @staticmethod
    def sleep(seconds: float) -> None:
        """End the call as the SDK does when its time is up."""
        msg = f"a pause of {seconds:.0f} s is asked for"
        raise TimeoutError(msg) from sys.exc_info()[1]


def _client(*arguments: Any, **named: Any) -> Any:
    """Return MLflow's client of the Databricks SDK, which makes no pauses."""
    client = rest_utils.get_workspace_client(*arguments, **named)
    requester: Any = getattr(client.api_client, "_api_client", None)
    if hasattr(requester, "_clock"):
        requester._clock = _Sleepless()  # noqa: SLF001 - MLflow makes the client, and gives it none
    return client


def _answered(error: OSError) -> requests.Response | None:
    """Return the answer of which the Databricks SDK made an error, which does not hold it; the SDK's frame does."""
    raised = error.__cause__ if isinstance(error, TimeoutError) else error
    if raised is not None and type(raised).__module__.startswith("databricks.sdk.errors"):
        for frame, _ in traceback.walk_tb(raised.__traceback__):
            held = frame.f_locals.get("response")
            if isinstance(held, requests.Response):
                return held
    return None


def http_request_over(perform: Callable[..., requests.Response]) -> Callable[..., Any]:
    """Return MLflow's ``http_request`` with another function in the place of its transport.

    Args:
        perform: has the arguments of ``_get_http_response_with_retries``. Where MLflow has none of that name, the
            function that is returned is MLflow's own.
    """
    original: Callable[..., Any] = rest_utils.http_request
    if not _has(original, _TRANSPORT_NAME):
        return original
    builtin = {**vars(builtins), "__import__": _import}
    names = {_TRANSPORT_NAME: perform, _SDK_NAME: _by_sdk, _CLIENT_NAME: _client, "__builtins__": builtin}
    rebound: Callable[..., Any] = _rebound(original, **names)
    return rebound
