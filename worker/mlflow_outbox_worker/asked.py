"""A sink that remembers whether it was asked anything: a turn that asked nothing says nothing about the destination."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mlflow_outbox_worker.sink import Sink


class AskedSink:
    """Passes everything on to a sink, and counts the calls that each thread makes.

    Args:
        sink: the tracking store.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._here = threading.local()

    def __repr__(self) -> str:
        return f"<AskedSink of {self._sink!r}>"

    @property
    def calls(self) -> int:
        """How many calls this thread has made."""
        number: int = getattr(self._here, "calls", 0)
        return number

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sink, name)
        return self._counting(found) if callable(found) else found

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._here.calls = self.calls + 1
            return method(*arguments, **named)

        return call
