"""What the experiment's loop pays, told to a hundredth: two loops that take turns of a quarter of a second.

A virtual machine is not equally fast from one second to the next, and half a minute of a loop beside another half
minute says little about hundredths (``experiment``). Here both loops run at once, one of them stopped (SIGSTOP) while
the other one goes: the experiment together with all that it brings, its worker and the tracking server, and a loop
without tracking, which has the machine for itself. Both thus have the same good and bad seconds, and in turns of both
orders, one first and then the other. Each counts its steps where the parent can read them. The result is how many
steps the loop without tracking made for each one of the experiment, in the same time; the first turn begins at the
experiment's first step, so that its worker's start is in it, and its own start and end are not.

The standard error is that of the mean of ten parts of the turns. Two loops without tracking, and one beside a process
that posts points to the server (``posting``), show what the method itself says of nothing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import children
from benchmarks.plan import Plan
from benchmarks.posting import posting
from benchmarks.trackers import open_tracker
from servers import MlflowServer

#: Seconds of one turn.
_TURN = 0.25
#: Parts of the turns whose scatter tells the error.
_PARTS = 10
#: Seconds in which a loop makes its first step.
_START = 60.0
#: What is shared with a loop: its steps, its process, and whether it shall end.
_STEPS, _PID, _END = range(3)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Step on until the parent says that it is enough, with one tracker or without when its name is ""."""
    name, work = request["tracker"], range(request["work"])
    metric = finish = None
    with _shared(Path(request["shared"])) as shared:
        if name:
            tracker = open_tracker(name, Path(request["directory"]), request["uris"])
            metric, finish = tracker.metric, tracker.finish
        shared[_PID], step = os.getpid(), 0
        while not shared[_END]:
            total = 0
            for number in work:
                total += number
            if metric is not None:
                metric("loss", 0.5, step)
            step += 1
            shared[_STEPS] = step
    if finish is not None:
        with contextlib.suppress(Exception):  # what a peer says at its end is not measured here
            finish()
    return {"steps": step}


def compare(plan: Plan, subject: str, work: int, *, alongside: bool = False) -> dict[str, float]:
    """Return how many times as long a loop's steps take with a tracker as without, and the standard error of that.

    Args:
        plan: how long: each loop's turns are ``loop_seconds`` in all.
        subject: the tracker, or "" for none.
        work: turns of the inner loop in one step.
        alongside: whether another process posts to the server in the experiment's turns.
    """
    with tempfile.TemporaryDirectory(prefix="mlflow-outbox-bench-turns-") as directory, contextlib.ExitStack() as stack:
        poster = stack.enter_context(posting(plan.stores.uris["http"])) if alongside else None
        bare = stack.enter_context(_Loop.running(Path(directory, "bare"), {"tracker": "", "work": work}))
        bare.stop()
        request = {"tracker": subject, "work": work, "uris": plan.stores.uris}
        tracked = stack.enter_context(_Loop.running(Path(directory, "tracked"), request, plan.peers.get(subject)))
        tracked.with_it(plan.stores.server, poster)
        tracked.stop()
        pairs = [_pair(tracked, bare, number) for number in range(max(_PARTS, round(plan.loop_seconds / _TURN)))]
    parts = [pairs[at::_PARTS] for at in range(_PARTS)]
    ratios = [sum(without for _, without in part) / sum(with_it for with_it, _ in part) for part in parts]
    whole = sum(without for _, without in pairs) / sum(with_it for with_it, _ in pairs)
    return {"alternating": whole, "alternating_error": statistics.stdev(ratios) / len(ratios) ** 0.5}


class _Loop:
    """A loop in a process of its own, which can be stopped with all that it started.

    Args:
        shared: what it counts in.
    """

    def __init__(self, shared: memoryview) -> None:
        self._shared = shared
        self._mark = psutil.Process(shared[_PID]).environ()[children.STARTED]
        self._server: MlflowServer | None = None
        self._poster: subprocess.Popen[bytes] | None = None
        self._stopped: list[int] = []

    @classmethod
    @contextlib.contextmanager
    def running(cls, path: Path, request: dict[str, Any], first: Path | None = None) -> Iterator[_Loop]:
        """Start one, wait for its first step, and let it end after the block.

        Raises:
            RuntimeError: it made no step.
        """
        path.write_bytes(bytes(8 * (_END + 1)))
        said: dict[str, Any] = {}

        def run() -> None:
            said.update(children.run("alternation", request | {"shared": str(path)}, first=first, timeout=600.0))

        runner = threading.Thread(target=run)
        with _shared(path) as shared:
            runner.start()
            try:
                deadline = time.monotonic() + _START
                while not shared[_STEPS]:
                    if not runner.is_alive() or time.monotonic() > deadline:
                        msg = f"the loop made no step: {said.get('error', f'none within {_START:.0f} s')}"
                        raise RuntimeError(msg)
                    time.sleep(0.001)
                loop = cls(shared)
                try:
                    yield loop
                finally:
                    loop.go()
            finally:
                shared[_END] = 1
                runner.join()

    def with_it(self, server: MlflowServer, poster: subprocess.Popen[bytes] | None) -> None:
        """Have the tracking server stopped with it, and who posts to it."""
        self._server, self._poster = server, poster

    def stop(self) -> None:
        """Stop the loop, then all that it has started."""
        os.kill(self._shared[_PID], signal.SIGSTOP)
        self._stopped = [self._shared[_PID], *self._company()]
        for pid in self._stopped[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        if self._server:
            self._server.pause()

    def go(self) -> None:
        """Let it go on, itself last."""
        if self._server:
            self._server.resume()
        for pid in reversed(self._stopped):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped = []

    def rate(self) -> float:
        """Let it go on for a turn, and return its steps in a second."""
        self.go()
        began, steps = time.perf_counter(), self._shared[_STEPS]
        time.sleep(_TURN)
        found = (self._shared[_STEPS] - steps) / (time.perf_counter() - began)
        self.stop()
        return found

    def _company(self) -> list[int]:
        """Return the other processes of this loop: they have its environment, whoever their parent is by now."""
        found = [self._poster.pid] if self._poster else []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self._shared[_PID] and process.environ().get(children.STARTED) == self._mark:
                    found.append(process.pid)
        return found


def _pair(tracked: _Loop, bare: _Loop, number: int) -> tuple[float, float]:
    """Return the steps in a second of one turn each; every other pair begins with the loop without tracking."""
    if number % 2:
        without = bare.rate()
        return tracked.rate(), without
    return tracked.rate(), bare.rate()


@contextlib.contextmanager
def _shared(path: Path) -> Iterator[memoryview]:
    """Map what a loop and its parent share."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped, memoryview(mapped).cast("q") as numbers:
        yield numbers
