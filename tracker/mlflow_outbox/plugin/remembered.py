"""Journals that were read lately: of each only what is new is read next time, and nothing of one that has not grown.

While the server is away the journals are all that answers, and MLflow asks much: for each file of a model, and whenever
it lists a folder of a run. A hundred thousand points in front of what is wanted would be read each time.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from mlflow_outbox import delivery
from mlflow_outbox.plugin import reads
from mlflow_outbox.spool.events import Artifact, FileFor, Request, RunStarted

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.views import File, Kept
    from mlflow_outbox_worker.ondisk import LocalRun

#: What changes anything of a ``Journal``, where files are wanted and where requests are; points do not.
_FILES: Final = (Artifact, FileFor)
_CALLS: Final = (Request, RunStarted)
#: Requests for which a journal takes the room of one: where a model is active each point is one, a kilobyte of memory.
_LIGHT: Final = 20


class Journal:
    """A run or room as its journal has it; what is in here does not change any more.

    Attributes:
        home: its id.
        began: it has the beginning of a run.
        requests: as in ``RunView``.
        files: by owner ("" is the run itself) and path.
        waiting: those of them that MLflow does not have yet.
        unsent: those requests about models that it does not have yet.
    """

    def __init__(
        self,
        local: LocalRun,
        files: Mapping[str, Mapping[str, File]],
        waiting: Iterable[tuple[str, str]],
        unsent: list[Request],
    ) -> None:
        self.home = local.run_id
        self.began = bool(local.view.start_time_ms)  # a resumption leaves that open
        self.requests: list[Kept] = list(local.view.requests)
        self.files = {owner: dict(held) for owner, held in files.items()}
        self.unsent = unsent
        self.waiting: dict[str, dict[str, File]] = {}
        for owner, path in waiting:
            if path in self.files.get(owner, ()):
                self.waiting.setdefault(owner, {})[path] = self.files[owner][path]
        self._models: list[LoggedModel] | None = None

    def models(self) -> list[LoggedModel]:
        """Return the models that were made and not deleted, which nobody may change; no place is said for files."""
        if self._models is None:
            self._models = reads.models_of(self.requests)
        return self._models


class _Held:
    """What is remembered of one journal.

    Attributes:
        filed: of one that is filed as delivered, when something was filed last, in ns; else None.
        weight: how many journals' room it takes.
    """

    def __init__(self, local: LocalRun, journal: Journal, filed: int | None) -> None:
        self.local = local
        self.journal = journal
        self.filed = filed
        self.weight = 1 + len(journal.requests) // _LIGHT


class Remembered:
    """The journals of one outbox.

    Args:
        outbox: the outbox.
        most: journals that are remembered, fewer of those with many requests; all of any further ones is read each
            time.
        files: what is wanted of them is files, else requests.
    """

    def __init__(self, outbox: Outbox, most: int, *, files: bool) -> None:
        self._outbox = outbox
        self._most = most
        self._files = files
        self._held: dict[str, _Held] = {}
        self._lock = threading.RLock()  # a signal handler may ask while its thread is in here

    def forked(self) -> None:
        """Renew the lock in a forked child."""
        self._lock = threading.RLock()

    def journal(self, home: str) -> Journal | None:
        """Return one journal, or None."""
        return next(iter(self.journals([home])), None)

    def journals(self, homes: Iterable[str]) -> list[Journal]:
        """Return those of some journals that there are, in this order."""
        with self._lock:
            filed = {home: self._filed(home) for home in homes}
            # Out of the way: who is interrupted here, or interrupts, begins anew.
            held = {home: one for home in filed if (one := self._held.pop(home, None)) is not None}
            same = {home for home, one in held.items() if one.filed is not None and one.filed == filed[home]}
            before = {home: held[home].local if home in held else None for home in filed if home not in same}
            read = {home: held[home] for home in same}

            def told(local: LocalRun) -> None:
                home = local.run_id
                # If all of it seems to wait, the ledger may be locked or lost, and say another thing the next time. On
                # a network file system it may be another machine's that knows, and reading takes long.
                is_sure = bool(local.base) or self._outbox.directory.network
                read[home] = _Held(local, self._told(local, held.get(home)), filed[home] if is_sure else None)

            if before:
                delivery.reading(self._outbox).read_on(before, told)
            now = {home: read[home] for home in filed if home in read}
            self._keep(now)
            return [one.journal for one in now.values()]

    def _filed(self, home: str) -> int | None:
        directory = self._outbox.directory
        if os.path.isdir(directory.runs / home):
            return None
        try:
            return os.stat(directory.delivered / home).st_mtime_ns
        except OSError:
            return None

    def _told(self, local: LocalRun, held: _Held | None) -> Journal:
        """Return what was read, and let go of what nobody asks for."""
        new: list[Any] = [event for _, event in local.pending if isinstance(event, _FILES if self._files else _CALLS)]
        local.pending = []
        view, is_same = local.view, held is not None and local is held.local
        unneeded: tuple[dict[str, Any], ...] = (view.metrics, view.params, view.tags, view.linked)
        for part in unneeded:
            part.clear()
        if self._files:
            view.requests.clear()
        else:
            view.artifacts.clear()
            view.files.clear()
        if held is not None and is_same and not new:
            return held.journal
        waiting = [(getattr(event, "owner", ""), event.path) for event in new if self._files]
        unsent = [event for event in new if isinstance(event, Request) and "logged_model" in event.operation]
        if held is not None and is_same:
            before = held.journal
            waiting = [*((owner, path) for owner, paths in before.waiting.items() for path in paths), *waiting]
            unsent = [*before.unsent, *unsent]
        return Journal(local, {"": view.artifacts, **view.files}, waiting, unsent)

    def _keep(self, now: Mapping[str, _Held]) -> None:
        """Remember journals. Of more than there is room for the first stay, since they are asked for in one order."""
        others = collections.deque(self._held.items())
        room = self._most - sum(one.weight for _, one in others)
        for home, one in now.items():
            while room < one.weight and others:
                other, gone = others.popleft()
                self._held.pop(other, None)
                room += gone.weight
            if room < one.weight and self._held:
                continue  # a lighter one may find room; alone any does
            self._held[home] = one
            room -= one.weight
