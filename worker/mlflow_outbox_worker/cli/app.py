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
from typing import Any, Final, cast

import typer

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import OutboxError
from mlflow_outbox_worker.cli import delivering, terminal
from mlflow_outbox_worker.cli.exits import EXPLAINED, ExitCode, of_error

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
  mlflow-outbox status                     what waits, since when, and who delivers it
  mlflow-outbox flush --timeout 60         deliver now, for instance before a machine goes down
  mlflow-outbox worker --all               deliver as a service
  mlflow-outbox show 3f9c --follow         read a run that MLflow does not have yet
  mlflow-outbox dead list                  events that MLflow refused, and why

{EXPLAINED}"""

#: typer.BadParameter's grandparent: the error whose ``show`` explains bad usage, wherever typer keeps it.
_UsageTrouble: Final = cast("type[Any]", typer.BadParameter.__mro__[2])


def build(command: str = "") -> typer.Typer:
    """Return the application.

    Args:
        command: the only command that will be called, so that a quick one need not wait for the others to be declared;
            anything else means all of them.
    """
    module = _HOME.get(command, command)
    app = typer.Typer(
        name=PROGRAM,
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in (module,) if module in _COMMANDS else _COMMANDS:
        importlib.import_module(f"mlflow_outbox_worker.cli.{name}").register(app)

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    return app


def _print_version(asked: bool) -> None:
    if asked:
        from mlflow_outbox import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words of the command line; None means this process's.
    """
    terminal.prepare()
    try:
        code = _run(arguments)
    finally:
        terminal.leave()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_is_gone()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    if arguments is None and delivering.was_used():
        # Neither a request that hangs nor what mlflow does at exit may keep the command; all that counts is on disk.
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        words = sys.argv[1:] if arguments is None else [*arguments]
        result = build(words[0] if words else "")(args=words, prog_name=PROGRAM, standalone_mode=False)
        code = int(result) if isinstance(result, int) else ExitCode.DONE
        if code == ExitCode.INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
        return code
    except _UsageTrouble as error:
        with contextlib.suppress(BrokenPipeError):
            error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        terminal.error("interrupted; nothing was left half done")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return _reader_is_gone()
    except OutboxError as error:
        _explain(error, str(error))
        return of_error(error)
    except OSError as error:
        where = f"{printable(error.filename, 300)}: " if error.filename else ""
        _explain(error, f"{where}{error.strerror or error}")
        return ExitCode.ERROR
    except Exception as error:  # noqa: BLE001 - the last resort of a command: said in one sentence, with an exit code
        _explain(error, f"this should not have happened: {type(error).__name__}: {error}; -v shows where")
        return ExitCode.ERROR


def _explain(error: BaseException, sentence: str) -> None:
    if terminal.is_verbose():
        traceback.print_exception(error)
    terminal.error(sentence)


def _reader_is_gone() -> int:
    """End quietly when whatever reads standard output has had enough, as ``head`` does."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.ERROR
