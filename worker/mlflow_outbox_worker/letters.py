"""Sending a dead letter again: the one thing that puts an event back into a journal.

The event is written to a new segment by a writer of its own, and is on disk to stay before the letter leaves the
queue; of many letters those of one run share a writer, for each writer is one more that all later ones look at. A kill
in between leaves both: the event arrives and the letter is still there, to be sent again or dropped, which changes
nothing in MLflow. So a letter can come twice, and is never lost. Programs that log and the worker that delivers may be
at work meanwhile: each writes its own files, and the ledger's database takes one transaction after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import ArtifactRefused, OutboxError
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox.spool.directory import OutboxDirectory, is_run_id
from mlflow_outbox.spool.disk import SystemDisk
from mlflow_outbox.spool.events import (
    Artifact,
    Event,
    FileFor,
    Metric,
    Params,
    Request,
    RunEnded,
    Tags,
    decode,
)
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import SnapshotStore, is_digest
from mlflow_outbox.validation import (
    checked_key,
    checked_status,
    checked_step,
    checked_text,
    checked_time_ms,
    checked_value,
)
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter

#: Letters that are written at once: a kill meanwhile sends so many twice.
_AT_ONCE: Final = 1000


class LetterRefused(OutboxError):
    """Raised when a dead letter cannot be sent again or changed; it stays, and the message says what to do."""


def event_of(letter: DeadLetter) -> Event:
    """Return the event of a dead letter.

    Raises:
        LetterRefused: this version does not know its kind.
    """
    try:
        return decode(letter.payload)
    except msgspec.DecodeError as error:
        msg = f"the dead letter {letter.number} holds an event that only a newer mlflow-outbox knows ({error}); upgrade"
        raise LetterRefused(msg) from None


def send_again(
    directory: OutboxDirectory,
    ledger: Ledger,
    settings: Settings,
    letter: DeadLetter,
    replacement: Event | None = None,
    *,
    disk: SystemDisk | None = None,
) -> None:
    """Write a dead letter's event to its run's journal again, then take the letter out of the queue.

    Args:
        directory: the outbox.
        ledger: its ledger, open for writing.
        settings: limits.
        letter: the letter.
        replacement: what to send in its place; None is the event itself.
        disk: the system calls that write the journal.

    Raises:
        LetterRefused: the event could not be put on disk; the letter stays.
        LedgerUnavailable: the ledger cannot be used now; the letter stays.
    """
    event = event_of(letter) if replacement is None else replacement
    identity = _identity(directory, ledger, letter)
    _bring_files(directory, settings, letter, event)
    if not _is_written(directory, identity, settings, [event], disk):
        msg = f"the disk does not take the event of the dead letter {letter.number}, which stays; free space and repeat"
        raise LetterRefused(msg)
    if replacement is None:
        ledger.drop_dead_letter(letter.id)
    else:
        ledger.settle_dead_letter(letter)  # MLflow will hold the replacement, not what was logged


def send_all_again(
    directory: OutboxDirectory,
    ledger: Ledger,
    settings: Settings,
    letters: Sequence[DeadLetter],
    stays: Callable[[Exception], object],
) -> int:
    """Send dead letters again, those of a run together; return how many were.

    Args:
        directory: the outbox.
        ledger: its ledger, open for writing.
        settings: limits.
        letters: which.
        stays: told of each that stays why it cannot be sent; the others are all the same.

    Raises:
        LedgerUnavailable: the ledger cannot be used now; the letters that were not sent stay.
    """
    sent = 0
    for some in _together(letters):
        identity: RunIdentity | None = None
        ready: list[tuple[DeadLetter, Event]] = []
        for letter in some:
            try:
                event = event_of(letter)
                identity = identity or _identity(directory, ledger, letter)
                _bring_files(directory, settings, letter, event)
            except (LetterRefused, OSError) as error:
                stays(error)
            else:
                ready.append((letter, event))
        if identity is not None and _is_written(directory, identity, settings, [event for _, event in ready], None):
            for letter, _ in ready:
                ledger.drop_dead_letter(letter.id)
            sent += len(ready)
            continue
        for letter, _ in ready:  # the disk has not taken all of them: each says whether it is one that it takes
            try:
                send_again(directory, ledger, settings, letter)
            except (LetterRefused, OSError) as error:
                stays(error)
            else:
                sent += 1
    return sent


def _together(letters: Sequence[DeadLetter]) -> Iterator[list[DeadLetter]]:
    """Yield letters by their runs, in their order, as many as are written at once."""
    by_run: dict[str, list[DeadLetter]] = {}
    for letter in letters:
        by_run.setdefault(letter.run_id, []).append(letter)
    for held in by_run.values():
        for begin in range(0, len(held), _AT_ONCE):
            yield held[begin : begin + _AT_ONCE]


def _is_written(
    directory: OutboxDirectory,
    identity: RunIdentity,
    settings: Settings,
    events: Sequence[Event],
    disk: SystemDisk | None,
) -> bool:
    """Write events to a new segment of their run; return whether all of them are on disk to stay."""
    counters = Counters()
    journal = Journal(directory, identity, dataclasses.replace(settings, sync="always"), counters, disk=disk)
    kept = all(map(journal.append, events))
    journal.close()
    if kept and not journal.in_memory and not counters["unsynced_not_rewritten"]:
        return True
    journal.release()
    return False


def changed(event: Event, fields: dict[str, str]) -> Event:
    """Return an event with some of its fields changed, checked as a logging call would check them.

    Args:
        event: of a dead letter, so with one key at most.
        fields: new values by name; ``fields_of`` says which names there are.

    Raises:
        LetterRefused: the event has no such field.
        InvalidEvent: a value is not one that MLflow can hold.
    """
    unknown = sorted(fields.keys() - set(fields_of(event)))
    if unknown:
        possible = ", ".join(fields_of(event))
        msg = f"{printable(', '.join(unknown))} cannot be changed in this event; " + (
            f"it has {possible}" if possible else "nothing can: send it again or drop it"
        )
        raise LetterRefused(msg)
    if isinstance(event, Metric):
        key = checked_key(fields.get("key", event.key), "metric")
        return Metric(
            key,
            checked_value(key, _number(fields["value"])) if "value" in fields else event.value,
            checked_time_ms(key, _number(fields["time_ms"])) if "time_ms" in fields else event.time_ms,
            checked_step(key, _number(fields["step"])) if "step" in fields else event.step,
        )
    if isinstance(event, (Params, Tags)):
        what = "param" if isinstance(event, Params) else "tag"
        ((key, value),) = event.values.items()
        key = checked_key(fields.get("key", key), what)
        return type(event)({key: checked_text(key, fields.get("value", value), what)}, event.time_ms)
    if isinstance(event, (Artifact, FileFor)):
        return msgspec.structs.replace(event, path=checked_artifact_path(fields["path"], served=False))
    if isinstance(event, RunEnded):
        return msgspec.structs.replace(event, status=checked_status(fields["status"]))
    raise AssertionError(event)  # fields_of names fields for the kinds above only


def fields_of(event: Event) -> tuple[str, ...]:
    """Return the names of the fields of an event that ``changed`` can change."""
    if isinstance(event, (Params, Tags)) and len(event.values) != 1:
        return ()
    return next((names for kinds, names in _FIELDS if isinstance(event, kinds)), ())


_FIELDS: Final[tuple[tuple[tuple[type, ...], tuple[str, ...]], ...]] = (
    ((Metric,), ("key", "value", "step", "time_ms")),
    ((Params, Tags), ("key", "value")),
    ((Artifact, FileFor), ("path",)),
    ((RunEnded,), ("status",)),
)


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # for the check to refuse, in its own words


def _identity(directory: OutboxDirectory, ledger: Ledger, letter: DeadLetter) -> RunIdentity:
    """Find out what a new segment of the letter's run must say of it."""
    run_id = letter.run_id
    if not is_run_id(run_id) or directory.run(run_id).is_symlink():  # of a ledger that somebody else has made
        msg = f"the dead letter {letter.number} is of {printable(run_id)!r}, which is no run of this outbox; drop it"
        raise LetterRefused(msg)
    for held in RunReader(directory.run(run_id), directory.delivered / run_id).segments().values():
        return RunIdentity(run_id, held[0].header.experiment, held[0].header.remote)
    record = ledger.record(run_id)
    if record is not None and record.remote_id:
        return RunIdentity(run_id, record.experiment, remote=record.remote_id == run_id)
    msg = f"the dead letter {letter.number} is of the run {run_id}, of which nothing else is known any more; drop it"
    raise LetterRefused(msg)


def _bring_files(directory: OutboxDirectory, settings: Settings, letter: DeadLetter, event: Event) -> None:
    """See that what an event names lies where delivery looks for it."""
    if isinstance(event, (Artifact, FileFor)):
        _bring_file(directory, settings, letter, event.sha256)
    elif isinstance(event, Request) and event.kept:
        _bring_file(directory, settings, letter, event.kept)


def _bring_file(directory: OutboxDirectory, settings: Settings, letter: DeadLetter, sha256: str) -> None:
    """See that the copy of an artifact lies where delivery looks for it; it may have been filed with its run."""
    here, filed = directory.run(letter.run_id), directory.delivered / letter.run_id
    if is_digest(sha256) and (here / "files" / sha256).is_file():
        return
    try:
        source = filed / "files" / sha256
        if not is_digest(sha256) or source.is_symlink() or not source.is_file():
            msg = f"the file of the dead letter {letter.number} is not in the outbox any more; drop the letter"
            raise LetterRefused(msg)
        directory.make_run(letter.run_id)
        kept = SnapshotStore(here, durable=True).add_file(
            source, limit=max(settings.artifact_bytes, source.stat().st_size)
        )
    except ArtifactRefused as error:
        msg = f"the file of the dead letter {letter.number} cannot be copied: {error}; the letter stays"
        raise LetterRefused(msg) from None
    except OSError as error:
        msg = (
            f"the file of the dead letter {letter.number} cannot be copied: {error.strerror or error}; the letter stays"
        )
        raise LetterRefused(msg) from None
    if kept.sha256 != sha256:
        msg = f"the file of the dead letter {letter.number} was changed since it was logged; log it anew and drop this"
        raise LetterRefused(msg)
