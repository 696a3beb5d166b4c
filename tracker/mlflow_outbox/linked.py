"""Points that name a model or a dataset: in the journal each call is a request of MLflow's own.

A training loop with an active model logs nothing else, so there can be as many as of other points. Those that follow
each other are sent as one request, and a run's view, which is written with each window, keeps the latest of them and
forgets the others but for the last point of each metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from mlflow_outbox.spool.events import Event, Metric, Request, arguments_of

OPERATION: Final = "log_batch"
#: Bytes of the arguments of requests that are sent as one; MLflow's server takes 1,000,000 (``MAX_BATCH_LOG_REQUEST``).
_MOST_BYTES: Final = 400_000


def is_linked(event: Event) -> bool:
    """Return whether an event is a request of such points that is still to be made, and has all its arguments."""
    return isinstance(event, Request) and event.operation == OPERATION and not event.known and not event.kept


def points_in(arguments: bytes) -> list[Metric]:
    """Return the points of a request as those of its run, which has them too; none when they cannot be read.

    Args:
        arguments: as ``plugin.codec`` writes them.
    """
    try:
        return [
            Metric(str(one["key"]), _number(one["value"]), int(one["timestamp"]), int(one["step"]))
            for one in (metric["v"] for metric in arguments_of(arguments).get("metrics") or ())
        ]
    except (ValueError, TypeError, LookupError):
        return []


def _number(value: Any) -> float:
    return float(value["v"] if isinstance(value, dict) else value)  # what JSON has no number for


def groups(requests: Sequence[Request], most: int) -> Iterator[tuple[Request, ...]]:
    """Yield requests of such points, in order, as those that can be sent as one.

    Args:
        requests: that follow each other.
        most: points in one request.
    """
    group: list[Request] = []
    rest: object = None
    points = size = 0
    for request in requests:
        own, others = _parted(request)
        points, size = points + len(own), size + len(request.arguments)
        if group and (others is None or others != rest or points > most or size > _MOST_BYTES):
            yield tuple(group)
            group, points, size = [], len(own), len(request.arguments)
        group.append(request)
        rest = others
    if group:
        yield tuple(group)


def joined(requests: Sequence[Request]) -> Request:
    """Return one request for those of a group."""
    arguments = arguments_of(requests[0].arguments)
    arguments["metrics"] = [metric for request in requests for metric in _parted(request)[0]]
    return msgspec.structs.replace(requests[0], arguments=msgspec.json.encode(arguments))


def _parted(request: Request) -> tuple[list[Any], dict[str, Any] | None]:
    """Return the metrics of a request and its other arguments; None for these when it is not of metrics alone."""
    try:
        others = arguments_of(request.arguments)
    except ValueError:
        return [], None
    metrics = others.pop("metrics", None)
    if not isinstance(metrics, list) or others.get("params") or others.get("tags"):
        return [], None
    return metrics, others
