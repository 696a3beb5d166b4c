"""The progress bar of a replay: what is sent of all, how fast, and for how long yet, on one line of any width.

The fields keep their widths while they count, so that nothing jumps. On a narrow terminal the events go first, then
words, then the rate; the bar takes what is left. What there is to say (a server that is away, a writer that is
silent) stands on a line below, cut to the width.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox_worker.wording import count, span

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from mlflow_outbox_worker.replay import Progress

#: Seconds over which the rate is taken.
_OVER: Final = 10.0
#: Seconds of which less than these tell nothing about a rate.
_LEAST: Final = 0.5
#: Characters of the bar itself, at least and at most.
_SHORTEST: Final = 8
_LONGEST: Final = 40
#: Characters left free at the end of a line: an echoed ^C there must not begin a line that nobody takes away.
_FREE: Final = 3
#: Characters of a rate's number and of a span, the longest that are common.
_DIGITS: Final = 6
_SPAN: Final = 7


class Rate:
    """Events a second over the last seconds: standing still shows, and so does the pace after it.

    Args:
        over: seconds.
    """

    def __init__(self, over: float = _OVER) -> None:
        self._over = over
        self._seen: collections.deque[tuple[float, int]] = collections.deque()

    def __repr__(self) -> str:
        return f"<Rate over {self._over} s: {self.per_second():.1f}/s>"

    def add(self, now: float, events: int) -> None:
        """Take notice of how many events were sent so far.

        Args:
            now: seconds of a clock that never goes back.
            events: the number.
        """
        self._seen.append((now, events))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._over:  # noqa: PLR2004 - a rate needs two points
            self._seen.popleft()

    def per_second(self) -> float:
        """Return the rate; 0 when nothing arrived or too little time has passed to tell."""
        if not self._seen:
            return 0.0
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last - first >= _LEAST else 0.0


class _Layout(NamedTuple):
    events: bool
    words: bool
    rate: bool


_LAYOUTS: Final = (
    _Layout(events=True, words=True, rate=True),
    _Layout(events=False, words=True, rate=True),
    _Layout(events=False, words=False, rate=True),
    _Layout(events=False, words=False, rate=False),
)


class ReplayBar:
    """Draws how far a replay is, as rich asks for it.

    Args:
        endless: runs are followed while they are written, so that nobody knows how much there will be.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, *, endless: bool = False, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._endless = endless
        self._clock = clock
        self._rate = Rate()
        self._progress: Progress | None = None

    def __repr__(self) -> str:
        return f"<ReplayBar {self._progress!r}>"

    def update(self, progress: Progress) -> None:
        """Take notice of how far the replay is."""
        self._rate.add(self._clock(), progress.events)
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the line with the bar, and the one below when there is something to say."""
        if self._progress is None:
            return
        room = options.max_width - _FREE
        line = self._line(options, self._progress, room)
        line.truncate(room, overflow="ellipsis")
        yield line
        note = self._progress.note or self._reading_back(self._progress)
        if note:
            below = Text(printable(note, 1000), style="dim")
            below.truncate(room, overflow="ellipsis")
            yield below

    @staticmethod
    def _reading_back(progress: Progress) -> str:
        all_sent = 0 < progress.total <= progress.events
        return "all events are sent; reading back" if all_sent and progress.runs < progress.all_runs else ""

    def _line(self, options: ConsoleOptions, progress: Progress, room: int) -> Text:
        if self._endless:
            return self._followed(progress)
        for layout in _LAYOUTS:
            before, after = self._fields(progress, layout)
            width = min(_LONGEST, room - len(before) - len(after) - 4)
            if width >= _SHORTEST:
                break
        share = progress.events / progress.total if progress.total else 0.0
        done = int(share * max(0, width))
        full, empty = "#-" if options.ascii_only else "━─"
        bar = Text.assemble((full * done, "bar.complete"), (empty * (width - done), "bar.back"))
        return Text.assemble(before, "  ", bar, "  ", after)

    def _followed(self, progress: Progress) -> Text:
        runs, events = count(progress.all_runs, "run"), count(progress.events, "event")
        return Text(f"following {runs}: {events}, {self._rate.per_second():,.0f} a second")

    def _fields(self, progress: Progress, layout: _Layout) -> tuple[str, str]:
        """Return what stands before the bar and what stands behind it, in constant widths."""
        of, runs = (" of ", count(progress.all_runs, "run")) if layout.words else ("/", f"{progress.all_runs:,}")
        before = f"{progress.runs:,}".rjust(len(f"{progress.all_runs:,}")) + of + runs
        total, rate = count(progress.total, "event"), self._rate.per_second()
        after = [f"{100 * progress.events // progress.total if progress.total else 0}%".rjust(4)]
        if layout.events:
            after.append(f"{progress.events:,}".rjust(len(f"{progress.total:,}")) + of + total)
        if layout.rate:
            after.append(f"{rate:,.0f}".rjust(_DIGITS) + (" events/s" if layout.words else "/s"))
        rest = progress.total - progress.events
        left = span(rest / rate) if rest > 0 and rate > 0 else ""
        after.append(left.rjust(_SPAN) + ("" if not layout.words else " left" if left else "     "))
        return before, "  ".join(after)
