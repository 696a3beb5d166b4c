"""Tells what a signal handler raised in the middle of a call from what the call, or an object given to it, raised.

A program's time limit is often an exception that a handler of SIGALRM raises. It can arrive at any point of a logging
call, and is meant for the program; what a user's object raises when it is asked for its text is a refusal. Both come
through frames that are not ours. But only a handler has been given, as an argument, the very frame that it interrupted:
the one before its own in the traceback.

What was made of such an exception on the way, a refusal of ours or an error of a library by which we ask MLflow, has it
as its context. A context that was caught by the program is none of ours: its traceback begins in a frame of the
program's, or in one of a library that is still there because it called us.

A handler that has no frame, being written in C, and an exception that another thread sets
(``PyThreadState_SetAsyncExc``) cannot be told, and end as any other error of a logging call.
"""

from __future__ import annotations

import inspect
from types import FrameType, TracebackType
from typing import Final

_OURS: Final = frozenset({"mlflow_outbox", "mlflow_outbox_worker"})
#: What a question to MLflow goes through.
_LIBRARIES: Final = frozenset({"mlflow", "requests", "urllib3", "http", "socket", "ssl", "sqlalchemy"})


def forward(error: BaseException) -> None:
    """Raise what a signal handler raised, if an error is that or was made of it; else return.

    Args:
        error: what was caught in this call.
    """
    found: BaseException | None = error
    while found is not None:
        if (found is error or _is_caught_here(found.__traceback__)) and _is_interrupt(found.__traceback__):
            raise found
        found = found.__context__


def _is_caught_here(trace: TracebackType | None) -> bool:
    """Return whether an exception was caught in this call: by us, or by a library that has returned to us since."""
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    if package not in _LIBRARIES:
        return package in _OURS
    frame = inspect.currentframe()
    while frame is not None and frame is not trace.tb_frame:
        frame = frame.f_back
    return frame is None


def _is_interrupt(trace: TracebackType | None) -> bool:
    """Return whether an exception came through a signal handler."""
    while trace is not None and trace.tb_next is not None:
        if _was_given(trace.tb_next.tb_frame, trace.tb_frame):
            return True
        trace = trace.tb_next
    return False


def _was_given(handler: FrameType, interrupted: FrameType) -> bool:
    code = handler.f_code
    number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    for name in code.co_varnames[:number]:
        value = handler.f_locals.get(name)
        if value is interrupted or (type(value) is tuple and any(one is interrupted for one in value)):
            return True
    return False
