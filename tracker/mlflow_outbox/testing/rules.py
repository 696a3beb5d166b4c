"""Which request gets which action: the rules and the script of a ``FaultProxy``."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_outbox.testing.proxy import Action


@contextlib.contextmanager
def shown(what: str, kind: type[Exception]) -> Iterator[None]:
    """Let errors of a test's own code end the thread aloud: by their type they are a client's, which end it in silence.

    Args:
        what: whose code it is.
        kind: the errors.

    Raises:
        RuntimeError: in the place of one.
    """
    try:
        yield
    except kind as error:
        msg = f"{what} of a FaultProxy raised {type(error).__name__}: {error}"
        raise RuntimeError(msg) from error


@dataclasses.dataclass
class _Rule:
    fits: Callable[[str, str], bool]
    holds: Callable[[bytes], bool] | None
    action: Action
    left: int | None


class Rules:
    """Rules first, in the order in which they were made, then the script; safe to use from several threads.

    Args:
        script: the actions of the first requests that no rule fits.
    """

    def __init__(self, script: Iterable[Action]) -> None:
        self._lock = threading.Lock()
        self._script = deque(script)
        self._rules: list[_Rule] = []

    def script(self, actions: Iterable[Action]) -> None:
        """Append actions to the script."""
        with self._lock:
            self._script.extend(actions)

    def add(
        self,
        fits: str | Callable[[str, str], bool],
        action: Action,
        times: int | None,
        body: str | Callable[[bytes], bool] | None,
    ) -> None:
        """Append a rule; see ``FaultProxy.on``."""

        def contains(_method: str, path: str) -> bool:
            return str(fits) in path

        def holds(content: bytes) -> bool:
            return str(body).encode() in content

        with self._lock:
            self._rules.append(
                _Rule(
                    contains if isinstance(fits, str) else fits, holds if isinstance(body, str) else body, action, times
                )
            )

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._rules.clear()
            self._script.clear()

    def ask_for_body(self, method: str, path: str) -> bool:
        """Return whether the body of a request has to be known before its action is."""
        with shown("a rule", Exception), self._lock:
            return any(rule.holds and rule.left != 0 and rule.fits(method, path) for rule in self._rules)

    def choose(self, method: str, path: str, body: bytes | None) -> Action | None:
        """Return the action of a request; None when nothing was said about it.

        Args:
            method: of the request.
            path: of the request.
            body: its body; None when it was not read yet, which no rule about bodies fits.
        """
        with shown("a rule", Exception), self._lock:
            for rule in self._rules:
                if rule.left == 0 or not rule.fits(method, path):
                    continue
                if rule.holds and (body is None or not rule.holds(body)):
                    continue
                rule.left = None if rule.left is None else rule.left - 1
                return rule.action
            return self._script.popleft() if self._script else None
