"""Points of models and datasets: of several with one step and millisecond a database keeps one for each model.

Where a program has chosen the times, as MLflow's client does when it copies a history to a model, all but one of such
points are the run's alone. Those that are logged just now are moved apart by a millisecond, for calls that wait for a
server come further apart than that.
"""

from __future__ import annotations

import copy
from typing import Final

from mlflow.entities import Metric

from mlflow_outbox.plugin.journals import OpenRun, now_ms
from mlflow_outbox.spool.events import Metric as MetricEvent

#: Milliseconds within which a point's time is that of the call, and not one that the program has chosen.
_JUST_NOW: Final = 1000


def is_linked(metric: Metric) -> bool:
    """Return whether a point names a model or a dataset."""
    return bool(getattr(metric, "model_id", None) or getattr(metric, "dataset_name", None))


def with_float(metric: Metric) -> Metric:
    """Return a metric with a value of Python's own, which a journal can hold."""
    taken = copy.copy(metric)
    taken._value = float(metric.value)
    return taken


def taken(run: OpenRun, metrics: list[Metric]) -> list[Metric]:
    """Return those points of one call that models take, and log the others to the run alone.

    A history that MLflow copies to a new model may have several of one step and millisecond. The run has them
    already, with the times that they have; of those of a model the last one is taken.

    Args:
        run: the run that the call is about.
        metrics: all points of the call that are linked, with values of Python's own.
    """
    last = {(one.model_id, one.key, one.step, one.timestamp): one for one in metrics if one.model_id}
    found = []
    for metric in metrics:
        if last.get((metric.model_id, metric.key, metric.step, metric.timestamp), metric) is metric:
            found.append(metric)
        else:
            _log_alone(run, metric)
    if len({metric.timestamp for metric in found}) > 1:  # they have times of their own, and not that of the call
        return [metric for metric in found if _goes_on(run, metric)]
    return [_apart(run, metric) for metric in found]


def _goes_on(run: OpenRun, metric: Metric) -> bool:
    """Return whether a model has no such point from the call before; else log it to the run alone.

    MLflow copies a history a thousand points at a time, and may cut it in the middle of a millisecond.
    """
    if not metric.model_id:
        return True
    key, place = (metric.model_id, metric.key), (metric.step, metric.timestamp)
    step, _, last = run.linked.get(key, (0, 0, -1))
    if place == (step, last):
        _log_alone(run, metric)
        return False
    run.linked[key] = metric.step, metric.timestamp, metric.timestamp
    return True


def _apart(run: OpenRun, metric: Metric) -> Metric:
    """Return a point of a model that was logged just now with a time that no other one of its step has."""
    if not metric.model_id:
        return metric
    key, time_ms = (metric.model_id, metric.key), metric.timestamp
    step, first, last = run.linked.get(key, (0, 0, -1))
    if step == metric.step and first <= time_ms <= last and time_ms > now_ms() - _JUST_NOW:
        time_ms = metric._timestamp = last + 1
    else:
        first = time_ms
    run.linked[key] = metric.step, first, time_ms
    return metric


def _log_alone(run: OpenRun, metric: Metric) -> None:
    run.append(MetricEvent(metric.key, metric.value, metric.timestamp, metric.step))
