"""The spans of traces as files, for a tracking server that keeps none: as MLflow's client has them there.

A server whose own store is one of files refuses spans for good. MLflow's client takes a trace that has no tag about its
spans for one whose spans are in a file among its artifacts, and so do all readers.

Spans come as they end, several requests for one trace. So the file is read, and written again with those that are new.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mlflow.tracing.utils import TraceJSONEncoder
from mlflow.tracing.utils.artifact_utils import TRACE_DATA_FILE_NAME
from mlflow.utils.uri import append_to_uri_path

from mlflow_outbox.counters import printable
from mlflow_outbox_worker.mlflow_sink.artifacts import Artifacts

#: An id that is the name of one folder; a journal may be one that somebody else wrote.
_ID: Final = re.compile(r"[\w.:\-]*\w[\w.:\-]*")
#: What all spans in a file have.
_FIELDS: Final = frozenset({"span_id", "parent_span_id", "start_time_unix_nano"})


def keep(store: Any, artifacts: Artifacts, experiment_id: str, spans: Sequence[Any]) -> None:
    """Put spans into the files of their traces, the root first and the others as they began.

    Args:
        store: MLflow's.
        artifacts: where files go.
        experiment_id: in which the traces are.
        spans: of one trace or several.

    Raises:
        ValueError: the id of a trace is none.
    """
    for span in spans:
        if not _ID.fullmatch(span.trace_id):
            msg = f"the trace id {printable(span.trace_id)!r} is none"
            raise ValueError(msg)
    root = store.get_experiment(experiment_id).artifact_location
    for trace_id in dict.fromkeys(span.trace_id for span in spans):
        place = append_to_uri_path(root, "traces", trace_id, "artifacts")
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            found = _held(artifacts, place, Path(private, "held"))
            found |= {one["span_id"]: one for one in (span.to_dict() for span in spans if span.trace_id == trace_id)}
            in_order = sorted(
                found.values(), key=lambda one: (bool(one["parent_span_id"]), int(one["start_time_unix_nano"]))
            )
            file = Path(private, TRACE_DATA_FILE_NAME)
            text = json.dumps({"spans": in_order}, cls=TraceJSONEncoder, ensure_ascii=False)
            file.write_text(text, encoding="utf-8")
            artifacts.upload(place, file, TRACE_DATA_FILE_NAME)


def _held(artifacts: Artifacts, place: str, target: Path) -> dict[str, dict[str, Any]]:
    """Return the spans that a trace's file has, by their ids; none of one that nobody can read."""
    size = artifacts.size_of(place, TRACE_DATA_FILE_NAME)
    if size is None:
        return {}
    artifacts.download(place, TRACE_DATA_FILE_NAME, target, size)
    try:
        return {one["span_id"]: one for one in json.loads(target.read_bytes())["spans"] if one.keys() >= _FIELDS}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
