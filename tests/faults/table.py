"""The table of faults: what was injected how often, what was measured, and what could not be run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from faults.manners import Tally

T = TypeVar("T")

TIERS = ("commit", "nightly", "release")


@dataclasses.dataclass
class Row:
    """One test's row.

    Attributes:
        row: number in the fault matrix.
        injected: what was injected.
        test: the test's name.
        tier: how often to inject.
        scale: factor on that, from ``--fault-scale``.
        times: how often it was.
        measured: figures by name.
        seconds: how long the test took.
        paused: logging calls that the test itself held up.
    """

    row: str
    injected: str
    test: str
    tier: str
    scale: float = 1.0
    times: int = 0
    measured: dict[str, float | str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    paused: int = 0

    def pick(self, *counts: int) -> int:
        """Return the count of this tier.

        Args:
            *counts: for commit, nightly and release; a missing one is the one before.
        """
        return max(1, round(self.scale * counts[min(TIERS.index(self.tier), len(counts) - 1)]))

    def sample(self, points: Sequence[T], *counts: int) -> list[T]:
        """Return as many points as this tier takes, spread evenly; all of them when there are fewer."""
        wanted = self.pick(*counts)
        if wanted >= len(points):
            return list(points)
        return [points[int((i + 0.5) * len(points) / wanted)] for i in range(wanted)]

    def done(self, times: int = 1) -> None:
        """Count an injection."""
        self.times += times

    def measure(self, **figures: float | str) -> None:
        """Note figures."""
        self.measured.update({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()})

    def worst(self, name: str, value: float) -> None:
        """Note a figure of which the largest of all injections counts."""
        before = self.measured.get(name, value)
        self.measure(**{name: max(value, before) if isinstance(before, float) else value})

    def pause(self) -> None:
        """Say that one logging call was perhaps held up by the test itself, with SIGSTOP."""
        self.paused += 1

    def manners(self, counted: Tally) -> None:
        """Note how the logging calls of the test and its children went, and check it; nothing when there were none.

        Raises:
            AssertionError: a call raised or waited.
        """
        if counted.calls:
            self.measure(**counted._asdict())
            counted.check(self.paused)

    def json(self) -> str:
        """Return the row for another process."""
        return json.dumps(dataclasses.asdict(self))


class Table:
    """All rows of a session.

    Args:
        tier: of the session.
        seed: of the session.
    """

    def __init__(self, tier: str, seed: str) -> None:
        self.tier = tier
        self.seed = seed
        self._rows: list[tuple[Row, bool]] = []
        self._not_run: dict[tuple[str, str], str] = {}

    def __bool__(self) -> bool:
        return bool(self._rows or self._not_run)

    def add(self, values: dict[str, Any], *, failed: bool) -> None:
        """Add a row from a test's report."""
        self._rows.append((Row(**values), failed))

    def not_run(self, row: str, injected: str, why: str) -> None:
        """Note a row that this machine cannot inject."""
        self._not_run[row, injected] = why

    def missing(self) -> list[tuple[str, str, str]]:
        """Return the rows that were not run: number, what would have been injected, what would be needed."""
        return [(row, injected, why) for (row, injected), why in sorted(self._not_run.items())]

    def text(self) -> str:
        """Return the table for people."""
        lines = [f"tier {self.tier}, seed {self.seed} (repeat with --fault-seed {self.seed})"]
        for row, failed in sorted(self._rows, key=lambda pair: pair[0].row):
            figures = ", ".join(f"{k}={v}" for k, v in row.measured.items())
            verdict = "FAILED" if failed else "held"
            lines.append(f"{row.row:8} {verdict:7} x{row.times:<6} {row.seconds:6.1f} s  {row.injected}  {figures}")
        lines += [f"{row:8} NOT RUN {injected}: needs {why}" for (row, injected), why in sorted(self._not_run.items())]
        return "\n".join(lines)

    def json(self) -> str:
        """Return the table for programs."""
        rows = [{**dataclasses.asdict(row), "failed": failed} for row, failed in self._rows]
        missing = [{"row": r, "injected": i, "needs": why} for (r, i), why in self._not_run.items()]
        return json.dumps({"tier": self.tier, "seed": self.seed, "rows": rows, "not_run": missing}, indent=1)
