"""The store that MLflow is given for an ``outbox+`` tracking URI: see the package's docstring for what is where.

Manners: what MLflow refuses at the call (a bad key, a changed param, an unknown run) is refused at the call here too.
Beyond that no write ever fails because of the server, nor waits for it unless ``write_timeout`` asks for that (see
``arrivals``). Three calls ask it first, for at most ``create_timeout`` seconds, because their answers are seen by
people: the creation of experiments, runs and logged models. A call that only the server can answer fails at once, and
says so, while the server is away.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from mlflow.store.tracking.abstract_store import AbstractStore

from mlflow_outbox.counters import described
from mlflow_outbox.living import Living
from mlflow_outbox.plugin import rest
from mlflow_outbox.plugin.arrivals import awaiting
from mlflow_outbox.plugin.traces import Traces
from mlflow_outbox.plugin.wrapped import delegating


@awaiting
@delegating(AbstractStore)
class OutboxStore(Traces, AbstractStore):  # type: ignore[misc]  # mlflow is not followed by mypy
    """MLflow's tracking store through an outbox."""

    def __init__(self, store_uri: str, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        _stores.add(self)
        self.pulse.begin()

    def forked(self) -> None:
        """Renew the locks in a forked child: threads that held them stayed in the parent."""
        self.server.forked()
        self.journals.forked()
        self.made_here.forked()
        self._files.forked()
        self._recent_lock = threading.RLock()
        self._spans.forked()
        self._offline_lock = threading.RLock()

    @property
    def supports_workspaces(self) -> bool:
        """Workspaces are the server's own; they are not offered here."""
        return False

    @property
    def supports_trace_archival(self) -> bool:
        """Archives of traces are the server's own; they are not offered here."""
        return False


_stores: Living[Any] = Living()


def _after_fork_in_child() -> None:
    for store in _stores.members():
        store.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


def at_exit() -> None:
    """Bring what MLflow would only say later at the exit into the journals, before the outbox's last delivery.

    MLflow's end of an active run has come already, unless MLflow was imported before the plugin was registered. Called
    by ``entry``, which says when.
    """
    if not _stores:
        return
    rest.end()
    from mlflow.tracking import fluent

    with _guarded("the end of its active run"):
        fluent._safe_end_run()
    with _guarded("its last traces"):
        queue = _queue_of_traces()
        _export_batches()
        if queue is not None:
            queue.flush(terminate=True)


def _queue_of_traces() -> Any:
    """Return the queue in which MLflow has what the program traced, or None.

    Only of a program that has traced: else it would start OpenTelemetry, whose imports run text as code, and after
    that Python has forgotten that the program ends by ctrl-C.
    """
    tracing: Any = sys.modules.get("mlflow.tracing.provider")
    if tracing is None or not tracing.provider.once._done:
        return None
    return getattr(tracing._get_trace_exporter(), "_async_queue", None)


def _export_batches() -> None:
    """Have the spans exported that OpenTelemetry holds back.

    It does so by itself at the exit, but of a provider that the program made before MLflow's first store (which MLflow
    joins where ``MLFLOW_USE_DEFAULT_TRACER_PROVIDER`` is false) after the outbox's last delivery. Older versions of
    MLflow hold none back.
    """
    export = getattr(sys.modules.get("mlflow.tracing.processor.base_mlflow"), "flush_all_batch_processors", None)
    if export is not None:
        export(terminate=True)


def _before_the_exit() -> None:
    """Have the last traces of a program exported by the thread that ends it.

    MLflow's queue starts its threads for the first of them, which OpenTelemetry holds back for seconds: until the exit
    of a short program. Python 3.12 starts none there, and MLflow would lose the traces of such a program.
    """
    if not _stores:
        return
    with _guarded("its last traces"):
        queue = _queue_of_traces()
        if queue is not None and not queue.is_active():
            queue.put = _handled


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Go on with the exit, and the outbox's last delivery, when MLflow's own part of it fails.

    Args:
        what: may be missing then, to end a sentence.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever MLflow raises at the exit; counted and said
        for store in _stores.members():
            store.outbox.counters.add("exit_errors")
            store.outbox.counters.warn_once(
                ("exit", what), f"mlflow-outbox: MLflow failed at the exit ({described(error)}); missing may be {what}"
            )


def _handled(task: Any) -> None:
    task.handle()


with contextlib.suppress(RuntimeError):  # the exit has begun
    # Handlers of atexit are too late: OpenTelemetry's, which was registered last, is the first of them.
    threading._register_atexit(_before_the_exit)  # type: ignore[attr-defined]  # as concurrent.futures does
