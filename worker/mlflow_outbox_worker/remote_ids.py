"""What ids of this side have become in MLflow, wherever they are written: in a tag, a request, a URI or an ``MLmodel``.

Provisional ids are replaced when a request is made, not when it is logged: a run that was started offline gets
MLflow's id only then. What names a run whose turn has not come waits for it (``Waits``), and with it what follows in
the same journal. Since an id is given before it is used, nothing can wait for itself, but for a run or room to which
several programs write: their journals are read one after the other, and the first may name a model of the second, which
is made at once then (``Requests.make_ahead``); so is one of another run that waits for this one in the same way. The
tag that names a run's parent is treated so whatever the id in it looks like: the tracker's own ids do not look
provisional.

A model that MLflow has refused to make is waited for by nobody: its id is sent as it is, for MLflow to judge, and what
was to be done to the model is refused with it.

A replay to another place than the one something was logged for replaces MLflow's own ids in it too: see ``copies``.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import tempfile
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import is_run_id
from mlflow_outbox.spool.events import Request, arguments_of
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker import copies
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.origins import Origins
from mlflow_outbox_worker.precedence import Precedence, Waits
from mlflow_outbox_worker.requeue import MOVED, REFUSED
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source

#: Seconds after which an id that no journal seems to explain is sent as it is, for MLflow to judge.
_PATIENCE: Final = 600.0
#: Seconds after which it is looked for who has yet to make a model.
_SEARCH: Final = 1.0
#: Bytes; a larger file of this name is none that MLflow wrote.
_MLMODEL_BYTES: Final = 16 * 1024 * 1024
_PARENT: Final = "mlflow.parentRunId"


class RemoteIds:
    """Knows or finds out MLflow's ids for one outbox; used by several threads.

    Args:
        source: where the runs come from.
        sink: the tracking store.
        ledger: where ids are recorded.
        precedence: what waits for what.

    Attributes:
        copies: replaces what MLflow gave at another place; None where everything goes where it was logged for.
    """

    def __init__(self, source: Source, sink: Sink, ledger: Ledger, precedence: Precedence) -> None:
        self._source = source
        self._sink = sink
        self._ledger = ledger
        self._precedence = precedence
        self.copies = copies.Copies(source) if copies.copying(source) else None
        #: Runs were sent once more, so that an id which MLflow gave may have become another one, also of what was filed
        #: since and is not among the copies.
        self._moved = bool(ledger.meta(MOVED))
        self._origins = Origins(source, ledger)
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._since: dict[str, float] = {}

    def rewritten(self, text: str, *, of: str, but: str = "") -> str:
        """Return text with every provisional id in it, and every one of what is copied, replaced by MLflow's.

        Args:
            text: whatever may hold ids.
            of: the run that it was logged to.
            but: an id that is left as it is.

        Raises:
            Waits: one of them is not known yet.
            SinkError: MLflow had to be asked and could not be.
            LedgerUnavailable: the ledger could not be read.
        """
        pattern = copies.PATTERN if self._moved else provisional.PATTERN
        if self.copies is not None:
            pattern = copies.PATTERN
            text = copies.TRACES.sub(lambda found: self._location("experiment", self.experiment(found[1], of)), text)
            text = copies.HOME.sub(self._home, text)
        if provisional.ARTIFACT_SCHEME in text:
            text = provisional.URI_PATTERN.sub(
                lambda found: self._location(found[1], self._resolved_owner(found[1], found[2], of)), text
            )
        return pattern.sub(lambda found: found.group() if found.group() == but else self.resolved(found.group()), text)

    def tag(self, key: str, value: str, *, of: str) -> str:
        """Return the value of a tag, rewritten; that of a parent also where it is a tracker's id of a run here.

        Args:
            key: the tag.
            value: as logged.
            of: the run that it was logged to.

        Raises:
            Waits: a run in it is not known yet.
            SinkError: MLflow had to be asked and could not be.
            LedgerUnavailable: the ledger could not be read.
        """
        names_a_run = key == _PARENT and is_run_id(value) and not provisional.is_provisional(value) and value != of
        remote = self._parent(value) if names_a_run and self.copies is None else ""
        return remote or self.rewritten(value, of=of)

    def _parent(self, local: str) -> str:
        """Return MLflow's id of a run of this outbox; "" when it is none, or has none to wait for."""
        record = self._ledger.record(local)
        if record is not None and record.remote_id:
            return record.remote_id
        _, header = RunReader(*self._source.everywhere(local)).started() if self._has(local) else (None, None)
        if header is None:
            return ""
        if local in self._source.run_ids():
            if record is not None and record.cursors and record.state != "parked":
                return ""  # nothing of it could be read that would have made it a run
            raise Waits(local, local)
        experiment = self._sink.find_experiment(header.experiment)  # it was delivered, and the ledger lost
        found = self._sink.find_runs(experiment, local) if experiment is not None else []
        if found:
            return found[0]
        if stopwatch.seconds() - self._since.setdefault(local, stopwatch.seconds()) > _PATIENCE:
            return ""
        raise Waits(local, local if self._source.lacks(local) else "")

    def _has(self, run_id: str) -> bool:
        return any(folder.is_dir() for folder in self._source.everywhere(run_id))

    def _location(self, kind: str, remote: str) -> str:
        return self._sink.artifact_location(kind, remote).rstrip("/")

    def _resolved_owner(self, kind: str, local: str, of: str) -> str:
        return self.experiment(local, of) if kind == "experiment" else self.resolved(local)

    def _home(self, found: re.Match[str]) -> str:
        remote = self.resolved(found[1])
        if remote == found[1]:
            return found.group()
        return self._location("model" if remote.startswith("m-") else "run", remote)

    def experiment(self, given: str, of: str) -> str:
        """Return what the id of an experiment, as a run knows it, has become.

        Args:
            given: the id.
            of: the run.

        Raises:
            Waits: its creation has not been delivered yet.
            SinkError: it had to be made and could not be, or nothing says what it is called.
            LedgerUnavailable: the ledger could not be read.
        """
        if self.copies is None or provisional.is_provisional(given):
            return self.resolved(given)
        name = self._source.experiment(self.copies.experiment(given, of))
        if not name:
            msg = f"nothing says what the experiment {given} is called; replay it into one of your choice: --experiment"
            raise SinkError(msg, kind="answer", status=HTTPStatus.NOT_FOUND, code="RESOURCE_DOES_NOT_EXIST")
        held = self._known.get(f"experiment {name}")
        if held is None:
            held = self._known[f"experiment {name}"] = self._sink.experiment_id(name)
        return held

    def resolved(self, local: str) -> str:
        """Return what an id has become; one that is MLflow's own and not copied, or nobody's, is returned as it is.

        Raises:
            Waits: its creation has not been delivered yet.
            SinkError: an experiment had to be made and could not be.
            LedgerUnavailable: the ledger could not be read.
        """
        if not provisional.is_provisional(local) and (self.copies is None or not self.copies.has(local)):
            return (self._looked_up(local) if self._moved else "") or local
        remote = self._known.get(local) or self._looked_up(local)
        if remote:
            self._known[local] = remote
            self._since.pop(local, None)
            return remote
        if self._is_refused(local):
            return local
        waited = stopwatch.seconds() - self._since.setdefault(local, stopwatch.seconds())
        home = provisional.room_of(local) if local.isdigit() else local
        if local.startswith("m-") and waited > _SEARCH:
            home = self._origins.of(local)
        explained = bool(home) and any(folder.is_dir() for folder in self._source.folders(home))
        patience = 2 * _SEARCH if self._source.lacks(home or local) else _PATIENCE
        if waited > patience and not explained:
            return local
        raise Waits(local, home if explained else "")

    def check_model(self, model_id: str) -> None:
        """Refuse what is to be done to a model that MLflow has refused to make.

        Args:
            model_id: as in the journals.

        Raises:
            SinkError: it has.
            LedgerUnavailable: the ledger could not be read.
        """
        if self._is_refused(model_id) and not self._looked_up(model_id):
            msg = f"MLflow has refused to make the model {model_id}, see the dead letter about that"
            raise SinkError(msg, kind="answer", status=HTTPStatus.BAD_REQUEST, code="INVALID_PARAMETER_VALUE")

    def give_up(self, model_id: str) -> None:
        """Have nobody wait for a model that is not there after its creation, which could not be read then.

        Args:
            model_id: as in the journals.

        Raises:
            LedgerUnavailable: the ledger could not be used.
        """
        if not self._looked_up(model_id):
            self._ledger.set_meta(f"{REFUSED}/{model_id}", b"yes")

    def _is_refused(self, local: str) -> bool:
        may_be = local.startswith("m-") and (provisional.is_provisional(local) or self.copies is not None)
        return may_be and bool(self._ledger.meta(f"{REFUSED}/{local}"))

    def _looked_up(self, local: str) -> str:
        if local.isdigit():
            return self._experiment(local)
        if local.startswith("m-"):
            return (self._ledger.meta(f"model/{local}") or b"").decode()
        record = self._ledger.record(local)
        return record.remote_id if record is not None else ""

    def _experiment(self, local: str) -> str:
        """Return MLflow's id of an experiment, which is created as its room says when there is none.

        Raises:
            Waits: another one has its name until it is renamed.
        """
        with self._lock:
            held = self._ledger.meta(f"experiment/{local}")
            if held:
                return held.decode()
            room = provisional.room_of(local)
            for folder in self._source.everywhere(room):
                request = RunReader(folder).first(Request)
                if request is None or request.operation != "create_experiment":
                    continue
                wanted = arguments_of(request.arguments)
                for earlier in wanted.get("after") or ():  # it had the name before, and was renamed
                    self.await_rename(earlier, request.time_ms)
                name = self._source.experiment(wanted["name"])
                location, tags = wanted.get("artifact_location"), wanted.get("tags") or {}
                remote = self._sink.create_experiment(name, location, tags)
                self._ledger.set_meta(f"experiment/{local}", remote.encode())
                return remote
        return ""

    def await_rename(self, earlier: str, time_ms: int) -> None:
        """Let an experiment be renamed that has a name which another one gets.

        Args:
            earlier: its id here.
            time_ms: when the other one got it, in wall-clock milliseconds since the epoch.

        Raises:
            Waits: it was not yet.
        """
        if self._precedence.is_pending(provisional.room_of(earlier), time_ms):
            what = f"the rename of the experiment {earlier}"
            raise Waits(what, provisional.room_of(earlier))

    @contextlib.contextmanager
    def content(self, file: Path, path: str, *, of: str) -> Iterator[Path]:
        """Yield a file with MLflow's ids in it: an ``MLmodel`` names its run, its model and where it lies.

        Args:
            file: the outbox's copy.
            path: what it is called in MLflow.
            of: the run that it was logged to.

        Raises:
            Waits: one of the ids is not known yet.
            SinkError: MLflow had to be asked and could not be.
        """
        if posixpath.basename(path) != "MLmodel" or file.stat().st_size > _MLMODEL_BYTES:
            yield file
            return
        text = file.read_bytes().decode("utf-8", "surrogateescape")
        rewritten = self.rewritten(text, of=of)
        if rewritten == text:
            yield file
            return
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            changed = Path(private, "MLmodel")
            changed.write_bytes(rewritten.encode("utf-8", "surrogateescape"))
            yield changed
