"""Takes out of requests what the store has already, where an earlier attempt may have been carried out.

A worker can die between an answer and its record, a ledger can be lost, a copy of the outbox can have been delivered by
another machine: then events are sent that are there. What is compared with the run's history in MLflow, and until when:

* A store that does **not deduplicate** points (``file:``) would hold them twice. The window in doubt is compared; of a
  run that was found and not made here, every window, for its parts may have come in another order; of any other run,
  windows until one is new: SQLite can lose the end of the ledger's log without a word (``ledger``), or another machine
  has delivered since, but of a writer the store has not seen anything later than what it has not seen. Of another
  writer it may have: how their events lay side by side when they were delivered nobody knows any more.
* A store that does deduplicate need not be asked, but a batch that it has costs MLflow's server three to eight times
  what a first one costs: it looks for each of the points. So windows of a run that was found by its tag, as after a
  lost ledger, are compared until one is new. The single window that a killed worker may have sent is not: reading a
  long history would cost more. But an older server (3.9) takes NaN that it has for something new, and refuses the batch
  for a row that is there: one that was refused so is compared. Nor is anything compared of a database that leaves
  out what it has (``point_rows``).

Of a window some requests may have been answered when one failed (``volley``). They are left out of what is sent again
by the same process, however often that fails, which costs nothing and is asked of nobody: a tracking server whose own
store is one of files would have their points twice, and does not say what its store is.

History is read once for each key of a run, and held exactly, in 24 bytes for each point, up to ``MOST`` points a key;
up to ``FEW`` as a set, which takes five times as much and is asked in a tenth of the time.
A longer one is read anew for each window by a store that would have points twice; others are left to deduplicate. What
was held is forgotten when a window is not delivered to its end: the store may have more by then.

A run of ``outbox+file:`` is made by the program, and so found: all that it ever logs is compared. What the store had
of it at first is kept for that, up to ``KEPT`` points of all such runs: to read it anew for each window would take
longer with each. What came since was sent from here, and is behind the cursors. Once everything was sent it is read
anew for another writer, whose events may have been sent from elsewhere and then brought here.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import struct
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.planner import Batch, Step
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requests import ask
from mlflow_outbox_worker.sink import MetricPoint, Sink

#: Points of one key that are held: 48 MB.
MOST: Final = 2_000_000
#: Points of one key that are held as a set: 12 MB.
FEW: Final = 100_000
#: Points and runs that are held of those that were found and go on: 48 MB while they rest.
KEPT: Final = 2_000_000
_RUNS: Final = 100

_PACKED: Final = struct.Struct(">dqq")
_NAN: Final = _PACKED.pack(math.nan, 0, 0)[:8]


class Packed(Sequence[bytes]):
    """Points as sorted records of 24 bytes: value, time in ms, step. Others, of more than 64 bits, are left out.

    Args:
        records: from ``packed``, in any order.
    """

    def __init__(self, records: Iterable[bytes]) -> None:
        self._data = b"".join(sorted(record for record in records if len(record) == _PACKED.size))

    def __len__(self) -> int:
        return len(self._data) // _PACKED.size

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # only bisect asks, and for one at a time
        return self._data[index * _PACKED.size : (index + 1) * _PACKED.size]

    def __contains__(self, record: object) -> bool:
        if not isinstance(record, bytes):
            return False
        at = bisect.bisect_left(self, record)
        return at < len(self) and self[at] == record


def packed(point: MetricPoint) -> bytes:
    """Return what tells a point from the others of its key; two of one record are the same point."""
    try:
        record = _PACKED.pack(point.value, point.time_ms, point.step)
    except struct.error:  # more than 64 bits, which a file store keeps, and an earlier version's journal can hold
        return repr(point).encode()
    return record if not math.isnan(point.value) else _NAN + record[8:]


#: Writers of nothing, and the one where nobody tells whose points they are.
_NO_WRITERS: Final[AbstractSet[str]] = frozenset()
_ONE: Final = frozenset({""})
#: What a store has of a run, by key; None for more than are held.
_History = dict[str, Collection[bytes] | None]


class _Kept:
    """What a store had of a run when it was asked.

    Args:
        record: of the run.
        writers: whose windows were compared with it.
        history: what it had.
        rested: everything was sent once since then.
    """

    def __init__(
        self, record: RunRecord, writers: AbstractSet[str], history: _History, *, rested: bool = False
    ) -> None:
        self._of = record.remote_id, record.settled
        self.is_adopted = record.adopted
        self.writers = writers
        self.history = history
        self.rested = rested

    def is_of(self, record: RunRecord) -> bool:
        """Return whether it is of the same run in MLflow, and that was not sent once more since, for what it lacked."""
        return self._of == (record.remote_id, record.settled)

    def points(self) -> int:
        """Return how many points it holds."""
        return sum(len(some) for some in self.history.values() if some is not None)

    def rest(self) -> None:
        """Take as little memory as possible from now on."""
        self.rested = True
        for key, some in self.history.items():
            if isinstance(some, frozenset) and some:
                self.history[key] = Packed(some)


class Reconciliation:
    """Compares windows with what the store has.

    Args:
        sink: the store.
        ledger: where it is noted that a window's requests may have been carried out in part.
        most: points of one key that are held.
    """

    def __init__(self, sink: Sink, ledger: Ledger, *, most: int = MOST) -> None:
        self._sink = sink
        self._ledger = ledger
        self._most = most
        #: Of a store that does not deduplicate: by run the writers of which it has no event that is still to come, None
        #: for all.
        self._certain: dict[str, set[str] | None] = {}
        #: Of such a store too, which one thread uses: what it had of runs, that of the last window behind the others.
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        #: Of one that does: runs that were found by their tag, of which it may have any.
        self._found: set[str] = set()
        self._histories: dict[str, _History] = {}
        #: Of windows that were not recorded: the points that were answered for, by key.
        self._answered: dict[str, dict[str, set[bytes]]] = {}
        #: MLflow's ids of the runs that have them.
        self._answered_by: dict[str, str] = {}
        #: What of them was left out of the window that is being sent.
        self._left_out: dict[str, set[tuple[str, bytes]]] = {}

    def answered(self, record: RunRecord, batches: Sequence[Batch]) -> None:
        """Note the batches of a window that were answered for, though others of it failed.

        Args:
            record: of the run.
            batches: of points, or of none.
        """
        if not self._sink.deduplicates_metrics or self._sink.takes_repeats or not any(one.points for one in batches):
            return
        if self._answered_by.get(record.run_id) != record.remote_id:
            self._forget(record.run_id)
        self._answered_by[record.run_id] = record.remote_id
        known = self._answered.setdefault(record.run_id, {})
        for batch in batches:
            for point in batch.points:
                known.setdefault(point.key, set()).add(packed(point))

    def recorded(self, run_id: str) -> None:
        """Note that a window was recorded: what was left out of it is behind."""
        known = self._answered.get(run_id)
        if known is None:
            return
        for key, point in self._left_out.pop(run_id, ()):
            known[key].discard(point)
        if not any(known.values()):
            self._forget(run_id)

    def found(self, run_id: str) -> None:
        """Note that a run was there already, or that something of its window was."""
        if self._sink.deduplicates_metrics and not self._sink.takes_repeats:
            self._found.add(run_id)

    def caught_up(self, run_id: str) -> None:
        """Note that everything was delivered that waited of a run: what comes now is new."""
        self._histories.pop(run_id, None)
        self._found.discard(run_id)
        self._forget(run_id)
        if run_id in self._certain:
            self._certain[run_id] = None
        kept = self._kept.pop(run_id, None)
        if kept is not None and kept.is_adopted and kept.points() <= KEPT:
            kept.rest()
            self._keep(run_id, kept)

    def unsent(self, record: RunRecord, steps: list[Step], writers: AbstractSet[str] = _ONE) -> list[Step]:
        """Return the steps without the points that the store has; called once for each attempt at a window.

        Args:
            record: of the run.
            steps: of the window.
            writers: whose points are in it.

        Raises:
            Later: the store could not be asked; try again after a pause.
            Parked: a person is needed.
            LedgerUnavailable: the ledger could not be written.
        """
        run_id = record.run_id
        if self._sink.deduplicates_metrics:
            if run_id in self._answered:
                steps = self._unanswered(record, steps)
            return self._fresh(record, steps) if run_id in self._found else steps
        in_doubt = record.uncertain == record.cursors
        if in_doubt:
            self._kept.pop(run_id, None)
        else:
            record.uncertain = dict(record.cursors)
            self._ledger.commit(record)
        if in_doubt or record.adopted or not self._is_certain(run_id, writers):
            return self._compared(record, steps, writers)
        return list(_without(steps, {}))

    def _is_certain(self, run_id: str, writers: AbstractSet[str]) -> bool:
        known = self._certain.get(run_id, _NO_WRITERS)
        return known is None or writers <= known

    def _unanswered(self, record: RunRecord, steps: list[Step]) -> list[Step]:
        """Return steps without the points that were answered for, which none was if the run is another one by now."""
        run_id = record.run_id
        if self._answered_by[run_id] != record.remote_id:
            self._forget(run_id)
            return steps
        known = self._answered[run_id]
        self._left_out[run_id] = {one for one in _points(steps) if one[1] in known.get(one[0], ())}
        return list(_without(steps, known))

    def _forget(self, run_id: str) -> None:
        for noted in (self._answered, self._answered_by, self._left_out):
            noted.pop(run_id, None)

    def _fresh(self, record: RunRecord, steps: list[Step]) -> list[Step]:
        """Return steps without the points that a store has which would deduplicate them."""
        points = _points(steps)
        history = self._read(record, points, self._histories.pop(record.run_id, {}))
        held = {key: some for key, some in history.items() if some is not None}
        if not points or _any_of(points, held):
            self._histories[record.run_id] = history
        else:
            self._found.discard(record.run_id)
        return list(_without(steps, held))

    def _compared(self, record: RunRecord, steps: list[Step], writers: AbstractSet[str]) -> list[Step]:
        """Return steps without the points that a store has which would have them twice."""
        run_id, points = record.run_id, _points(steps)
        kept = self._kept.pop(run_id, None) or _Kept(record, _NO_WRITERS, {})
        is_good = kept.is_of(record) and (not kept.rested or writers <= kept.writers)
        history = self._read(record, points, kept.history if is_good else {})
        held = {key: some for key, some in history.items() if some is not None}
        held |= {
            key: whole
            for key in {key for key, _ in points} - held.keys()
            if (whole := self._history(record, key, None)) is not None
        }
        is_new = bool(points) and not _any_of(points, held)
        if is_new and (known := self._certain.setdefault(run_id, set())) is not None:
            known.update(writers)
        if record.adopted or not is_new:
            self._keep(run_id, _Kept(record, kept.writers | writers, history, rested=kept.rested and is_good))
        return list(_without(steps, held))

    def _keep(self, run_id: str, kept: _Kept) -> None:
        """Keep what a store had of a run, in the place of what it had of others if need be."""
        self._kept[run_id] = kept
        self._kept.move_to_end(run_id)
        while len(self._kept) > 1 and (len(self._kept) > _RUNS or sum(map(_Kept.points, self._kept.values())) > KEPT):
            self._kept.popitem(last=False)

    def _read(self, record: RunRecord, points: Iterable[tuple[str, bytes]], history: _History) -> _History:
        """Return what the store has of a run, with that of the metrics of some points beside what was read before."""
        lacking = {key for key, _ in points} - history.keys()
        return history | {key: self._history(record, key, self._most) for key in lacking}

    def _history(self, record: RunRecord, key: str, most: int | None) -> Collection[bytes] | None:
        """Return the points of one key that the store has; None when there are more than so many."""
        records: list[bytes] = []
        token: str | None = None
        while True:
            some, token = ask("metric_history", lambda: self._sink.metric_page(record.remote_id, key, token))  # noqa: B023 - called before the next turn
            records += map(packed, some)
            if most is not None and len(records) > most:
                return None
            if not token:
                records = [record for record in records if len(record) == _PACKED.size]  # as ``Packed`` does
                return frozenset(records) if len(records) <= FEW else Packed(records)


def _points(steps: Iterable[Step]) -> set[tuple[str, bytes]]:
    return {(point.key, packed(point)) for step in steps if isinstance(step, Batch) for point in step.points}


def _any_of(points: Iterable[tuple[str, bytes]], held: Mapping[str, Container[bytes]]) -> bool:
    return any(one in held.get(key, ()) for key, one in points)


def _without(steps: list[Step], held: Mapping[str, Container[bytes]]) -> Iterator[Step]:
    """Yield steps without points that are held, or come a second time; leave out batches of which nothing is left."""
    seen: set[tuple[str, bytes]] = set()
    for step in steps:
        if isinstance(step, Batch) and step.points:
            fresh = []
            for point in step.points:
                identity = point.key, packed(point)
                if identity not in seen and identity[1] not in held.get(point.key, ()):
                    seen.add(identity)
                    fresh.append(point)
            step = dataclasses.replace(step, points=fresh)  # noqa: PLW2901 - the same step, with less in it
        if not isinstance(step, Batch) or len(step):
            yield step
