"""Commands from functions: a signature says what the options and arguments of a command are.

::

    def flush(timeout: Annotated[float | None, Option("--timeout", metavar="S", least=0, about="...")] = None) -> int:
        ...

    app.add_command(command("flush", flush))

click does the rest. It comes with MLflow and imports in a twentieth of a second; typer, which reads signatures too,
imports pydantic in its present versions, and every ``status`` would wait for that.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

from mlflow_outbox_worker.cli.exits import ExitCode

#: Columns that help fills at most: what fits the smallest terminal in use, wider lines are hard to read.
WIDTH: Final = 80
_EMPTY: Final = "its value is empty; leave it out, or give it one."
_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}


#: Returns the values that a parameter may have, given those of the command's other parameters.
Words = Callable[[dict[str, Any]], Iterable[str]]


@dataclasses.dataclass(frozen=True)
class Argument:
    """What a positional parameter is called in help, what it is about, and what says how a shell may complete it.

    An empty value of one that is ``filled``, as of a variable that is not set, is bad usage.
    """

    metavar: str
    about: str
    words: Words | None = None
    filled: bool = False


class Option:
    """An option of a command.

    Args:
        names: as it is typed, for instance "--timeout", "-t".
        about: one sentence for help.
        metavar: what its value is called in help.
        least: the smallest number that it takes.
        most: the largest.
        filled: an empty value, as of a variable that is not set, is bad usage.
        default: what help says about leaving it out, when the default value itself does not tell.
        words: says how a shell may complete its value.
    """

    def __init__(
        self,
        *names: str,
        about: str,
        metavar: str | None = None,
        least: float | None = None,
        most: float | None = None,
        filled: bool = False,
        default: str = "",
        words: Words | None = None,
    ) -> None:
        self.names = names
        self.words = words
        self.about = f"{about}  [default: {default}]" if default else about
        self.metavar = metavar
        self.least, self.most = least, most
        self.filled = filled

    def __repr__(self) -> str:
        return f"<Option {'/'.join(self.names)}>"


class _Help(click.Command):
    """A command whose help has a section about its arguments."""

    arguments: Sequence[tuple[str, str]] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.arguments))
        super().format_options(ctx, formatter)


class Group(click.Group):
    """Commands in the order in which they were added; without any word it shows its help, which is bad usage.

    Args:
        name: of the group.
        about: its help.
        params: its options.
    """

    def __init__(self, name: str, about: str, params: list[click.Parameter] | None = None) -> None:
        super().__init__(
            name,
            help=about,
            params=params,
            callback=_show_help,
            invoke_without_command=True,
            context_settings=_CONTEXT,
            subcommand_metavar="COMMAND ...",
        )

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in order."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one may have been meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            for near in get_close_matches(args[0], self.commands, n=1):
                msg = f"{error.message} Did you mean '{near}'?"
                raise click.UsageError(msg, ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - the same
        """Write the commands with whole sentences, where click cuts them off."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(10 * WIDTH)) for name, one in self.commands.items()])


@click.pass_context
def _show_help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(ExitCode.USAGE)


def command(name: str, function: Callable[..., int]) -> click.Command:
    """Return the command that calls a function.

    Args:
        name: of the command.
        function: its parameters are annotated with ``Option`` or ``Argument``; its docstring becomes the help.
    """
    hints = get_type_hints(function, include_extras=True)
    made = _Help(name, callback=function, help=inspect.getdoc(function), context_settings=_CONTEXT)
    arguments = []
    for parameter in inspect.signature(function).parameters.values():
        kind, about = _annotation(hints[parameter.name])
        if isinstance(about, Argument):
            arguments.append((about.metavar, about.about))
        made.params.append(_parameter(parameter, kind, about))
    made.arguments = arguments
    return made


def _annotation(hint: Any) -> tuple[Any, Option | Argument]:
    """Return the type of a parameter without None, and what it is."""
    if get_origin(hint) is not Annotated:  # Python 3.10 adds None to what has None as its default
        (hint,) = (part for part in get_args(hint) if get_origin(part) is Annotated)
    kind, about = get_args(hint)
    if NoneType in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return kind, about


def _parameter(parameter: inspect.Parameter, kind: Any, about: Option | Argument) -> click.Parameter:
    several = get_origin(kind) is list
    kind = get_args(kind)[0] if several else kind
    required = parameter.default is inspect.Parameter.empty
    default = None if required else parameter.default
    if isinstance(about, Argument):
        return click.Argument(
            [parameter.name],
            type=_Filled() if about.filled else _type(kind, None, None),
            nargs=-1 if several else 1,
            required=required,
            metavar=about.metavar,
            shell_complete=_completing(about.words),
        )
    names = [parameter.name, *(about.names or (f"--{parameter.name.replace('_', '-')}",))]
    if kind is bool:
        return click.Option(names, is_flag=True, default=default, help=about.about)
    return click.Option(
        names,
        type=_Filled() if about.filled else _type(kind, about.least, about.most),
        multiple=several,
        required=required,
        default=default,
        show_default=default not in {None, ""},
        metavar=about.metavar,
        help=about.about,
        shell_complete=_completing(about.words),
    )


def _completing(words: Words | None) -> Callable[[click.Context, click.Parameter, str], list[str]] | None:
    if words is None:
        return None

    def complete(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
        return [word for word in words(ctx.params) if word.startswith(begun)]

    return complete


class _Whole(click.IntRange):
    """A whole number, and what to say of anything else."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not a whole number{_bounds(self.min, self.max)}.", param, ctx)

    def _describe_range(self) -> str:
        return ""  # the sentence about the option says it, and so does the error


class _Number(click.FloatRange):
    """A finite number, and what to say of anything else."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number{_bounds(self.min, self.max)}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return ""


class _Filled(click.types.StringParamType):
    """A text that is not empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        if not text.strip():
            self.fail(_EMPTY, param, ctx)
        return text


class _Place(click.Path):
    """A path that is not empty: an empty one, as of a variable that is not set, would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value).strip():
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


def _bounds(least: float | None, most: float | None) -> str:
    if most is not None:
        return f" from {least or 0:g} to {most:g}"
    return "" if least is None else f" of at least {least:g}"


def _type(kind: Any, least: float | None, most: float | None) -> Any:
    if kind is int:
        return _Whole(None if least is None else int(least), None if most is None else int(most))
    if kind is float:
        return _Number(least, most)
    if kind is Path:
        return _Place(path_type=Path)
    return click.STRING
