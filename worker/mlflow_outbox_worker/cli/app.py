"""The application: its commands, and what every one of them has in common, above all how it ends.

A command's module is imported to declare it, and imports what it needs itself only when it is called: ``--help`` and ``status`` must
not wait for mlflow.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

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
    "runs",
    "dead",
    "gc",
    "doctor",
)

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
_UsageTrouble: Final = typer.BadParameter.__mro__[2]


def build() -> typer.Typer:
    """Return the application with all its commands."""
    app = typer.Typer(
        name=PROGRAM,
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in _COMMANDS:
        importlib.import_module(f"mlflow_outbox_worker.cli.{name}").register(app)

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),  # noqa: FBT001, FBT003 - typer's form of a flag
    ) -> None:
        pass

    return app


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        from mlflow_outbox import __version__  # noqa: PLC0415 - imported on demand

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words of the command line; None means this process's.
    """
    terminal.prepare()
    code = _run(arguments)
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
        result = build()(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        return int(result) if isinstance(result, int) else ExitCode.DONE
    except _UsageTrouble as error:
        with contextlib.suppress(BrokenPipeError):
            error.show()  # type: ignore[attr-defined]
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
