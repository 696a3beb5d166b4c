"""Clocks that jump, for the whole of a child process: its product, MLflow, and whatever else asks for the time."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from mlflow_outbox import stopwatch


class Clocks:
    """Takes the place of the clocks of this process; made once, in a process that ends soon.

    Wherever a module of ours, a class or a default argument holds one of the clock functions it is replaced too.

    Attributes:
        wall: seconds by which the wall clock is wrong.
        gap: seconds that the monotonic clock has jumped ahead, as after a machine was suspended.
        still: when not None, the wall clock stands there (nanoseconds since the epoch).
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.gap = 0.0
        self.still: int | None = None
        self._time_ns, self._monotonic, self._monotonic_ns = time.time_ns, time.monotonic, time.monotonic_ns
        self.replaced = 0
        for name, new in (
            ("time_ns", self.time_ns),
            ("time", lambda: self.time_ns() / 1e9),
            ("monotonic", lambda: self._monotonic() + self.gap),
            ("monotonic_ns", lambda: self._monotonic_ns() + int(self.gap * 1e9)),
        ):
            self._replace(getattr(time, name), new)
            setattr(time, name, new)
        steady = stopwatch.seconds
        self._replace(steady, lambda: steady() + self.gap)

    def time_ns(self) -> int:
        """Return the wall-clock time, never before 1970."""
        return self.still if self.still is not None else max(0, self._time_ns() + int(self.wall * 1e9))

    def _replace(self, old: Callable[[], Any], new: Callable[[], Any]) -> None:
        modules = [module for name, module in sys.modules.items() if name.startswith("mlflow_outbox")]
        for holder in modules:
            for name, value in list(vars(holder).items()):
                if value is old:
                    setattr(holder, name, new)
                    self.replaced += 1
            for function in _functions(holder):
                for name, value in (function.__kwdefaults__ or {}).items():
                    if value is old:
                        function.__kwdefaults__[name] = new
                        self.replaced += 1
                if function.__defaults__ and any(value is old for value in function.__defaults__):
                    function.__defaults__ = tuple(new if value is old else value for value in function.__defaults__)
                    self.replaced += 1


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    for value in vars(module).values():
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            yield from (member for member in vars(value).values() if isinstance(member, types.FunctionType))
