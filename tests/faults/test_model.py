"""Journals and readers against a plain list, in random steps: writers that begin, rotate, close and are torn."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from faults.table import Row
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Metric, encode
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from spools import RUN, make_journal, make_outbox, metric


class Spool(RuleBasedStateMachine):
    """Writers, a reader that remembers its cursors, and the list of what was acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="spool-")
        self.outbox = make_outbox(Path(self._folder.name) / "outbox")
        self.writers: list[Journal] = []
        self.model: dict[str, list[int]] = {}
        self.seen: dict[str, list[int]] = {}
        self.cursors: dict[str, Cursor] = {}
        self.missing = 0
        self.torn = 0
        self.number = 0
        self.start()

    @rule()
    def start(self) -> None:
        """Another process begins to write."""
        if len(self.writers) < 3:
            self.writers.append(make_journal(self.outbox, segment_bytes=1024))

    @rule(which=st.integers(0, 2), count=st.integers(1, 40))
    def append(self, which: int, count: int) -> None:
        """Log some events."""
        writer = self.writers[which % len(self.writers)]
        for _ in range(count):
            assert writer.append(metric(self.number))
            self.model.setdefault(writer.writer, []).append(self.number)
            self.number += 1

    @rule(which=st.integers(0, 2), close=st.booleans())
    def sync_or_close(self, which: int, close: bool) -> None:
        """What the background, or the end of a run, does."""
        writer = self.writers[which % len(self.writers)]
        writer.close() if close else writer.sync()

    @precondition(lambda self: any(writer._sequence.live.fd >= 0 for writer in self.writers))
    @rule(size=st.integers(1, 30))
    def die_with_a_torn_tail(self, size: int) -> None:
        """A writer dies in the middle of a write: part of a frame that was never acknowledged stays."""
        at = next(at for at, writer in enumerate(self.writers) if writer._sequence.live.fd >= 0)
        writer = self.writers.pop(at)
        live = writer._sequence.live
        os.write(live.fd, frame.pack(encode(metric(-1)), live.seq, live.seed)[:size])
        os.close(live.fd)
        for old in writer._sequence.retired:
            os.close(old.fd)
        writer._reset()
        self.torn += 1
        self.start()

    @rule(items=st.integers(1, 20), points=st.integers(1, 20), size=st.integers(1, 400), windows=st.integers(1, 5))
    def read(self, items: int, points: int, size: int, windows: int) -> None:
        """Deliver some windows, with a reader that knows nothing but the cursors."""
        for _ in range(windows):
            window = RunReader(self.outbox.run(RUN)).window(self.cursors, items=items, points=points, size=size)
            self.cursors = window.cursors
            self.missing += window.missing
            for writer, event in window.events:
                assert isinstance(event, Metric)
                self.seen.setdefault(writer, []).append(event.step)

    @invariant()
    def what_was_read_is_a_prefix_of_what_was_written(self) -> None:
        """No phantom, exact order, nothing twice."""
        for writer, steps in self.seen.items():
            assert self.model[writer][: len(steps)] == steps
        assert 0 == self.missing

    def teardown(self) -> None:
        """In the end everything is read, and the numbers agree."""
        for writer in self.writers:
            writer.close()
            writer.sync()
        for _ in range(2000):
            before = self.cursors
            self.read(50, 50, 10**6, 1)
            if before == self.cursors:
                break
        assert self.seen == self.model
        ends = RunReader(self.outbox.run(RUN)).next_numbers()
        assert {writer: len(steps) for writer, steps in self.model.items()} == {
            writer: end for writer, end in ends.items() if end
        }
        self._folder.cleanup()


@pytest.mark.fault("F10", "model: random steps of three writers, one torn in a write now and then, and a reader")
def test_a_reader_of_journals_sees_what_a_plain_list_holds(part: slice, row: Row, rng: random.Random) -> None:
    """No phantom, exact order, nothing twice, in the end everything; a failure is shrunk, and its seed repeats it."""
    examples = len(range(row.pick(30, 2_000, 20_000))[part])
    seeded = hypothesis.seed(rng.getrandbits(64))(Spool)
    run_state_machine_as_test(
        seeded,
        settings=settings(
            max_examples=examples,
            stateful_step_count=row.pick(30, 100, 100),
            deadline=None,
            database=None,  # what was found before is repeated by its seed, here as in all tests of this folder
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    row.done(examples)
