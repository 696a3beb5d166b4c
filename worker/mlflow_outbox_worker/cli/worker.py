"""``mlflow-outbox worker``: delivery as a service, for one outbox or all under a directory.

SIGTERM and SIGINT end it: it hurries, delivers what it can within the grace time, and leaves the rest on disk. A
second signal ends it at once. Both are safe at any moment, as is SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import click

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.errors import OutboxError, OutboxUnusable
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.delivering import CommandWorker
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode, most_urgent, of_backlog
from mlflow_outbox_worker.cli.options import OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.signals import Ending

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.listing import SegmentFile
    from mlflow_outbox_worker.metrics import Exporter

#: Seconds between two looks at what the workers have come to.
_TICK: Final = 0.5
#: Seconds between two looks for outboxes that were made or removed meanwhile.
_NEW_ONES: Final = 5.0
#: Seconds between two lines about progress.
_REPORT: Final = 60.0
#: Seconds that the end waits for requests under way.
_PARTING: Final = 0.5


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("worker", worker))


def worker(
    outbox_dir: OutboxDir = None,
    every: Annotated[
        bool, Option("--all", about="Deliver every outbox in the directory, also those made later.")
    ] = False,
    until_idle: Annotated[
        bool, Option("--until-idle", about="End when everything is delivered and nobody logs any more.")
    ] = False,
    grace: Annotated[
        float, Option(least=0, metavar="S", about="Seconds to go on delivering after SIGTERM or SIGINT.")
    ] = 10.0,
    metrics_port: Annotated[
        int | None, Option(least=0, most=65535, metavar="N", about="Serve OpenMetrics at this port.")
    ] = None,
    metrics_address: Annotated[
        str, Option(metavar="ADDRESS", filled=True, about="The address that the port is at.")
    ] = "127.0.0.1",
    metrics_file: Annotated[
        Path | None, Option(metavar="PATH", about="Write metrics there, for a node exporter's textfile collector.")
    ] = None,
    metrics_interval: Annotated[
        float, Option(least=0.1, metavar="S", about="Seconds between two writes of --metrics-file.")
    ] = 15.0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Deliver as a service: one outbox, or with --all every one in the directory.

    Where another worker delivers it stands by, and takes over within seconds when that one ends. An outbox that is
    removed and made anew is delivered again.

    \b
    Examples:
      mlflow-outbox worker --outbox-dir /scratch/me/outbox --all
      mlflow-outbox worker --metrics-port 9110 --grace 25
      mlflow-outbox worker --all --until-idle --metrics-file outbox.prom
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    with Ending() as ending:
        service = Service(settings, ending, metrics=_exporter(settings, metrics_port, metrics_address, metrics_file))
        if every:
            service.adopt(outboxes.root_of(settings))
        else:
            service.take(outboxes.open_one(settings))
        service.run(
            root=outboxes.root_of(settings) if every else None,
            until_idle=until_idle,
            file=metrics_file,
            interval=metrics_interval,
        )
        return service.end(grace, metrics_file)


def _exporter(settings: Settings, port: int | None, address: str, file: Path | None) -> Exporter | None:
    if port is None and file is None:
        return None
    from mlflow_outbox_worker.metrics import Exporter

    exporter = Exporter(settings)
    if port is not None:
        host = f"[{address}]" if ":" in address else address  # of IPv6, as a URL has it
        try:
            bound = exporter.serve(port, address)
        except OSError as error:
            reason = error.strerror or error
            option = "port" if error.errno in {errno.EADDRINUSE, errno.EACCES} else "address"
            msg = f"metrics cannot be served at {printable(host)}:{port}: {reason}; give another --metrics-{option}"
            raise CommandFailed(msg) from error
        terminal.log(f"metrics at http://{host}:{bound}/metrics")
    return exporter


class Service:
    """The workers of one command.

    Args:
        settings: the options.
        ending: tells when somebody asks to end.
        metrics: shows them to a monitoring; None shows nothing.
    """

    def __init__(self, settings: Settings, ending: Ending, *, metrics: Exporter | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._workers: dict[Path, CommandWorker] = {}
        self._states: dict[Path, str] = {}
        self._reported: dict[CommandWorker, int] = {}
        self._refused: dict[Path, str] = {}
        self._ending = ending
        self._file_trouble = ""

    def __repr__(self) -> str:
        return f"<Service of {len(self._workers)} outboxes>"

    def take(self, directory: OutboxDirectory) -> None:
        """Deliver an outbox from now on.

        Raises:
            OutboxUnusable: it cannot be written to.
            RuntimeError: there is no thread left for it.
        """
        from mlflow_outbox_worker.metrics import Meter

        if why := outboxes.read_only(directory.path):
            raise OutboxUnusable(why)
        meter = Meter()
        one = CommandWorker(directory, self._settings, meter)
        one.start()
        if self._metrics is not None:
            self._metrics.watch(directory, one.counters, meter, one.delivery.holds_lease)
        self._workers[directory.path] = one

    def adopt(self, root: Path) -> None:
        """Deliver every outbox in a directory that is not delivered yet; one that is not safe to use is named once."""
        refused: dict[Path, str] = {}
        for path in outboxes.listed(root):
            if path in self._workers:
                continue
            try:
                self.take(OutboxDirectory.open(path))
            except OutboxUnusable as error:
                why = str(error)
            except RuntimeError as error:  # others have used up a limit of threads; it goes on with all the rest
                why = f"{printable(path, 300)} is not delivered yet: {error}"
            else:
                continue
            refused[path] = why
            if path not in self._refused:
                terminal.log(f"left alone: {why}")
        self._refused = refused

    def _look(self, root: Path | None) -> None:
        """Let go of an outbox that somebody has removed, and take those that are new, in its place too."""
        gone = self._refused if root is None else {}
        for path, one in list(self._workers.items()):
            try:
                one.directory.check_unchanged()
            except OutboxUnusable as error:
                terminal.log(f"left alone: {error}")
                one.ask_to_stop()
                if self._metrics is not None:
                    self._metrics.forget(one.directory)
                del self._workers[path]
                self._states.pop(path, None)
                gone[path] = str(error)
        if root is not None:
            self.adopt(root)
            return
        for path in list(gone):
            with contextlib.suppress(OutboxUnusable, RuntimeError):
                self.take(OutboxDirectory.open(path))
                del gone[path]

    def run(self, *, root: Path | None, until_idle: bool, file: Path | None, interval: float) -> None:
        """Go on until somebody asks to end.

        Args:
            root: where to look for new outboxes; None looks for none but the one that was taken.
            until_idle: end when there is nothing more to deliver.
            file: where metrics are written to.
            interval: seconds between two writes.
        """
        next_look = next_write = stopwatch.seconds()
        next_report = next_look + _REPORT
        while not self._ending.wait(_TICK):
            now = stopwatch.seconds()
            if now >= next_look:
                self._look(root)
                next_look = now + _NEW_ONES
            if file is not None and now >= next_write:
                self._write(file)
                next_write = now + interval
            self._say_changes()
            if now >= next_report:
                self._report()
                next_report = now + _REPORT
            if until_idle and all(self._is_idle(one) for one in self._workers.values()):
                if root is not None and not self._workers:
                    terminal.log(f"there is no outbox to deliver in {printable(root, 300)}")
                break

    def end(self, grace: float, file: Path | None) -> int:
        """Deliver what can be delivered within the grace time, stop, and return the exit code.

        Args:
            grace: seconds.
            file: where metrics are written to for the last time.
        """
        from mlflow_outbox_worker.survey import survey

        self._say_changes()
        deadline = stopwatch.seconds() + grace
        if self._ending.is_set():
            terminal.log(f"ending; {wording.span(grace)} to deliver what is left")
        while stopwatch.seconds() < deadline and not self._ending.wait(0.05, number=2):
            busy = [one for one in self._workers.values() if one.delivery.holds_lease() and not one.delivery.is_idle()]
            if not busy:
                break
            for one in busy:
                with contextlib.suppress(OSError):  # without it the worker tries at its own pace
                    one.directory.ask_hurry()
            self._ending.wait(min(0.5, deadline - stopwatch.seconds()), number=2)
        for one in self._workers.values():
            one.ask_to_stop()
        parting = stopwatch.seconds() + _PARTING
        for one in self._workers.values():
            one.stop(max(0.0, parting - stopwatch.seconds()))
        if file is not None:
            self._write(file)
        codes = []
        for why in self._refused.values():
            terminal.error(f"left alone: {why}")
            codes.append(ExitCode.ERROR)
        for one in self._workers.values():
            found = survey(one.directory, self._settings)
            codes.append(
                of_backlog(pending=found.pending, parked=found.parked, dead=found.dead, unreadable=found.unreadable)
            )
            terminal.log(
                f"{_name(one)}: {one.counters['delivered']:,} delivered, {found.pending:,} left, "
                f"{found.parked:,} parked, {wording.count(found.dead, 'dead letter')}"
            )
            if found.unreadable:
                terminal.log(f"{_name(one)}: {wording.unreadable(found.unreadable)}")
        return most_urgent(codes)

    def _is_idle(self, one: CommandWorker) -> bool:
        """Return whether everything is delivered and no run is being written."""
        if not one.delivery.is_idle():
            return False
        from mlflow_outbox.spool.reader import RunReader
        from mlflow_outbox_worker.survey import survey

        directory = one.directory
        if any(
            _is_logged_to(held[-1], network=directory.network)
            for run_id in directory.run_ids()
            for held in RunReader(directory.run(run_id)).segments().values()
        ):
            return False
        # After that: a program's last events are there when it has ended, though the loop has not seen them yet.
        return not any(run.pending and not run.unreadable for run in survey(directory, self._settings).runs)

    def _write(self, file: Path) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(file)
            self._file_trouble = ""
        except (OSError, OutboxError) as error:
            if str(error) != self._file_trouble:  # once, not every few seconds
                self._file_trouble = str(error)
                terminal.log(f"metrics cannot be written to {printable(file, 300)}: {error}")

    def _say_changes(self) -> None:
        from mlflow_outbox_worker.host_lease import described

        for path, one in self._workers.items():
            if one.delivery.holds_lease():
                state = "delivering"
            else:
                other = one.delivery.other_worker()
                state = f"standing by, {described(other)} delivers" if other is not None else self._states.get(path, "")
            if state and self._states.get(path) != state:
                self._states[path] = state
                terminal.log(f"{_name(one)}: {state}, to {one.directory.destination.uri}")

    def _report(self) -> None:
        before, self._reported = self._reported, {one: one.counters["delivered"] for one in self._workers.values()}
        for one, delivered in self._reported.items():
            if delivered > before.get(one, 0):
                terminal.log(f"{_name(one)}: {delivered:,} delivered so far")


def _name(one: CommandWorker) -> str:
    return printable(one.directory.path.name)


def _is_logged_to(last: SegmentFile, *, network: bool) -> bool:
    """Return whether somebody logs to a writer's last segment."""
    from mlflow_outbox.spool.disk import is_being_written
    from mlflow_outbox.spool.writer import has_died_here, is_closed, writer_state
    from mlflow_outbox_worker.replay import GIVE_UP

    if is_being_written(last.path):
        return True
    if not network or is_closed(last.path, last.header) or has_died_here(last.header):
        return False
    # No lock tells there that a writer lives: it does until it has said that it ends, or was silent for an hour.
    return writer_state(last.path, last.header).idle < GIVE_UP
