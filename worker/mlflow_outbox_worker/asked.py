"""A sink that remembers whether it was asked anything: work that asked nothing says nothing about the destination."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mlflow_outbox_worker.sink import Sink


class AskedSink:
    """Passes everything on to a sink, and remembers for each thread whether it made a call.

    Args:
        sink: the tracking store.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._here = threading.local()

    def __repr__(self) -> str:
        return f"<AskedSink of {self._sink!r}>"

    def was_asked(self) -> bool:
        """Return whether this thread has made a call since it was last here."""
        asked: bool = getattr(self._here, "asked", False)
        self._here.asked = False
        return asked

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sink, name)
        return self._remembering(found) if callable(found) else found

    def _remembering(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._here.asked = True
            return method(*arguments, **named)

        return call
