"""``mlflow-outbox replay``: send runs that lie somewhere on disk, to where they were meant to go or elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LeaseHeld, OutboxError
from mlflow_outbox.settings import Settings, tracking_uri_from_environment
from mlflow_outbox_worker.cli import clock, delivering, terminal
from mlflow_outbox_worker.cli.declare import Argument, Option, command
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode, most_urgent
from mlflow_outbox_worker.cli.fragments import refuse_fragments
from mlflow_outbox_worker.cli.options import AsJson, Incomplete, Quiet, Verbose
from mlflow_outbox_worker.cli.signals import Ending
from mlflow_outbox_worker.cli.terminal import Column
from mlflow_outbox_worker.wording import count, quoted

if TYPE_CHECKING:
    from mlflow_outbox_worker.jobs import Job, Prepared, Wish
    from mlflow_outbox_worker.replay import JobResult, Progress

#: Refused events that are named one by one.
_NAMED: Final = 20


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("replay", replay))


def replay(
    paths: Annotated[
        list[Path],
        Argument(metavar="PATH...", about="Outboxes, directories with several, single runs' directories, bundles."),
    ],
    to: Annotated[
        str | None, Option("--to", metavar="URI", filled=True, about="Tracking URI; else the recorded one.")
    ] = None,
    experiment: Annotated[
        str | None, Option("--experiment", metavar="NAME", filled=True, about="Put all runs into this experiment.")
    ] = None,
    only_finished: Annotated[bool, Option("--only-finished", about="Only runs whose status is FINISHED.")] = False,
    again: Annotated[
        bool, Option("--again", about="Send delivered runs once more: to a wiped or migrated server.")
    ] = False,
    incomplete: Incomplete = False,
    follow: Annotated[bool, Option("--follow", about="Go on while the runs are still written.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", about="Only say what would be sent.")] = False,
    jobs: Annotated[
        int | None,
        Option(
            "--jobs", "-j", least=1, metavar="N", about="Runs sent side by side.", default="the setting parallel_runs"
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        Option(
            "--timeout",
            least=0,
            metavar="S",
            about="Seconds to take at most, also when the server hangs.",
            default="until done",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Send runs that are on disk: offline runs, copies, bundles, runs on a shared file system.

    Interrupted and started again it goes on where it was. Nothing arrives twice, also when another machine replays
    the same files. Whatever is not this user's own outbox is only read. Where a run is not to go on but to be copied
    (to another place, or --again), and its first events were delivered and reclaimed, nothing is sent without
    --incomplete: exit code 1.

    \b
    Examples:
      # what a machine without internet has logged
      mlflow-outbox replay ./.mlflow-outbox
      # to another server
      mlflow-outbox replay /mnt/usb/outbox --to http://mlflow:5000
      # a bundle, into one experiment
      mlflow-outbox replay runs.tar --experiment imported
      # from a login node, while the job runs
      mlflow-outbox replay /scratch/outbox --follow
      # after the server's database was lost
      mlflow-outbox replay ./.mlflow-outbox --again
    """
    from mlflow_outbox_worker.jobs import Wish, prepare

    deadline = None if timeout is None else clock.began() + timeout
    terminal.behave(quiet=quiet or as_json, verbose=verbose)
    if follow and (only_finished or again):
        msg = "--follow goes with neither --only-finished nor --again: its runs have not ended"
        raise CommandFailed(msg, ExitCode.USAGE)
    settings = Settings.from_environment()
    settings = dataclasses.replace(settings, parallel_runs=jobs) if jobs is not None else settings
    wish = Wish(to, tracking_uri_from_environment(), experiment or "", only_finished, again, follow)
    with _unpacked(paths, deadline) as places:
        bundles = set(places) - set(paths)
        prepared = prepare(list(places), wish, copies=bundles, deadline=deadline, ledger_dir=settings.ledger_dir)
        for problem in prepared.problems:
            terminal.error(problem)
        if dry_run:
            code = _say_what_would_be_sent(prepared, settings, places, as_json=as_json)
            refuse_fragments(prepared.fragments, incomplete=incomplete, done="sent")
            return code
        refuse_fragments(prepared.fragments, incomplete=incomplete, done="sent")
        if not prepared.jobs and not prepared.problems:
            terminal.say(_nothing(prepared))
        sent = _sent_before(prepared)
        code = _send_all(prepared, settings, wish, deadline, sent)
    if as_json:
        terminal.raw(json.dumps(sent, indent=2))
    return ExitCode.ERROR if prepared.problems and code is ExitCode.DONE else code


@contextlib.contextmanager
def _unpacked(paths: list[Path], deadline: float | None) -> Iterator[dict[Path, Path]]:
    """Yield where each path's runs are to be read, bundles unpacked; what was unpacked is removed at the end."""
    with contextlib.ExitStack() as stack:
        places: dict[Path, Path] = {}
        for path in paths:
            if not path.exists():
                msg = f"there is nothing at {printable(path, 300)}; give an outbox, a run's directory or a bundle"
                raise CommandFailed(msg, ExitCode.USAGE)
            if path.is_file():
                from mlflow_outbox_worker.unpacking import unpacked

                places[stack.enter_context(unpacked(path, deadline))] = path
            else:
                places[path] = path
        yield places


def _nothing(prepared: Prepared) -> str:
    if prepared.before:
        return f"nothing to send: {count(prepared.before, 'run')} delivered before (--again sends them once more)"
    return "nothing to send: no runs there"


def _sent_before(prepared: Prepared) -> list[dict[str, Any]]:
    """Return how what was delivered before is told to programs."""
    before = prepared.before
    return [{"destination": None, "cut_short": "before", "runs": [], "delivered_before": before}] if before else []


def _say_what_would_be_sent(
    prepared: Prepared, settings: Settings, places: Mapping[Path, Path], *, as_json: bool
) -> int:
    """Say what each job would send, and from where: of a bundle the file, not where it is unpacked just now."""
    from mlflow_outbox_worker.jobs import known_records, pending_events, view_of

    if not prepared.jobs:
        terminal.say(_nothing(prepared))
    told = _sent_before(prepared)
    for job in prepared.jobs:
        records = {} if job.again else known_records(job, settings)
        waiting = pending_events(job, records)
        rows: list[list[str]] = []
        runs: list[dict[str, Any]] = []
        for run_id, folders in job.runs.items():
            bundles = [path for place, path in places.items() if path.is_file() and place in folders[0].parents]
            where = str((bundles or [folder for folder in folders if folder.is_dir()] or folders)[0])
            try:
                view = view_of(folders)
            except OSError as error:
                rows.append([run_id, "", "cannot be read", str(error.strerror), where])
                runs.append({"run_id": run_id, "in": where, "error": str(error.strerror)})
                continue
            number = waiting.get(run_id, 0)
            rows.append([run_id, view.title, view.status.value, f"{number:,}", where])
            known = {"name": view.title, "status": view.status.value, "to_send": number}
            runs.append({"run_id": run_id, "in": where, **known})
        told.append({"destination": job.destination.uri, "runs": runs})
        if as_json:
            continue
        terminal.say(f"to {job.destination.uri}:")
        terminal.table(
            (
                Column("run"),
                Column("name", rank=1, cut=True),
                Column("status"),
                Column("to send", right=True),
                Column("in", rank=2, cut=True),
            ),
            rows,
        )
    if as_json:
        terminal.raw(json.dumps(told, indent=2))
    return ExitCode.ERROR if prepared.problems else ExitCode.DONE


def _send_all(
    prepared: Prepared, settings: Settings, wish: Wish, deadline: float | None, sent: list[dict[str, Any]]
) -> ExitCode:
    codes = []
    with Ending(forceful=True) as ending:
        for job in prepared.jobs:
            left = None if deadline is None else max(0.0, deadline - stopwatch.seconds())
            codes.append(_send(job, settings, wish, left, ending, sent))
            if ending.is_set():
                break
        return ExitCode.INTERRUPTED if ending.interrupted else most_urgent(codes)


def _send(
    job: Job, settings: Settings, wish: Wish, timeout: float | None, ending: Ending, sent: list[dict[str, Any]]
) -> ExitCode:
    from mlflow_outbox_worker.cli import dead
    from mlflow_outbox_worker.jobs import refused_of
    from mlflow_outbox_worker.replay import Replay

    terminal.note(f"{count(len(job.runs), 'run')} to {job.destination.uri}")
    try:
        with _shown(endless=wish.follow) as show:
            delivering.note_use(job.source.path)
            result = Replay(job, settings, wish, stopped=ending).run(show, timeout=timeout)
        letters = refused_of(job, settings) if any(run.dead for run in result.runs) else []
    except OutboxError as error:
        terminal.error(str(error))
        return ExitCode.HELD if isinstance(error, LeaseHeld) else ExitCode.ERROR
    told: dict[str, Any] = {"destination": job.destination.uri, "cut_short": result.cut_short or None}
    refused = [dead.as_data(job.source.path, letter) for letter in letters]
    if job.own is None:  # then they are in no outbox, and other commands know no number of theirs
        refused = [{name: value for name, value in one.items() if name not in {"id", "outbox"}} for one in refused]
    sent.append({**told, "runs": [run._asdict() for run in result.runs], "refused": refused})
    code = _summary(job, result)
    for letter in letters[:_NAMED]:
        terminal.error(f"run {letter.run_id}: {dead.in_words(letter)} was refused: {printable(letter.reason, 300)}")
    if len(letters) > _NAMED:
        terminal.error(f"and {count(len(letters) - _NAMED, 'event')} more; the same command with --json has them all")
    if letters and job.own is not None:
        terminal.note(f"send them again, edit or drop them: mlflow-outbox dead list -d {quoted(job.own.path)}")
    elif letters:  # what a copy of an outbox in use lacked may be there the next time
        terminal.note(f"once what was wrong has been mended, {job.source.resends} sends them too")
    return code


def _summary(job: Job, result: JobResult) -> ExitCode:
    if result.cut_short == "before":
        what = f"{count(len(result.runs), 'run')} sent to {job.destination.uri} before"
        terminal.say(f"nothing to send: {what} (--again sends them once more)")
        return ExitCode.DEAD if any(run.dead for run in result.runs) else ExitCode.DONE
    sent = [run for run in result.runs if run.state == "sent"]
    skipped = [run for run in result.runs if run.state == "skipped"]
    waiting = [run for run in result.runs if run.state == "left"]
    dead, missing = sum(run.dead for run in result.runs), sum(run.missing for run in result.runs)
    parts = [f"{count(len(sent), 'run')} sent to {job.destination.uri}"]
    parts += [f"{count(len(waiting), 'run')} left"] if waiting else []
    parts += [f"{count(len(skipped), 'run')} skipped"] if skipped else []
    parts += [f"{count(dead, 'event')} refused by MLflow"] if dead else []
    parts += [f"{count(missing, 'event')} missing or damaged on disk"] if missing else []
    terminal.say(", ".join(parts))
    for run in sent:
        if run.reason:
            terminal.note(f"run {run.run_id}: {run.reason}")
    for run in skipped:
        terminal.error(f"run {run.run_id} was skipped: {run.reason}")
    if result.cut_short == "parked":
        terminal.error(f"{job.destination.uri} waits for a person: {result.reason}")
        return ExitCode.PARKED
    if waiting:
        if not sent and not result.reason:
            terminal.note(f"{job.destination.uri} has not answered yet")
        without = " without --again" if job.again else ""
        terminal.note(f"the same command{without} goes on where this one stopped")
        return ExitCode.LEFT
    if skipped:
        return ExitCode.ERROR if any(run.gone for run in skipped) else ExitCode.PARKED
    return ExitCode.DEAD if dead else ExitCode.DONE


@contextlib.contextmanager
def _shown(*, endless: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield what shows progress: a bar with rate and time left on a terminal, a line now and then elsewhere."""
    import sys

    if terminal.is_quiet() or not sys.stderr.isatty():
        with terminal.progress() as line:

            def plain(progress: Progress) -> None:
                line(
                    f"{progress.events:,} of {count(progress.total, 'event')}, {progress.runs} of "
                    f"{count(progress.all_runs, 'run')}{': ' if progress.note else ''}{progress.note}"
                )

            yield plain
        return
    from rich.console import Console
    from rich.live import Live

    from mlflow_outbox_worker.cli.bar import ReplayBar

    bar = ReplayBar(endless=endless)
    with Live(bar, console=Console(stderr=True), transient=True, refresh_per_second=8, redirect_stdout=False):
        yield bar.update
