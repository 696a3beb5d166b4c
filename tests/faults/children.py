"""Child processes for the fault tests: forked from a process that has MLflow imported, and what they acknowledge.

A child runs a function of ``faults.workload`` with a descriptor to which it writes one line per event *after* the
logging call has returned. The parent reads these lines all the time: what a child has acknowledged before it was killed
is known outside of it, and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import TracebackType
from typing import Any

from faults import manners
from servers import eventually

#: prctl: let any process trace this one, where the kernel asks for that.
_PR_SET_PTRACER = 0x59616D61
#: Steps of niceness by which a child goes before the other tests of the run: where these take the processor from one of
#: its threads that holds the interpreter's lock, the calls of all others would wait, and the library be blamed.
_NICENESS = -10
#: Seconds in which the processes of a child that has ended end too, on a busy machine.
_PATIENCE = 60.0


class Child:
    """A child process and what it has said so far.

    Args:
        context: where children are forked from.
        target: what it runs; called with the descriptor for acknowledgements and then with ``arguments``.
        counts: where its logging calls are counted.
        paused: wait for ``go()`` before the target is called.
    """

    def __init__(
        self,
        context: Any,
        target: Callable[..., object],
        arguments: tuple[Any, ...],
        counts: tuple[str, int],
        *,
        paused: bool,
    ) -> None:
        reader, writer = context.Pipe(duplex=False)
        gate, self._gate = context.Pipe()
        self.process = context.Process(target=_child, args=(target, writer, gate, arguments, counts), daemon=False)
        self.process.start()
        writer.close()
        gate.close()
        self._reader = reader
        self._data = bytearray()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        if not paused:
            self.go()

    @property
    def pid(self) -> int:
        """The process id."""
        return int(self.process.pid)

    def wait_at_gate(self) -> None:
        """Wait until a paused child has imported what it needs: a fault that is injected from then on is its target's.

        Raises:
            AssertionError: it does not come to that.
        """
        assert self._gate.poll(60), f"{self.process} does not begin"
        assert b"here" == self._gate.recv_bytes()

    def go(self) -> None:
        """Let a paused child begin."""
        with contextlib.suppress(OSError):
            self._gate.send_bytes(b"go")
        self._gate.close()

    def _listen(self) -> None:
        while True:
            try:
                part = os.read(self._reader.fileno(), 65536)
            except OSError:
                return
            if not part:
                self._reader.close()
                return
            self._data += part

    def is_heard(self) -> bool:
        """Return whether somebody can still say something: the child, or a process that it forked."""
        return self._thread.is_alive()

    def lines(self) -> list[str]:
        """Return the complete lines so far."""
        return bytes(self._data).decode().split("\n")[:-1]

    def wait_for_lines(self, count: int = 1, timeout: float = 60.0) -> None:
        """Wait until it has said a number of lines.

        Raises:
            AssertionError: it ended before, or time was up.
        """

        def has_said() -> bool:
            ended = self.process.exitcode
            assert ended is None or len(self.lines()) >= count, (
                f"the child ended with {ended}; it said {self.lines()[-9:]}"
            )
            return len(self.lines()) >= count

        eventually(has_said, timeout, f"{count} lines of {self.process}")

    def acked(self) -> set[int]:
        """Return the ids that were acknowledged so far."""
        return {int(line) for line in self.lines() if line.isdigit()}

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.join()

    def is_there(self) -> bool:
        """Return whether it, or a process that it forked, is still there."""
        return self.process.exitcode is None or self.is_heard()

    def close(self) -> None:
        """End it, and give back what it held.

        Raises:
            AssertionError: a process that it forked goes on.
        """
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self._gate.close()
        self._thread.join(_PATIENCE)
        assert not self.is_heard(), f"a process that {self.process} forked is still there"
        self._reader.close()

    def join(self, timeout: float = 120.0) -> int:
        """Wait for its end and for all it has said; return the exit code, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            failure = f"the child {self.process} did not end within {timeout} s; it said {self.lines()[-3:]}"
            raise AssertionError(failure)
        self._thread.join(60)
        return int(self.process.exitcode)

    def report(self, timeout: float = 120.0) -> dict[str, Any]:
        """Wait for its end and return the JSON object that it said last.

        Raises:
            AssertionError: it failed.
        """
        code = self.join(timeout)
        lines = [line for line in self.lines() if line.startswith("{")]
        assert lines, f"the child ended with {code} and said nothing: {self.lines()[-20:]}"
        found: dict[str, Any] = json.loads(lines[-1])
        assert "error" not in found, found["error"]
        return found


class Nest:
    """Forks children; a context manager."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "faults.cradle"])
        self._children: list[Child] = []
        self._counts = manners.SharedCounts()
        before = os.environ.get("PYTHONPATH")
        # The process that is forked from finds the modules to import before it is told this one's path.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before

    def __enter__(self) -> Nest:  # noqa: PYI034 - the class is not inherited from
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.taken()
        self._counts.close()

    def taken(self) -> manners.Tally:
        """End the children that are left, give back all that they held, and return what they counted."""
        children, self._children = self._children, []  # one that cannot be ended is one test's trouble
        for child in children:
            child.close()
        return self._counts.taken()

    def start(self, target: Callable[..., object], *arguments: Any, paused: bool = False) -> Child:
        """Start a child."""
        self._children = [child for child in self._children if child.is_there()]
        child = Child(self._context, target, arguments, self._counts.place(), paused=paused)
        self._children.append(child)
        return child

    def traced(
        self,
        trace: Path,
        calls: str,
        inject: str,
        target: Callable[..., object],
        *arguments: Any,
        only: Sequence[Path] = (),
    ) -> Child:
        """Start a child under strace.

        Args:
            trace: where strace writes what it saw.
            calls: system calls to trace, separated by commas.
            inject: strace's expression for one fault, without the calls' names it already has, such as
                "write:signal=SIGKILL:when=3"; "" only traces.
            target: what it runs.
            *arguments: for the target, behind the descriptor.
            only: trace, count and inject only the calls that use one of these files; empty means all.
        """
        child = self.start(target, *arguments, paused=True)
        child.wait_at_gate()
        command = [
            "strace",
            "-f",
            "-y",
            "-p",
            str(child.pid),
            "-o",
            str(trace),
            "-e",
            f"trace={calls}",
            "-e",
            "signal=none",
        ]
        if inject:
            command += ["-e", f"inject={inject}"]
        for path in only:
            command += ["-P", str(path)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        with contextlib.suppress(OSError):  # only root may; at each call that is traced the child waits for it
            os.setpriority(os.PRIO_PROCESS, tracer.pid, _NICENESS)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert b"attached" in said, said
        threading.Thread(target=_wait_for, args=(tracer,), daemon=True).start()
        child.go()
        return child


def _wait_for(tracer: subprocess.Popen[bytes]) -> None:
    """Read a tracer's messages to the end, and let it go."""
    if tracer.stderr is not None:
        with tracer.stderr as stream:
            stream.read()
    tracer.wait()


def _child(
    target: Callable[..., object],
    writer: Connection,
    gate: Connection,
    arguments: tuple[Any, ...],
    counts: tuple[str, int],
) -> None:
    manners.count_in(*counts)
    with contextlib.suppress(OSError):  # only root may
        os.nice(_NICENESS)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
    with contextlib.suppress(OSError):  # who does not pause it has gone on already
        gate.send_bytes(b"here")
    try:
        gate.recv_bytes()
    except (EOFError, OSError):
        return
    gate.close()
    target(writer.fileno(), *arguments)
