"""Waiting for the delivery of what was just written, where the setting ``write_timeout`` asks for it.

Delivery is in the background, so whoever asks the server itself, over raw HTTP or in another program, may be a moment
too early. Scripts and tests that write here and look there can have each write wait until the server has it, for
``write_timeout`` seconds at most. An outage costs one such wait and not one for each write: after one in vain, none is
waited for during a pause that doubles up to half a minute. Nothing that waits in vain is lost, it is only later.

MLflow's asynchronous entry points do not wait: that is what they are called for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow_outbox import stopwatch

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.plugin.wrapped import Server

T = TypeVar("T")

#: The store's methods that write to a journal and whose effect others may look for.
WRITES: Final = (
    "create_experiment",
    "create_logged_model",
    "create_run",
    "delete_experiment",
    "delete_experiment_tag",
    "delete_logged_model",
    "delete_logged_model_tag",
    "delete_run",
    "delete_tag",
    "delete_trace_tag",
    "finalize_logged_model",
    "link_traces_to_run",
    "log_batch",
    "log_inputs",
    "log_logged_model_params",
    "log_metric",
    "log_outputs",
    "log_param",
    "log_spans",
    "record_logged_model",
    "rename_experiment",
    "restore_experiment",
    "restore_run",
    "set_experiment_tag",
    "set_logged_model_tags",
    "set_tag",
    "set_trace_tag",
    "start_trace",
    "unlink_traces_from_run",
    "update_run_info",
)
#: Seconds for which no write is waited for after one in vain: at first, and at most.
_PAUSE_FIRST: Final = 1.0
_PAUSE_MOST: Final = 30.0


class Arrivals:
    """Waits for what one store has written.

    Args:
        outbox: the outbox.
        server: the server's store, which may be known to be away.

    Attributes:
        wanted: the setting asks for it, and somebody delivers.
    """

    def __init__(self, outbox: Outbox, server: Server) -> None:
        self._outbox = outbox
        self._server = server
        self.wanted = outbox.settings.write_timeout > 0 and outbox.worker_kind != "none"
        self._pause = _PAUSE_FIRST
        self._in_vain_until = 0.0

    def wait(self) -> None:
        """Wait until everything that was written is delivered, if the setting asks for it and there is hope."""
        if not self.wanted:
            return
        if self._server.is_away() or stopwatch.seconds() < self._in_vain_until:
            self._outbox.counters.add("writes_not_awaited")
        elif self._outbox.flush(self._outbox.settings.write_timeout):
            self._pause, self._in_vain_until = _PAUSE_FIRST, 0.0
        else:
            self._outbox.counters.add("writes_not_awaited")
            self._in_vain_until = stopwatch.seconds() + self._pause
            self._pause = min(_PAUSE_MOST, self._pause * 2)


def awaiting(cls: type[T]) -> type[T]:
    """Have the writing methods of a store, which has ``arrivals``, wait for what they wrote; a class decorator."""
    for name in WRITES:
        setattr(cls, name, _awaited(getattr(cls, name)))
    return cls


#: How deep a thread is in methods that write: of those that call one another, the outermost waits.
_depth = threading.local()


def _awaited(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.arrivals.wanted:
            return method(self, *args, **kwargs)
        outer = getattr(_depth, "calls", 0)
        _depth.calls = outer + 1
        try:
            result = method(self, *args, **kwargs)
        finally:
            _depth.calls = outer
        if not outer:
            self.arrivals.wait()
        return result

    return call
