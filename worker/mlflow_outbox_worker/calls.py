"""Requests of MLflow's own that travel through a journal: what ids in them have become, and what an answer means.

Provisional ids are replaced when a request is made, not when it is logged: a run that was started offline gets
MLflow's id only then. A request that names a run whose turn has not come waits for it (``Waits``), and with it what
follows in the same journal. Since an id is given before it is used, nothing can wait for itself.

Once in effect: most of these requests change nothing when they are made again. The others are recognised by their
answers (a row that exists), or carry a tag of the outbox by which what they create is found before it is created.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source

#: Seconds after which an id that no journal seems to explain is sent as it is, for MLflow to judge.
_PATIENCE: Final = 600.0
#: Bytes; a larger file of this name is none that MLflow wrote.
_MLMODEL_BYTES: Final = 16 * 1024 * 1024
_ROW_EXISTS: Final = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry|already been logged", re.IGNORECASE)
#: Operations whose list argument is sent one by one, so that one row that exists does not hold back the others.
_ONE_BY_ONE: Final = {"log_outputs": "models", "log_logged_model_params": "params"}
_DELETES: Final = frozenset({"delete_tag", "delete_experiment_tag", "delete_logged_model_tag", "delete_trace_tag"})


class Waits(Exception):
    """Raised when a request names something whose own creation has not been delivered yet; try again soon."""


class Calls:
    """Makes the requests of one outbox; used by several threads.

    Args:
        source: where the runs come from.
        sink: the tracking store.
        ledger: where ids are recorded.
    """

    def __init__(self, source: Source, sink: Sink, ledger: Ledger) -> None:
        self._source = source
        self._sink = sink
        self._ledger = ledger
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._since: dict[str, float] = {}

    # -- ids

    def rewritten(self, text: str, *, but: str = "") -> str:
        """Return text with every provisional id in it replaced by MLflow's.

        Args:
            text: whatever may hold ids.
            but: an id that is left as it is.

        Raises:
            Waits: one of them is not known yet.
            SinkError: MLflow had to be asked and could not be.
            LedgerUnavailable: the ledger could not be read.
        """
        if provisional.ARTIFACT_SCHEME in text:
            text = provisional.URI_PATTERN.sub(self._artifact_uri, text)
        return provisional.PATTERN.sub(
            lambda found: found.group() if found.group() == but else self.resolved(found.group()), text
        )

    def _artifact_uri(self, found: re.Match[str]) -> str:
        kind, local = found.groups()
        return self._sink.artifact_location(kind, self.resolved(local)).rstrip("/")

    def resolved(self, local: str) -> str:
        """Return what an id has become; ids that are MLflow's own, or nobody's, are returned as they are.

        Raises:
            Waits: its creation has not been delivered yet.
            SinkError: an experiment had to be made and could not be.
            LedgerUnavailable: the ledger could not be read.
        """
        if not provisional.is_provisional(local):
            return local
        remote = self._known.get(local) or self._looked_up(local)
        if remote:
            self._known[local] = remote
            self._since.pop(local, None)
            return remote
        waited = time.monotonic() - self._since.setdefault(local, time.monotonic())
        if waited > _PATIENCE and not any(folder.is_dir() for folder in self._source.folders(local)):
            return local
        msg = f"waits for {local}"
        raise Waits(msg)

    def _looked_up(self, local: str) -> str:
        if local.isdigit():
            return self._experiment(local)
        if local.startswith("m-"):
            return (self._ledger.meta(f"model/{local}") or b"").decode()
        record = self._ledger.record(local)
        return record.remote_id if record is not None else ""

    def _experiment(self, local: str) -> str:
        """Return MLflow's id of an experiment, which is created as its room says when there is none."""
        with self._lock:
            held = self._ledger.meta(f"experiment/{local}")
            if held is not None:
                return held.decode()
            room = provisional.room_of(local)
            for folder in self._source.everywhere(room):
                request = RunReader(folder).first(Request)
                if request is None or request.operation != "create_experiment":
                    continue
                wanted: dict[str, Any] = msgspec.json.decode(request.arguments)
                remote = self._sink.create_experiment(
                    wanted["name"], wanted.get("artifact_location"), wanted.get("tags") or {}
                )
                self._ledger.set_meta(f"experiment/{local}", remote.encode())
                return remote
        return ""

    @contextlib.contextmanager
    def content(self, file: Path, path: str) -> Iterator[Path]:
        """Yield a file with MLflow's ids in it: an ``MLmodel`` names its run, its model and where it lies.

        Args:
            file: the outbox's copy.
            path: what it is called in MLflow.

        Raises:
            Waits: one of the ids is not known yet.
            SinkError: MLflow had to be asked and could not be.
        """
        if posixpath.basename(path) != "MLmodel" or file.stat().st_size > _MLMODEL_BYTES:
            yield file
            return
        text = file.read_bytes().decode("utf-8", "surrogateescape")
        rewritten = self.rewritten(text)
        if rewritten == text:
            yield file
            return
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            changed = Path(private, "MLmodel")
            changed.write_bytes(rewritten.encode("utf-8", "surrogateescape"))
            yield changed

    # -- requests

    def make(self, request: Request, refuse: Callable[[Request, SinkError], None]) -> None:
        """Make one request.

        Args:
            request: as logged.
            refuse: told what MLflow refuses: the request, or the part of it that is refused.

        Raises:
            Waits: something that it names is not there yet.
            LedgerUnavailable: the ledger could not be used.
        """
        if request.operation == "create_logged_model":
            self._create_model(request, refuse)
        elif request.operation == "create_experiment":
            self._asked(request, refuse, lambda: self.resolved(_text(request, "experiment_id")))
        elif not request.known:
            body = self.rewritten(request.arguments.decode())
            for part in _parts(request.operation, body):
                self._call(request, part, refuse)

    def _call(self, request: Request, body: str, refuse: Callable[[Request, SinkError], None]) -> None:
        try:
            self._sink.call(request.operation, body)
        except SinkError as error:
            if not _is_applied(request.operation, error):
                refuse(msgspec.structs.replace(request, arguments=body.encode()), error)

    def _create_model(self, request: Request, refuse: Callable[[Request, SinkError], None]) -> None:
        wanted: dict[str, Any] = msgspec.json.decode(request.arguments)
        local = wanted.pop("model_id", "")
        if request.known or self._ledger.meta(f"model/{local}") is not None:
            return
        body = self.rewritten(msgspec.json.encode(wanted).decode(), but=local)  # a tag names it

        def create() -> str:
            experiment = _text(msgspec.structs.replace(request, arguments=body.encode()), "experiment_id")
            return self._sink.find_model(experiment, local) or self._sink.call(request.operation, body)

        remote = self._asked(request, refuse, create)
        if remote:
            self._ledger.set_meta(f"model/{local}", remote.encode())

    @staticmethod
    def _asked(request: Request, refuse: Callable[[Request, SinkError], None], ask: Callable[[], str]) -> str:
        try:
            return ask()
        except SinkError as error:
            refuse(request, error)
            return ""


def _text(request: Request, name: str) -> str:
    return str(msgspec.json.decode(request.arguments).get(name) or "")


def _parts(operation: str, body: str) -> list[str]:
    name = _ONE_BY_ONE.get(operation)
    if name is None:
        return [body]
    arguments: dict[str, Any] = msgspec.json.decode(body)
    return [msgspec.json.encode({**arguments, name: [item]}).decode() for item in arguments.get(name) or ()]


def _is_applied(operation: str, error: SinkError) -> bool:
    if operation in _ONE_BY_ONE:
        return _ROW_EXISTS.search(str(error)) is not None
    if operation in _DELETES:
        return error.code == "RESOURCE_DOES_NOT_EXIST" or "No tag with name" in str(error)
    return operation == "create_experiment" and error.code == "RESOURCE_ALREADY_EXISTS"
