"""What a tracker does with an autopilot session's objects: reads them, whatever they raise, and logs them to a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from mlflow_outbox import autopilot
from mlflow_outbox.counters import Counters, described, shown
from mlflow_outbox.doubts import Doubts
from mlflow_outbox.errors import InvalidEventType
from mlflow_outbox.interrupts import forward
from mlflow_outbox.refusals import Refusals
from mlflow_outbox.run import Run


def content_of(
    what: str, read: Callable[[], autopilot.RunContent], counters: Counters, *, strict: bool
) -> autopilot.RunContent | None:
    """Return what is to be logged of an object; None when it cannot be read, which is counted and said.

    Args:
        what: what it is, for messages.
        read: reads it.
        counters: counts "unreadable_objects".
        strict: raise what reading it raises.
    """
    try:
        content = read()
    except Exception as error:  # a session's objects may raise anything; counted and said, never raised
        forward(error)
        if strict:
            raise
        counters.add("unreadable_objects")
        counters.warn_once(
            ("unreadable", what, type(error)), f"mlflow-outbox: {what} could not be read: {shown(error, 200)}"
        )
        return None
    for thing, reason in content.refused:
        Doubts(counters).unreadable(f"{what}: {thing}", reason)
    return content


def log(content: autopilot.RunContent, run: Run) -> None:
    """Log all of it to a run, and end that, also where a refusal is raised, or what a signal handler raises."""
    try:
        if content.params:
            run.log_params(content.params)
        if content.metrics:
            run.log_metrics(content.metrics, timestamp=content.end_time_ms)
        if content.tags:
            run.set_tags(content.tags)
        for name, text in content.texts.items():
            run.log_text(text, name)
        for path, folder in content.files:
            run.log_artifact(path, folder)
    finally:
        run.end(content.status, content.end_time_ms)


def paths_of(plots: Iterable[str | os.PathLike[str]], refusals: Refusals) -> list[str | os.PathLike[str]] | None:
    """Return the paths of plots; None when they are none, which is counted as "refused_bad_mapping" and said.

    Raises:
        InvalidEventType: they are none; only when strict.
    """
    try:
        return [plots] if isinstance(plots, (str, os.PathLike)) else list(plots)
    except Exception as error:  # noqa: BLE001 - a session's objects may raise anything; counted and said
        forward(error)
        msg = f"log_visualizations takes paths, not a {type(plots).__name__}: {described(error)}"
        refusals.refuse(InvalidEventType("bad_mapping", msg), "plots")
        return None
