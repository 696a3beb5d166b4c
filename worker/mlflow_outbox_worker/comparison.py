"""Comparing runs on disk with what a tracking store holds of them, at any time, for whoever asks.

Delivery reads an ended run back by itself before it files it. This does the same again for any run that is still on
disk: filed or not, ended or not, at its own destination or another one that it was replayed to. It changes nothing,
here or there.
"""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Literal, NamedTuple

from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.backlog import left
from mlflow_outbox_worker.jobs import view_of
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.verification import altered_artifacts, differences, wrong_contents


class Comparison(NamedTuple):
    """What comparing one run has shown.

    Attributes:
        state: "same": the store holds everything; "pending": not all was sent yet, and what is compared is what was;
            "different": something differs; "absent": the store does not have the run; "unknown": it could not be asked,
            or the run cannot be read on disk.
        remote_id: the run's id in the store; "" when it has none.
        pending: events that are not sent yet.
        dead: events that the store refused for good, which are not expected in it.
        differences: one sentence each.
    """

    run_id: str
    state: Literal["same", "pending", "different", "absent", "unknown"]
    remote_id: str = ""
    pending: int = 0
    dead: int = 0
    differences: tuple[str, ...] = ()


def compare(
    sink: Sink,
    run_id: str,
    folders: tuple[Path, ...],
    record: RunRecord | None,
    letters: Collection[DeadLetter],
    *,
    deep: bool = False,
    experiment: str = "",
) -> Comparison:
    """Compare one run on disk with what a store holds of it.

    Args:
        sink: the store.
        run_id: the run's id in its outbox.
        folders: its directories.
        record: what a ledger knows of its delivery to this store; None when nothing does.
        letters: its dead letters.
        deep: compare every point, and the content of every artifact, which is downloaded.
        experiment: the one that it was replayed into; "" is its own.

    Raises:
        SinkError: the store could not be asked.
        OSError: the run cannot be read.
    """
    reader = RunReader(*folders)
    remote_id = record.remote_id if record is not None and record.remote_id else _find(sink, run_id, reader, experiment)
    if not remote_id:
        return Comparison(run_id, "absent", pending=sum(reader.next_numbers().values()))
    pending = 0 if record is None else sum(left(reader.next_numbers(record.cursors), record, parked=False))
    view = view_of(folders)
    try:
        found = differences(sink, remote_id, view, letters, "full" if deep else "latest", reader=reader)
        found += [altered.sentence for altered in altered_artifacts(sink, remote_id, view, letters)]
    except SinkError as error:
        if error.status != HTTPStatus.NOT_FOUND and error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return Comparison(run_id, "absent", remote_id, pending)
    if deep:
        found += wrong_contents(sink, remote_id, view, letters)
    state: Literal["same", "pending", "different"] = "different" if found else "same"
    return Comparison(run_id, "pending" if pending else state, remote_id, pending, len(letters), tuple(found))


def _find(sink: Sink, run_id: str, reader: RunReader, experiment: str) -> str:
    _, header = reader.started()
    experiment_id = sink.find_experiment(experiment or header.experiment) if header is not None else None
    found = sink.find_runs(experiment_id, run_id) if experiment_id is not None else []
    return found[0] if found else ""
