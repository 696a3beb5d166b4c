"""``mlflow-outbox verify``: read back from MLflow what the outbox has, and compare."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination, named_for, resolve, with_credentials
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.settings import tracking_uri_from_environment, workspace_from_environment
from mlflow_outbox.spool import provisional
from mlflow_outbox_worker.cli import outboxes, terminal
from mlflow_outbox_worker.cli.declare import Argument, Option, command
from mlflow_outbox_worker.cli.exits import ExitCode, most_urgent
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.wording import count, quoted

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.comparison import Comparison
    from mlflow_outbox_worker.ledger import Ledger
    from mlflow_outbox_worker.records import DeadLetter, RunRecord
    from mlflow_outbox_worker.sink import Sink
    from mlflow_outbox_worker.sources import Found

#: Differences shown of one run.
_SHOWN = 20


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("verify", verify))


def verify(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="[RUN...]", about="Ids of runs; else all on disk.", words=outboxes.run_words, filled=True),
    ] = None,
    deep: Annotated[bool, Option("--deep", about="Every point, and the content of every artifact.")] = False,
    to: Annotated[
        str | None, Option("--to", metavar="URI", filled=True, about="A tracking URI that the runs were replayed to.")
    ] = None,
    experiment: Annotated[
        str | None,
        Option("--experiment", metavar="NAME", filled=True, about="The experiment that the runs were replayed into."),
    ] = None,
    as_json: AsJson = False,
    outbox_dir: OutboxDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Read runs back from MLflow and compare them with what is on disk: points, params, tags, artifacts.

    Changes nothing, here or there. Exit code 0 says that MLflow holds all of that, 1 that something differs, is absent
    or cannot be read on disk, 3 that some of it has not been sent yet or MLflow is away, 4 that it refuses to be asked.
    Logged models with their files, datasets and traces are not compared.

    \b
    Examples:
      mlflow-outbox verify                        # all that is still on disk
      mlflow-outbox verify --deep 3f9c            # to the last point and byte
      mlflow-outbox verify --to http://new:5000   # after a replay to there
      mlflow-outbox verify --experiment imported  # after a replay into it
    """
    terminal.behave(quiet=quiet or as_json, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    usable = outboxes.open_usable(settings)
    refused = usable.name_refused()
    chosen = [outboxes.find_run(usable.directories, settings, name) for name in runs or []]
    place = _Place(to, experiment or "")
    found: list[Comparison] = []
    codes = [refused] if not runs else []
    for directory in usable.directories:
        wanted = {run_id for where, run_id in chosen if where.path == directory.path} if runs else None
        if wanted is None or wanted:
            codes.append(_of_outbox(directory, settings, wanted, place, found, deep=deep))
    if as_json:
        terminal.raw(json.dumps([one._asdict() for one in found], indent=2))
    elif not found or any(one.state != "unknown" for one in found):
        _show(found, place.remedy(outboxes.root_of(settings)))
    if any(one.state in {"different", "absent"} or one.differences for one in found if not one.pending):
        codes.append(ExitCode.ERROR)
    if any(one.pending for one in found):
        codes.append(ExitCode.LEFT)
    return most_urgent(codes)


class _Place(NamedTuple):
    """Where the runs are looked for: at their destination or another one, in their own experiments ("") or in one."""

    to: str | None
    experiment: str

    def remedy(self, root: Path) -> str:
        """Return the command that sends what is not there."""
        if self.to is None and not self.experiment:
            return "flush"
        to = f" --to {quoted(resolve(self.to).uri)}" if self.to is not None else ""
        return f"replay {quoted(root)}{to}" + (f" --experiment {quoted(self.experiment)}" if self.experiment else "")

    def ledgers(self, own: Path, recorded: Destination, there: Destination) -> list[Path]:
        """Return the ledgers that may know of it: the outbox's own, and those of this machine's replays to there.

        Args:
            own: the outbox's.
            recorded: where the outbox delivers to.
            there: where the runs are looked for.
        """
        from mlflow_outbox_worker.sources import replay_directory

        if self.experiment:
            return [replay_directory(there, self.experiment) / "delivery"]
        replays = replay_directory(there)
        others = [replays, *sorted(replays.parent.glob(f"{replays.name}-*"))] if self.to is not None else []
        return [own] * (there.uri == recorded.uri) + [place / "delivery" for place in others]


def _of_outbox(
    directory: OutboxDirectory,
    settings: Settings,
    wanted: set[str] | None,
    place: _Place,
    found: list[Comparison],
    *,
    deep: bool,
) -> ExitCode:
    """Compare the runs of one outbox; those that could not be read, here or there, are "unknown": the code says so."""
    from mlflow_outbox_worker.comparison import Comparison, compare
    from mlflow_outbox_worker.ledger import Ledger
    from mlflow_outbox_worker.outcome import classify
    from mlflow_outbox_worker.presence import absent_store
    from mlflow_outbox_worker.sink import SinkError
    from mlflow_outbox_worker.sources import find_runs

    recorded = directory.destination
    fallback = tracking_uri_from_environment()
    if place.to is None:
        destination = with_credentials(recorded, fallback)
    else:
        destination = named_for(recorded, resolve(place.to, workspace=workspace_from_environment()))
    places = place.ledgers(outboxes.ledger_path(directory, settings), recorded, destination)
    on_disk = find_runs(directory.path)
    code = _not_compared(directory, on_disk, wanted, found)
    runs = {
        run_id: folders
        for run_id, folders in sorted(on_disk.runs.items())
        if not provisional.is_room(run_id) and (wanted is None or run_id in wanted)
    }
    absent = absent_store(destination)
    if absent is not None:
        terminal.error(f"{printable(absent, 300)} does not exist; nothing was compared")
        found += [Comparison(run_id, "unknown") for run_id in runs]
        return ExitCode.ERROR
    try:
        with (
            _opened(destination, settings) as sink,
            terminal.progress() as show,
            contextlib.ExitStack() as opened,
        ):
            ledgers = [opened.enter_context(contextlib.closing(Ledger.open(path, read_only=True))) for path in places]
            for number, (run_id, folders) in enumerate(runs.items()):
                show(f"{number} of {count(len(runs), 'run')} compared")
                try:
                    for record, letters in _deliveries(ledgers, run_id):
                        found.append(
                            compare(*(sink, run_id, folders, record, letters), deep=deep, experiment=place.experiment)
                        )
                except OutboxUnusable:
                    raise
                except OSError as error:  # the others are compared all the same
                    terminal.error(f"the run {run_id} was not compared: {printable(error, 300)}")
                    found.append(Comparison(run_id, "unknown"))
                    code = ExitCode.ERROR
    except (LedgerUnavailable, OutboxUnusable) as error:
        terminal.error(str(error))
        found += _unknown(runs, found)
        code = ExitCode.ERROR
    except SinkError as error:
        terminal.error(f"{printable(destination.uri)} cannot be asked now: {error.described}")
        found += _unknown(runs, found)
        code = most_urgent([code, ExitCode.PARKED if classify(error, "open").kind == "parked" else ExitCode.LEFT])
    return code


def _unknown(runs: Collection[str], found: list[Comparison]) -> list[Comparison]:
    """Return what is to be said of the runs that were not compared."""
    from mlflow_outbox_worker.comparison import Comparison

    known = {one.run_id for one in found}
    return [Comparison(run_id, "unknown") for run_id in runs if run_id not in known]


def _not_compared(
    directory: OutboxDirectory, on_disk: Found, wanted: set[str] | None, found: list[Comparison]
) -> ExitCode:
    """Say what of the runs cannot be read on disk, and add those of which nothing can."""
    from mlflow_outbox_worker.comparison import Comparison

    problems = [*on_disk.problems] if wanted is None else []
    here = {*directory.run_ids(), *directory.delivered_ids()} if problems else set()
    for run_id in sorted(here if wanted is None else wanted):
        parts = outboxes.unreadable_parts(directory, run_id)
        if wanted is not None:
            problems += parts
        if run_id not in on_disk.runs and (parts or wanted is not None):
            problems.append(f"the run {printable(run_id)} was not compared: nothing of it can be read on disk")
            found.append(Comparison(run_id, "unknown"))
    for problem in problems:
        terminal.error(problem)
    return ExitCode.ERROR if problems else ExitCode.DONE


def _deliveries(ledgers: list[Ledger], run_id: str) -> Iterator[tuple[RunRecord | None, list[DeadLetter]]]:
    """Yield what is known of each delivery of a run to the destination, and its letters; at least one, of nothing."""
    records = [(ledger, ledger.record(run_id)) for ledger in ledgers]
    held = [one for one in records if one[1] is not None and one[1].remote_id]
    begun = [one for one in records if one[1] is not None]
    for ledger, record in held or begun[:1] or records[:1]:
        yield record, [*ledger.dead_letters(run_id), *ledger.settled_letters(run_id)]


@contextlib.contextmanager
def _opened(destination: Destination, settings: Settings) -> Iterator[Sink]:
    from mlflow_outbox_worker.mlflow_sink import open_sink

    sink = open_sink(
        destination.secret_uri or destination.uri,
        artifact_root=destination.artifact_root or None,
        timeout=settings.request_timeout,
    )
    with contextlib.closing(sink):
        yield sink


def _show(found: list[Comparison], remedy: str) -> None:
    for one in found:
        if one.state == "absent":
            waits = f" yet: {one.pending:,} of its events wait" if one.pending and not one.remote_id else ""
            terminal.data(f"{one.run_id}  MLflow does not have this run{waits}")
        for difference in one.differences[:_SHOWN]:
            terminal.data(f"{one.run_id}  {difference}")
        if len(one.differences) > _SHOWN:
            terminal.data(f"{one.run_id}  and {count(len(one.differences) - _SHOWN, 'further difference')}")
        if one.pending and one.state != "absent":
            terminal.data(f"{one.run_id}  {count(one.pending, 'event')} not sent yet")
    same = sum(one.state == "same" for one in found)
    waiting = sum(bool(one.pending) for one in found)
    dead = sum(one.dead for one in found)
    refused = f"; {count(dead, 'dead letter')} not expected there" if dead else ""
    still = f"; {count(waiting, 'run')} with events that wait: mlflow-outbox {remedy}" if waiting else ""
    terminal.say(f"{same} of {count(len(found), 'run')} held by MLflow in full{still}{refused}")
