"""What a worker's monitoring is told: backlog, deliveries, the destination's answers, and how late events arrive.

The numbers of the requests are taken around the sink, by ``Meter``; those of the backlog by ``survey``; the rest
are the worker's own counters. ``Exporter`` shows them to prometheus-client, an optional dependency, which serves
them over HTTP in the format of OpenMetrics, or writes them to a file for the textfile collector of a node exporter.

How late an event arrives is the time from the logging call to MLflow's answer, as far as a metric point tells: a
program that gives time stamps of its own shifts it.
"""

from __future__ import annotations

import bisect
import collections
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import OutboxError
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.sink import MetricPoint, Sink, SinkError
from mlflow_outbox_worker.survey import OutboxSurvey, survey

#: Upper bounds in seconds: of one request, and of an event's way, which may take days when the server is away.
_REQUEST_BOUNDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_LATENCY_BOUNDS: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 604_800.0)
#: Seconds for which a survey of a backlog is good enough, however often somebody asks.
_FRESH: Final = 5.0
_PREFIX: Final = "mlflow_outbox_"

#: What is not a request of the store.
_NO_REQUESTS: Final = frozenset({"close"})


class MetricsUnavailable(OutboxError):
    """Raised when metrics are asked for and prometheus-client is not installed; the message says how to install it."""


class Histogram:
    """Counts observations by upper bound.

    Args:
        bounds: upper bounds in seconds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """Return cumulative counts by upper bound, as Prometheus wants them."""
        result, total = [], 0
        for bound, number in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += number
            result.append((bound, total))
        return result

    @property
    def sum(self) -> float:
        """Seconds of all observations together."""
        return self._sum


class Meter:
    """Measures the requests of one worker.

    Args:
        now_ms: wall-clock milliseconds since the epoch.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = stopwatch.seconds,
    ) -> None:
        self._now_ms = now_ms
        self._clock = clock
        self._lock = threading.Lock()
        self.answers: collections.Counter[str] = collections.Counter()
        self.requests = Histogram(_REQUEST_BOUNDS)
        self.latency = Histogram(_LATENCY_BOUNDS)

    def open_sink(self, uri: str, **options: Any) -> Sink:
        """Open the sink of a tracking URI, and measure it."""
        from mlflow_outbox_worker.mlflow_sink import open_sink

        return measured(open_sink(uri, **options), self)

    def call(self, operation: str, request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a request, and count its answer and its time."""
        started = self._clock()
        answer = "ok"
        try:
            return request(*args, **kwargs)
        except SinkError as error:
            answer = _class_of(error)
            raise
        finally:
            with self._lock:
                self.answers[answer] += 1
                self.requests.add(self._clock() - started)
                if operation == "log_batch" and answer == "ok":
                    now_ms = self._now_ms()
                    points: Sequence[MetricPoint] = args[1] if len(args) > 1 else kwargs.get("points", ())
                    for point in points:
                        self.latency.add(max(0.0, (now_ms - point.time_ms) / 1000))


class _MeasuredSink:
    """A sink whose requests are measured; everything else is the sink's."""

    def __init__(self, sink: Sink, meter: Meter) -> None:
        self._sink = sink
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sink, name)
        if not callable(found) or name in _NO_REQUESTS:
            return found
        return lambda *args, **kwargs: self._meter.call(name, found, *args, **kwargs)


def measured(sink: Sink, meter: Meter) -> Sink:
    """Return a sink that does what another does, and has its requests measured."""
    return cast("Sink", _MeasuredSink(sink, meter))


def _class_of(error: SinkError) -> str:
    if error.kind == "answer" and error.status is not None:
        return f"{error.status // 100}xx"
    return error.kind


class Exporter:
    """Shows one or several outboxes, and the workers that deliver them, to prometheus-client.

    Raises:
        MetricsUnavailable: prometheus-client is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            import prometheus_client
            from prometheus_client import core
        except ImportError:
            msg = "metrics need the package prometheus-client: pip install 'mlflow-outbox[metrics]'"
            raise MetricsUnavailable(msg) from None
        self._client: Any = prometheus_client
        self._core: Any = core
        self._settings = settings
        self._watched: list[_Watched] = []
        self._lock = threading.Lock()
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)

    def watch(
        self, directory: OutboxDirectory, counters: Counters, meter: Meter, holds_lease: Callable[[], bool]
    ) -> None:
        """Show one more outbox from now on."""
        with self._lock:
            self._watched.append(_Watched(directory, counters, meter, holds_lease, self._settings))

    def forget(self, directory: OutboxDirectory) -> None:
        """Show an outbox no more."""
        with self._lock:
            self._watched = [one for one in self._watched if one.directory is not directory]

    def serve(self, port: int, address: str) -> int:
        """Serve the metrics over HTTP in the background and return the port.

        Args:
            port: TCP port; 0 takes a free one.
            address: the address to listen at.

        Raises:
            OSError: the port is taken, or not ours to take.
        """
        server, _ = self._client.start_http_server(port, addr=address, registry=self._registry)
        return int(server.server_port)

    def write(self, path: Path) -> None:
        """Write the metrics to a file, wholly or not at all, readable by other users.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            for one in self._watched:
                one.forget()  # a file is read later than it is written: at least it is not old from the start
        draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(self._client.generate_latest(self._registry))
            os.replace(draft, path)
        except BaseException:  # raised again: the draft must not stay
            os.unlink(draft)
            raise

    def describe(self) -> list[Any]:
        """Say nothing in advance: the registry is this exporter's own."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield every metric family, as prometheus-client asks for them."""
        with self._lock:
            watched = list(self._watched)
        looks = [(one, one.look()) for one in watched]
        for name, text, value in _GAUGES:
            family = self._core.GaugeMetricFamily(_PREFIX + name, text, labels=["outbox"])
            for one, found in looks:
                family.add_metric([one.name], float(value(found)))
            yield family
        holds = self._core.GaugeMetricFamily(
            _PREFIX + "delivering", "1 while this worker is the one that delivers.", labels=["outbox"]
        )
        answers = self._core.CounterMetricFamily(
            _PREFIX + "requests", "Requests to the destination by the class of its answer.", labels=["outbox", "answer"]
        )
        counts = self._core.CounterMetricFamily(
            _PREFIX + "counts", "Everything else that is counted, by reason.", labels=["outbox", "reason"]
        )
        for one, _ in looks:
            holds.add_metric([one.name], float(one.holds_lease()))
            for answer, number in sorted(one.meter.answers.copy().items()):
                answers.add_metric([one.name, answer], number)
            for reason, number in sorted(one.counters.snapshot().items()):
                counts.add_metric([one.name, reason], number)
        refused = self._core.CounterMetricFamily(
            _PREFIX + "refused_events", "Events that programs refused or lost.", labels=["outbox", "reason"]
        )
        for one, found in looks:
            for reason, number in sorted({"refused_full": 0, **found.refused}.items()):
                refused.add_metric([one.name, reason], number)
        yield from (holds, answers, counts, refused)
        for name, text, reason in _COUNTERS:
            family = self._core.CounterMetricFamily(_PREFIX + name, text, labels=["outbox"])
            for one, _ in looks:
                family.add_metric([one.name], one.counters[reason])
            yield family
        for name, text, histogram in _HISTOGRAMS:
            family = self._core.HistogramMetricFamily(_PREFIX + name, text, labels=["outbox"])
            for one, _ in looks:
                held = histogram(one.meter)
                family.add_metric([one.name], held.buckets(), sum_value=held.sum)
            yield family


class _Watched:
    """One outbox whose metrics are shown, with the last look at it."""

    def __init__(
        self,
        directory: OutboxDirectory,
        counters: Counters,
        meter: Meter,
        holds_lease: Callable[[], bool],
        settings: Settings,
    ) -> None:
        self.name = directory.path.name
        self.counters = counters
        self.meter = meter
        self.holds_lease = holds_lease
        self.directory = directory
        self._settings = settings
        self._found: OutboxSurvey | None = None
        self._looked = 0.0

    def forget(self) -> None:
        """Have the next look be a new one."""
        self._found = None

    def look(self) -> OutboxSurvey:
        """Return what waits, as it was some seconds ago at most."""
        now = stopwatch.seconds()
        if self._found is None or now - self._looked > _FRESH:
            self._found, self._looked = survey(self.directory, self._settings), now
        return self._found


_GAUGES: Final[tuple[tuple[str, str, Callable[[OutboxSurvey], float]], ...]] = (
    ("backlog_events", "Events that wait for the destination.", lambda found: found.pending),
    ("backlog_bytes", "Bytes that all waiting events take, parked ones included.", lambda found: found.waiting_bytes),
    ("parked_events", "Events that wait for a person.", lambda found: found.parked),
    ("dead_letters", "Dead letters that nobody has dealt with.", lambda found: found.dead),
    ("oldest_event_age_seconds", "Age of the oldest waiting event.", lambda found: found.oldest_seconds),
    ("destination_up", "1 unless the last attempt found the destination away.", lambda found: found.note.state == "ok"),
)
_COUNTERS: Final = (
    ("delivered_events", "Events that have arrived.", "delivered"),
    ("retries", "Turns of a run that failed and will be repeated.", "retried"),
    ("parkings", "Times that a run or the destination was parked.", "parked"),
    ("dead_lettered_events", "Events all of which the destination refused for good.", "dead_events"),
    ("quarantined_ranges", "Ranges of journals that held no intact events.", "quarantined"),
    ("missing_events", "Events that must have existed and are not there.", "missing"),
)
_HISTOGRAMS: Final[tuple[tuple[str, str, Callable[[Meter], Histogram]], ...]] = (
    ("request_duration_seconds", "Time of one request to the destination.", lambda meter: meter.requests),
    ("delivery_latency_seconds", "Time from logging a metric point to its arrival.", lambda meter: meter.latency),
)
