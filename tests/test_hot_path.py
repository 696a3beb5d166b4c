"""Guards what a logging call costs by counting, not by timing: the same count on every machine, however busy."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.run import Run

#: Bytecode instructions and calls of C functions of one logging call, by Python version; other versions are held to
#: the nearest one here. A change of the logging call that is worth its price changes these numbers too.
BASELINE: dict[tuple[int, int], dict[str, tuple[int, int]]] = {
    (3, 10): {"one metric": (182, 9), "ten metrics": (422, 11), "one param": (268, 12), "one tag": (262, 12)},
    (3, 11): {"one metric": (192, 9), "ten metrics": (454, 11), "one param": (290, 12), "one tag": (281, 12)},
    (3, 12): {"one metric": (184, 9), "ten metrics": (430, 11), "one param": (272, 12), "one tag": (266, 12)},
    (3, 13): {"one metric": (185, 9), "ten metrics": (416, 11), "one param": (269, 12), "one tag": (263, 12)},
}
#: More than this much above the baseline is a regression.
ALLOWED = 1.25

CALLS: dict[str, Callable[[Run, int], object]] = {
    "one metric": lambda run, step: run.log_metric("loss", 0.5, step=step),
    "ten metrics": lambda run, step: run.log_metrics(dict.fromkeys("abcdefghij", 0.5), step=step),
    "one param": lambda run, step: run.log_param("depth", 7),
    "one tag": lambda run, step: run.set_tag("stage", "fit"),
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run whose keys are known and whose segment is open."""
    tracker = MLflowTracker(
        "hot-path", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=Settings(sync="os")
    )
    run = tracker.start_run()
    for step in range(3):
        for call in CALLS.values():
            call(run, step)
    yield run
    run.end()
    tracker.close(0)


def instructions(call: Callable[[], object]) -> int:
    """Count the bytecode instructions that a call executes in this thread."""
    if sys.version_info >= (3, 12):
        return _instructions_by_monitoring(call)
    count = 0

    def trace(frame: types.FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            count += 1
        return trace

    held = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(held)
    return count


def _instructions_by_monitoring(call: Callable[[], object]) -> int:
    """Do the same where tracing of instructions would only begin with the second call of a function."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]  # new in 3.12
    count, tool = 0, monitoring.PROFILER_ID

    def executed(_code: types.CodeType, _offset: int) -> None:
        nonlocal count
        count += 1

    monitoring.use_tool_id(tool, "hot path")
    try:
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, executed)
        monitoring.set_events(tool, monitoring.events.INSTRUCTION)
        call()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)
    return count


def c_functions(call: Callable[[], object]) -> list[str]:
    """Return the C functions that a call calls in this thread, as ``module.name``."""
    names: list[str] = []

    def profile(_frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            names.append(f"{getattr(argument, '__module__', None)}.{argument.__name__}")

    held = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(held)
    return [name for name in names if name != "sys.setprofile"]


def baseline() -> dict[str, tuple[int, int]]:
    """Return the numbers of this Python version, or of the nearest one."""
    return BASELINE[min(BASELINE, key=lambda version: abs(version[1] - sys.version_info[1]))]


@pytest.mark.parametrize("name", CALLS)
def test_a_logging_call_executes_no_more_than_its_baseline(run: Run, name: str) -> None:
    """A logging call that became a quarter dearer fails here."""
    counted = min(instructions(lambda: CALLS[name](run, 7)) for _ in range(3))
    called = min(len(c_functions(lambda: CALLS[name](run, 7))) for _ in range(3))
    most_instructions, most_calls = baseline()[name]
    assert most_instructions * ALLOWED >= counted
    assert most_calls * ALLOWED >= called


@pytest.mark.parametrize("name", CALLS)
def test_a_logging_call_makes_one_system_call(run: Run, name: str) -> None:
    """The write of the event is the only thing that a call asks of the operating system."""
    system = [c for c in c_functions(lambda: CALLS[name](run, 7)) if c.split(".")[0] in {"posix", "_io", "fcntl"}]
    assert ["posix.write"] == system


def test_a_call_that_became_dearer_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard itself works: some more work in the call shows in the count."""
    plain = instructions(lambda: run.log_metric("loss", 0.5, step=7))
    kept = run._append_event

    def slower(event: Any) -> bool:
        sum(number for number in range(10))
        return kept(event)

    monkeypatch.setattr(run, "_append_event", slower)
    assert plain * ALLOWED < instructions(lambda: run.log_metric("loss", 0.5, step=7))
