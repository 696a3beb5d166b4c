"""The worker as a thread of the experiment: a daemon, so that it can never keep a program from ending.

The loop itself runs in a child process (``child``), so that it takes nothing of the experiment's interpreter, unless
the experiment has imported MLflow: then only once there is much to deliver (``handover``). Until then its modules are
imported before, when the tracker or the plugin's store is made (``prepare``): a thread that imports while the program
calls ``mlflow.autolog()`` can make both wait for ever, because MLflow and CPython each hold a lock that the other one
wants (``mlflow_sink.rebound``). A program that imports MLflow only after that has its thread import them, not the call
that starts it: that call is somebody's first ``log_metric``, and they take a tenth of a second. What starts the child
takes some milliseconds; that call imports it, and starts the child too (``child``). A fork waits until they are there
(``forking``).
"""

from __future__ import annotations

# Imported here, where the worker starts, because it cannot be imported for the first time while the interpreter
# exits: a script that logs and ends at once would otherwise lose its flush to "can't register atexit after shutdown"
# somewhere inside of mlflow.
import concurrent.futures.thread  # noqa: F401 - see above
import importlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox_worker.forking import importing
from mlflow_outbox_worker.handover import Handover, Load

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox_worker.child import ChildDelivery, Loop


class ThreadWorker:
    """A delivery loop in a daemon thread.

    Args:
        make: makes the loop; called in the thread.
        counters: counts a loop that could not be made.
        unmake: ends what was begun for a loop that is not run.

    Attributes:
        delivery: the loop; None until it is made.
    """

    def __init__(self, make: Callable[[], Loop], counters: Counters, unmake: Callable[[], None] = lambda: None) -> None:
        self._make = make
        self._unmake = unmake
        self._counters = counters
        self.delivery: Loop | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mlflow-outbox-worker", daemon=True)

    def __repr__(self) -> str:
        return f"<ThreadWorker {self.delivery or 'that begins'!r}>"

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: no thread can be started any more.
        """
        self._thread.start()

    def _run(self) -> None:
        courtesy.works()
        try:
            delivery = self._make()
        except Exception as error:  # noqa: BLE001 - whatever an import raises; counted and said, and tried again later
            self._counters.add("worker_not_started")
            self._counters.warn_once(
                ("worker", type(error)),
                f"mlflow-outbox: no worker could be started ({printable(repr(error), 300)}); events stay on disk",
            )
            return
        finally:
            courtesy.leaves()
        self.delivery = delivery
        if self._stopping:  # read after the line above, as stop() reads that after it has set this
            self._unmake()
        else:
            delivery.run()

    def is_alive(self) -> bool:
        """Return whether the loop runs."""
        return self._thread.is_alive()

    @property
    def end(self) -> str:
        """How it ended: why is said where it happens."""
        return "a thread that could not begin"

    def wake(self) -> None:
        """Let the loop look at the doorbell, which it does at its beginning anyway."""
        if self.delivery is not None:
            self.delivery.wake()

    def look(self) -> None:
        """Do nothing: the thread itself tells a child what changes."""

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether another process syncs these segments for this one; have it do so from now on."""
        return self.delivery is not None and self.delivery.syncs(segments)

    def stop(self, timeout: float) -> None:
        """End the loop, waiting at most timeout seconds; a request that hangs is left to itself."""
        self._stopping = True
        if self.delivery is not None:
            self.delivery.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)


def is_mlflow_imported() -> bool:
    """Return whether this process has mlflow already."""
    return "mlflow" in sys.modules


def prepare(outbox: Outbox) -> None:
    """Import in this thread what the threads of an outbox use, where they share the program's MLflow.

    What cannot be imported is counted, and said by whoever needs it.
    """
    if not is_mlflow_imported():
        return
    try:
        with importing():
            for name in ("child", "delivery", "flush", "reading", "mlflow_sink"):
                importlib.import_module(f"mlflow_outbox_worker.{name}")
        mlflow_sink: Any = sys.modules["mlflow_outbox_worker.mlflow_sink"]
        mlflow_sink.prepare(outbox.destination.secret_uri or outbox.destination.uri)
    except Exception as error:  # noqa: BLE001 - whatever an import raises; counted and said, the worker tries again
        outbox.counters.add("worker_not_prepared")
        outbox.counters.warn_once(
            ("prepare", type(error)),
            f"mlflow-outbox: what delivers cannot be imported ({printable(repr(error), 300)}); it is tried again "
            "with the first event, and events stay on disk",
        )


def start(outbox: Outbox) -> ThreadWorker:
    """Start delivering an outbox in a thread.

    Raises:
        RuntimeError: no thread can be started any more.
    """

    def here(leave: Callable[[], bool] = lambda: False) -> Loop:
        with importing():
            from mlflow_outbox_worker.delivery import Delivery
        return Delivery(
            outbox.directory, outbox.destination, outbox.settings, outbox.counters, kind="thread", leave=leave
        )

    def elsewhere() -> ChildDelivery:
        with importing():
            from mlflow_outbox_worker.child import ChildDelivery
        return ChildDelivery(outbox, here)

    def make() -> Loop:
        return Handover(here(Load(outbox.counters).is_high), elsewhere, outbox.counters)

    if is_mlflow_imported():
        worker = ThreadWorker(make, outbox.counters)
        worker.start()
        return worker
    with importing():  # in this thread, which would wait for another one's imports longer than for its own
        importlib.import_module("mlflow_outbox_worker.child")
    delivery = elsewhere()
    delivery.begin()
    worker = ThreadWorker(lambda: delivery, outbox.counters, delivery.abandon)
    try:
        worker.start()
    except BaseException:  # raised again: the child would wait for what it is to be told
        delivery.abandon()
        raise
    return worker
