"""Manners at the terminal: who reads the output decides how it looks, and nothing shown can give orders.

A terminal gets tables that fit its width, and colours unless ``NO_COLOR`` says otherwise (rich sees to that). A
pipe or a file gets plain lines, whole and without escape sequences. Everything that comes from a run (keys, names,
answers of servers) is shown with its control characters escaped. What a command was asked for goes to standard
output, what it has to say about itself to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, NamedTuple, TextIO

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable

#: Characters of one cell or line; longer ones are cut, so that a value of a megabyte does not scroll everything away.
_CELL: Final = 300
_LINE: Final = 4000
#: Characters to which texts are cut before columns are left out.
_NARROW: Final = 12
#: Seconds between two lines of progress where lines cannot be written over.
_PROGRESS: Final = 10.0


class _State:
    quiet = False
    verbose = False
    #: Standard output was closed when the command began.
    unheard = False
    #: Why a line is lost; the end of the command says so.
    lost: OSError | None = None
    undo: ClassVar[list[Callable[[], object]]] = []


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: its heading.
        right: align to the right, for numbers.
        rank: columns of a higher rank are left out first on a narrow terminal; 0 is never left out.
        cut: its texts may be cut off before columns are left out: not numbers, times and ids, but names and reasons.
    """

    title: str
    right: bool = False
    rank: int = 0
    cut: bool = False


class Styled(NamedTuple):
    """Text with a style of rich's, for a terminal with colours."""

    text: str
    style: str


Cell = str | Styled


class _ToStandardError(logging.Handler):
    """Shows the library's warnings as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage().removeprefix("mlflow-outbox: "))


def prepare() -> None:
    """Set the streams up at the start of a command; may be called again in one process."""
    _State.quiet = _State.verbose = False
    _State.lost = None
    _State.unheard = _State.unheard or sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Python has none where the descriptor was closed, and in this order it gets the same one: no file of ours may.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the process is
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a stream of a test or of a notebook
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # suppressed above


def behave(*, quiet: bool = False, verbose: bool = False) -> None:
    """Take note of ``--quiet`` and ``--verbose``."""
    _State.quiet, _State.verbose = quiet, verbose
    log = logging.getLogger("mlflow_outbox")
    if not _State.undo:
        handler, propagate = _ToStandardError(), log.propagate
        log.addHandler(handler)
        log.propagate = False
        _State.undo += [lambda: log.removeHandler(handler), lambda: setattr(log, "propagate", propagate)]
        for name in ("mlflow", "alembic", "urllib3"):
            noisy = logging.getLogger(name)
            _State.undo.append(functools.partial(noisy.setLevel, noisy.level))
            noisy.setLevel(logging.INFO if verbose else logging.ERROR)


def leave() -> None:
    """Put the logging of this process back as it was, at the end of a command."""
    while _State.undo:
        _State.undo.pop()()


def is_verbose() -> bool:
    """Return whether ``--verbose`` was given."""
    return _State.verbose


def is_quiet() -> bool:
    """Return whether ``--quiet`` was given."""
    return _State.quiet


def say(text: str) -> None:
    """Print a line, unless ``--quiet`` was given."""
    if not _State.quiet:
        data(text)


def data(text: str) -> None:
    """Print a line that was asked for, ``--quiet`` or not."""
    _write(_fitted(printable(text, _LINE), sys.stdout))


def raw(text: str) -> None:
    """Print a line that holds no control characters already, in full: JSON."""
    _write(text)


def _write(line: str) -> None:
    try:
        sys.stdout.write(line + "\n")
    except OSError as error:
        _State.lost = error
        raise


def flush(stream: TextIO) -> None:
    """See that all that was printed to a stream has arrived; what cannot arrive is given up.

    Raises:
        OSError: some of it has not.
    """
    lost = _State.lost if stream is sys.stdout else None
    try:
        stream.flush()
    except OSError as error:
        _give_up(stream)
        lost = error
    if lost is not None:
        _State.lost = None
        raise lost


def log(text: str) -> None:
    """Print a line with the time at once, as a service's log wants it, unless ``--quiet`` was given.

    On a full disk the line is lost, and the service goes on; ``flush`` raises why at the end.

    Raises:
        BrokenPipeError: whatever reads it has ended.
    """
    try:
        say(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _State.lost = error


def _give_up(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, so that neither a later flush nor the interpreter's last one fails."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def record(text: str) -> None:
    """Print a line of JSON that is the last copy of something; it has arrived when this returns.

    Raises:
        OSError: it has not, or nobody can read it.
    """
    if _State.unheard:
        raise OSError(errno.EBADF, "standard output is closed")
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        _give_up(sys.stdout)
        raise


def note(text: str) -> None:
    """Print a line about the command itself to standard error, unless ``--quiet`` was given."""
    if not _State.quiet:
        _to_stderr(f"mlflow-outbox: {text}")


def error(text: str) -> None:
    """Print what went wrong to standard error."""
    _to_stderr(f"mlflow-outbox: error: {text}")


def interrupted() -> None:
    """Print that ctrl-C has ended the command, over the "^C" with which a terminal answers it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write("\r" if sys.stderr.isatty() else "")
    error("interrupted; nothing was left half done")


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stderr.write(_fitted(printable(text, _LINE), sys.stderr) + "\n")
        sys.stderr.flush()


def _fitted(text: str, stream: TextIO) -> str:
    """Return a line as several for a terminal that it is too long for, broken between words."""
    return "\n".join(" " * indent + text[start:end] for indent, start, end in _broken(text, stream.isatty()))


def _broken(text: str, fit: bool = True, hanging: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of a line that fit the terminal: indent, beginning and end; a longer word is left whole."""
    room = shutil.get_terminal_size().columns
    if not fit or len(text) <= room:
        yield 0, 0, len(text)
        return
    hanging = hanging or len(text) - len(text.lstrip()) + 2
    indent, start, end = 0, 0, 0
    for word in re.finditer(r"\S+", text):
        if end > start and indent + word.end() - start > room:
            yield indent, start, end
            indent, start = hanging, word.start()
        end = word.end()
    yield indent, start, end


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


def styled(*cells: Cell, hanging: int = 0) -> None:
    """Print a line with styles, unless ``--quiet`` was given.

    Args:
        cells: its parts.
        hanging: the indent of what goes on in the next line; 0 is a little more than the line's own.
    """
    if _State.quiet:
        return
    if not is_terminal():
        data("".join(_text(cell) for cell in cells))
        return
    from rich.text import Text

    line = Text.assemble(*(_rich_text(cell) for cell in cells))
    for indent, start, end in _broken(line.plain, hanging=hanging):
        _console().print(Text(" " * indent), line[start:end], sep="", soft_wrap=True)


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table: fitted to a terminal, in full to a pipe."""
    texts = [[printable(_text(cell), _CELL) for cell in row] for row in rows]
    widths = [max(len(c.title), *(len(row[i]) for row in texts), 0) for i, c in enumerate(columns)]
    shown = list(range(len(columns)))
    if not is_terminal():
        _plain_line([column.title.upper() for column in columns], columns, widths)
        for line in texts:
            _plain_line(line, columns, widths)
        return
    room = shutil.get_terminal_size().columns
    least = [min(width, _NARROW) if columns[i].cut else width for i, width in enumerate(widths)]
    while sum(least[i] + 2 for i in shown) - 2 > room and any(columns[i].rank for i in shown):
        shown.remove(max(shown, key=lambda i: (columns[i].rank, i)))
    while sum(widths[i] + 2 for i in shown) - 2 > room and max(widths[i] for i in shown) > 1:
        widths[max(shown, key=lambda i: widths[i] - least[i])] -= 1  # whoever has most to give
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i in shown:
        justify: Any = "right" if columns[i].right else "left"
        drawn.add_column(columns[i].title, justify=justify, no_wrap=True, width=widths[i], overflow="ellipsis")
    for row in rows:
        drawn.add_row(*(_rich_text(row[i]) for i in shown))
    _console().print(drawn)


def _plain_line(texts: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> None:
    cells = [
        text.rjust(width) if column.right else text.ljust(width)
        for text, column, width in zip(texts, columns, widths, strict=True)
    ]
    _write("  ".join(cells).rstrip())


def pairs(items: Sequence[tuple[str, Cell]]) -> None:
    """Print names and values below each other, aligned."""
    width = max((len(name) for name, _ in items), default=0)
    room = shutil.get_terminal_size().columns - width - 2
    for name, value in items:
        fits = all(len(word) <= room for word in _text(value).split())
        styled(Styled(f"{printable(name):<{width}}  ", "dim"), value, hanging=width + 2 if fits else 0)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows how far a command is: on one line of a terminal, else on a new one now and then."""
    if _State.quiet:
        yield lambda _text: None
        return
    if not sys.stderr.isatty():
        last = [stopwatch.seconds()]

        def line(text: str) -> None:
            if stopwatch.seconds() - last[0] >= _PROGRESS:
                last[0] = stopwatch.seconds()
                note(text)

        yield line
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("")) as shown:
        yield lambda text: shown.update(Text(printable(text, _LINE)))


def confirm(question: str, *, assume_yes: bool) -> bool:
    """Ask a yes-or-no question; where nobody can answer, only ``assume_yes`` is a yes."""
    if assume_yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{printable(question, _LINE)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


@contextlib.contextmanager
def redrawn(*, on: bool) -> Iterator[None]:
    """Draw what is printed meanwhile over what a terminal shows, in one go and without clearing it: no flicker.

    Args:
        on: False prints as ever; so does a pipe.
    """
    screen = sys.stdout
    if not (on and is_terminal()):
        yield
        return
    sys.stdout = _Page()
    try:
        yield
    finally:
        page, sys.stdout = sys.stdout, screen
    size = shutil.get_terminal_size()
    lines, room = page.getvalue().splitlines(), max(2, size.lines - 1)  # the last one free, or the first scrolls away
    if len(lines) > room:
        lines[room - 1 :] = [f"and {len(lines) - room + 1:,} more lines; status without --watch shows all"]
    screen.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    screen.flush()


class _Page(io.StringIO):
    """One page of a terminal before it is shown."""

    def isatty(self) -> bool:
        return True


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, emoji=False, markup=False)


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Styled) else cell


def _rich_text(cell: Cell) -> Any:
    from rich.text import Text

    return Text(printable(_text(cell), _CELL), style=cell.style if isinstance(cell, Styled) else "")
