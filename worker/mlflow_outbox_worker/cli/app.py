"""The application: its commands, and what every one of them has in common, above all how it ends.

A command's module is imported to declare it, and imports what it needs itself only when it is called: ``--help``
and ``status`` must not wait for mlflow.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import OutboxError
from mlflow_outbox_worker import surroundings
from mlflow_outbox_worker.cli import clock, delivering, terminal
from mlflow_outbox_worker.cli.declare import Group
from mlflow_outbox_worker.cli.exits import EXPLAINED, CommandFailed, ExitCode, of_error

PROGRAM: Final = "mlflow-outbox"

#: The modules of the commands, in the order in which --help lists them.
_COMMANDS: Final = (
    "status",
    "flush",
    "worker",
    "replay",
    "bundle",
    "verify",
    "runs",
    "dead",
    "gc",
    "doctor",
)

#: The modules of commands that are not called like theirs.
_HOME: Final = {"show": "runs", "export": "bundle", "import": "bundle"}

_HELP: Final = f"""Deliver, look at and mend the outboxes of MLflow runs, also while programs log to them.

\b
Examples:
  mlflow-outbox status               # what waits, since when, who delivers it
  mlflow-outbox flush --timeout 60   # deliver now, before a machine goes down
  mlflow-outbox worker --all         # deliver as a service
  mlflow-outbox show 3f9c --follow   # read a run before MLflow has it
  mlflow-outbox dead list            # events that MLflow refused, and why

{EXPLAINED}"""

#: The variable by which a shell's completion asks for words.
_COMPLETE: Final = "_MLFLOW_OUTBOX_COMPLETE"


def build(command: str = "") -> Group:
    """Return the application.

    Args:
        command: the only command that will be called, so that a quick one need not wait for the others to be declared;
            anything else means all of them.
    """
    module = _HOME.get(command, command)
    app = Group(PROGRAM, _HELP, [_version(), _completion()])
    for name in (module,) if module in _COMMANDS else _COMMANDS:
        importlib.import_module(f"mlflow_outbox_worker.cli.{name}").register(app)
    return app


def _version() -> click.Option:
    def show(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            from mlflow_outbox import __version__

            sys.stdout.write(f"{PROGRAM} {__version__}\n")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show, help="Print the version."
    )


def _completion() -> click.Option:
    def show(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
        if shell is None or ctx.resilient_parsing:
            return
        from click.shell_completion import get_completion_class

        name = shell or os.path.basename(os.environ.get("SHELL", "")) or "bash"
        kind = get_completion_class(name)
        if kind is None:
            msg = f"{printable(name)} is no shell that can complete; give --show-completion bash, zsh or fish"
            raise CommandFailed(msg, ExitCode.USAGE)
        sys.stdout.write(kind(build(), {}, PROGRAM, _COMPLETE).source() + "\n")
        ctx.exit()

    return click.Option(
        ["--show-completion"],
        is_flag=False,
        flag_value="",
        metavar="[SHELL]",
        expose_value=False,
        is_eager=True,
        callback=show,
        help='Print what makes bash, zsh or fish complete words: eval "$(mlflow-outbox --show-completion)".',
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words of the command line; None means this process's.
    """
    if arguments is not None:
        clock.begin()
    else:
        surroundings.settle()
        os.environ.update(surroundings.NO_THREADS)
    terminal.prepare()
    try:
        code = _run(arguments)
    finally:
        terminal.leave()
    if not _is_printed():
        code = ExitCode.ERROR
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        terminal.flush(sys.stderr)
    if arguments is None and delivering.was_used():
        # Neither a request that hangs nor what mlflow does at exit may keep the command; all that counts is on disk.
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        if arguments is None and _COMPLETE in os.environ:
            from click.shell_completion import shell_complete

            return shell_complete(build(), {}, PROGRAM, _COMPLETE, os.environ[_COMPLETE])
        words = sys.argv[1:] if arguments is None else [*arguments]
        app = build(words[0] if words else "")
        # Not main() of click, which has ideas of its own about interrupts and closed pipes.
        with app.make_context(PROGRAM, words) as context:
            result = app.invoke(context)
        code = int(result) if isinstance(result, int) else ExitCode.DONE
        if code == ExitCode.INTERRUPTED:  # the command has noted it and ended in order
            raise KeyboardInterrupt
        return code
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        with contextlib.suppress(BrokenPipeError):
            error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        terminal.interrupted()
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # whatever reads standard output has had enough, as ``head`` has
        return ExitCode.ERROR
    except OutboxError as error:
        _explain(error, str(error))
        return of_error(error)
    except OSError as error:
        if not error.filename and not _is_printed():
            return ExitCode.ERROR
        where = f"{printable(error.filename, 300)}: " if error.filename else ""
        _explain(error, f"{where}{error.strerror or error}")
        return ExitCode.ERROR
    except Exception as error:  # noqa: BLE001 - the last resort of a command: said in one sentence, with an exit code
        _explain(error, f"this should not have happened: {type(error).__name__}: {error}; -v shows where")
        return ExitCode.ERROR


def _is_printed() -> bool:
    """Return whether all that was printed has arrived; say why not, unless its reader has had enough, as ``head``."""
    try:
        terminal.flush(sys.stdout)
    except BrokenPipeError:
        return False
    except OSError as error:
        terminal.error(f"standard output cannot be written: {error.strerror or error}")
        return False
    return True


def _explain(error: BaseException, sentence: str) -> None:
    if terminal.is_verbose():
        traceback.print_exception(error)
    terminal.error(sentence)
