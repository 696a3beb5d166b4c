"""The server's own store behind the plugin: asked once, within a time, and left alone for a while after a failure.

The store is the one that the worker delivers to: one attempt for each request, an end to each wait. After a failure
it is not asked again for a pause that doubles up to half a minute, so a training loop does not pay the deadline at
every call of an outage. A delivery that succeeds ends the pause: who is told that everything has arrived may ask. If
the question fails then all the same, the pauses are kept until one is answered. Silence is not absence: a server that
is too slow for a short question (may a run be made?) is asked by those calls that nobody else can answer, for as long
as they may wait; only when it is silent for that long too is it left alone by all.

What the server says no to is raised as MLflow's own exception: 403 too, which is about who asks for what, while 401,
429 and what a gateway says are about everything. An error inside of MLflow (500, with its JSON, or as the page of its
framework) is about the one question: callers go on with what is on disk, where they have it, and raise it where they
have not; other questions are asked all the same. So is what a server is too old for, which has no address for it and
answers others. Everything else is ``Away``: nothing is asked for the pause, and callers go on with what is on disk.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

import requests
import sqlalchemy.exc
from mlflow.exceptions import MlflowException, MlflowNotImplementedException, RestException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE, ErrorCode
from mlflow.utils.logging_utils import suppress_logs_in_thread

from mlflow_outbox import delivery, stopwatch
from mlflow_outbox.interrupts import forward
from mlflow_outbox.plugin.journals import outage_is_over
from mlflow_outbox.solelock import SoleLock

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox

T = TypeVar("T")

#: Seconds for which a server that failed is not asked: at first, and at most.
_PAUSE_FIRST: Final = 1.0
_PAUSE_MOST: Final = 30.0
#: Questions that are under way in threads of their own; some may never have an answer.
_MOST_ASIDE: Final = 16
#: Statuses that say nothing about the question: not now, or not you.
_REFUSALS: Final = range(400, 500)
#: What the worker's transport puts before the message of a server.
_OURS: Final = re.compile(r"^[A-Z]+ /\S*: \d{3} (?:[A-Z_]+: )?")
_NOT_ABOUT_IT: Final = frozenset({401, 407, 408, 425, 429})
#: What MLflow's own server answers beside 403 where it asks for passwords; other answers of it are JSON.
_FORBIDDEN: Final = re.compile(r" 403: Permission denied$")
#: What the framework of MLflow's server answers to the same where it is not looked for.
_FAILED: Final = re.compile(r" 500: <!doctype html> <html lang=en> <title>500 Internal Server Error</title>")
#: What Flask says in MLflow's server where it has no such address, as one has not that is older than the client.
_NO_ADDRESS: Final = re.compile(r" 404: .*The requested URL was not found on the server")
#: How the names of methods begin that change nothing.
READING: Final = re.compile(r"(?:batch_get|calculate|filter|find|get(?!_or_create)|list|query|resolve|search|sum)_")


class SilentHost(OSError):
    """Raised when a workspace or a database has not answered in time."""

    def __init__(self) -> None:
        super().__init__("it has not answered in time")


class Away(Exception):
    """Raised when the server cannot be asked now, or failed to answer.

    Attributes:
        sent: whether a request may have been carried out.
        answer: what MLflow's server said of its own failure, as MLflow's client would raise it; None where it was
            silent, or another one spoke for it.
    """

    def __init__(self, reason: str, *, sent: bool, answer: MlflowException | None = None) -> None:
        super().__init__(reason)
        self.sent = sent
        self.answer = answer


class Server:
    """Asks the store of one outbox's destination.

    Args:
        outbox: the outbox.

    Attributes:
        asked: called at each question.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._lock = threading.RLock()  # a signal handler may ask while its thread is in here
        self._opened: dict[float, Any] = {}
        self._asleep_until = 0.0
        #: Seconds for which the server has been silent since it answered last; infinite when it failed otherwise.
        self._silence = 0.0
        self._pause = _PAUSE_FIRST
        #: Events that had arrived when the server failed last; None when their arrival says nothing about questions.
        self._arrived: tuple[int, int] | None = (0, 0)
        self._why = ""
        self._under_way = 0
        scheme = outbox.destination.scheme
        self._embedded = scheme not in {"http", "https", "databricks"}
        #: Its client keeps to no time of ours: the Databricks SDK, the driver of a database that has a server.
        self._is_boundless = scheme not in {"http", "https", "sqlite", "file"}
        self._aside = threading.Semaphore(_MOST_ASIDE)
        self._opening = SoleLock()
        self.asked: Callable[[], None] = lambda: None

    @property
    def uri(self) -> str:
        """The tracking URI behind the outbox, without credentials."""
        return self._outbox.destination.uri

    def is_away(self, patience: float = 0.0) -> bool:
        """Return whether the server failed so recently that it is not asked, and nothing was delivered since.

        Args:
            patience: seconds for which the question would wait. That a slow server had no answer to a short one says
                nothing of a long one: it is asked, and only its own failure ends the asking.
        """
        if stopwatch.seconds() >= self._asleep_until or patience > self._silence:
            return False
        if self._arrived is None or self._arrived == self._arrivals():
            return True
        self._arrived, self._asleep_until = None, stopwatch.seconds()
        return False

    def _arrivals(self) -> tuple[int, int]:
        """Return what this process's worker has counted, and what was found when somebody waited for a delivery."""
        return self._outbox.counters["delivered"], self._outbox.arrived

    def was_away(self) -> bool:
        """Return whether the server failed when it was asked last."""
        return self._asleep_until > 0

    def answers(self) -> bool:
        """Return whether the server answers one short question; if it does not, it is away for a pause."""
        try:
            self.ask(lambda store: store.search_experiments(max_results=1), quick=True)
        except Away:
            return False
        except MlflowException:
            pass  # it said no
        return True

    def lacks(self, missing: object) -> Away:
        """Return why nothing can be asked about what has not been delivered; whether anything can is found out here."""
        if self._outbox.worker_kind != "none":
            self.answers()
        return Away(f"{missing} has not been delivered yet", sent=False)

    def ask(self, question: Callable[[Any], T], *, quick: bool = False) -> T:
        """Put a question to the store.

        Args:
            question: gets the store, returns its answer.
            quick: wait no longer than the setting ``create_timeout``, else ``read_timeout``.

        Raises:
            Away: there was no answer.
            MlflowException: the server said no.
        """
        self.asked()
        settings = self._outbox.settings
        timeout = settings.create_timeout if quick else settings.read_timeout
        if timeout <= 0 or self.is_away(timeout):
            raise Away(self._why or "the server is not asked", sent=False)
        begin = stopwatch.seconds()
        try:
            answer = (self._asked_aside if self._is_boundless else self._asked)(question, timeout)
        except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            forward(error)
            raise self._meaning(error, timeout, stopwatch.seconds() - begin) from None
        except Exception as error:
            if type(error).__name__ != "SinkError":
                raise
            raise self._meaning(error, timeout, stopwatch.seconds() - begin) from None
        self._pause, self._asleep_until, self._arrived, self._silence = _PAUSE_FIRST, 0.0, (0, 0), 0.0
        outage_is_over(self._outbox)
        return answer

    def _asked(self, question: Callable[[Any], T], timeout: float) -> T:
        held = delivery.using_store if self._embedded and not self._is_boundless else contextlib.nullcontext
        with suppress_logs_in_thread(), self._counted(), held():
            opened = self.opened(timeout)
            opened.check()
            with opened.within(timeout):
                return question(opened.store)

    def _asked_aside(self, question: Callable[[Any], T], timeout: float) -> T:
        """Put a question in a thread of its own, and wait for no longer than it may take.

        The Databricks SDK looks for the workspace before it asks anything, for five minutes whatever it is told, and
        the driver of a database waits for one that is silent for as long as the connection lasts. What comes of it
        then is for nobody; where too many are left to themselves in this way, one of them has to end before another
        is put.
        """
        end = stopwatch.seconds() + timeout
        if not self._aside.acquire(timeout=timeout):
            raise SilentHost
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def ask() -> None:
            try:
                answer.set_result(self._asked(question, timeout))
            except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
                answer.set_exception(error)
            finally:
                self._aside.release()

        try:
            threading.Thread(target=ask, name="mlflow-outbox-question", daemon=True).start()
        except RuntimeError:  # no threads left, or the interpreter is about to end
            self._aside.release()
            raise SilentHost from None
        try:
            return answer.result(max(0.0, end - stopwatch.seconds()))
        except concurrent.futures.TimeoutError:
            if answer.done():
                raise
            raise SilentHost from None

    def _meaning(self, error: Exception, timeout: float, waited: float) -> Any:
        if isinstance(error, MlflowNotImplementedException):  # of MLflow's client, which has another way then
            return error
        found = delivery.translate(error)
        status = found.status or 500
        said = isinstance(error, MlflowException) and found.kind == "answer"
        if said and status == HTTPStatus.FORBIDDEN and not found.code and _FORBIDDEN.search(str(error)):
            return self._answer(error, "PERMISSION_DENIED")
        is_mlflows = said and found.code in ErrorCode.keys()  # noqa: SIM118 - a protobuf enum
        if status == HTTPStatus.FORBIDDEN:
            about_it = is_mlflows and hasattr(error, "sink_error")  # a database that is read-only forbids everything
        elif status == HTTPStatus.INTERNAL_SERVER_ERROR:
            about_it = is_mlflows and found.code != "INTERNAL_ERROR"  # MLflow answers so to some bad input
        else:
            about_it = said and status in _REFUSALS and status not in _NOT_ABOUT_IT
        if about_it:
            return self._answer(error, found.code)
        if said and status == HTTPStatus.INTERNAL_SERVER_ERROR and (is_mlflows or _FAILED.search(str(error))):
            self._outbox.counters.add("questions_failed")
            return Away(str(found), sent=found.sent, answer=self._answer(error, found.code))
        if _NO_ADDRESS.search(str(found)) and self._answers_another(timeout):
            return self._answer(MlflowException(str(found)), found.code)
        self._why = found.described
        if self._arrived is not None:
            self._arrived = self._arrivals()
        if waited < timeout:
            self._silence = math.inf
        elif self._silence < timeout or self._silence == math.inf:
            self._silence = timeout
        self._asleep_until = stopwatch.seconds() + self._pause
        self._pause = min(_PAUSE_MOST, self._pause * 2)
        return Away(found.described, sent=found.sent)

    def _answers_another(self, timeout: float) -> bool:
        """Return whether the server has an answer to what every version of it can be asked."""
        try:
            self._asked(lambda store: store.search_experiments(max_results=1), timeout)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer
            forward(error)
            return False
        return True

    def _answer(self, error: Any, code: str) -> MlflowException:
        """Return an answer as MLflow's own client would raise it."""
        code = code if code in ErrorCode.keys() else "INTERNAL_ERROR"  # noqa: SIM118 - a protobuf enum
        if self._outbox.destination.scheme in {"http", "https"}:  # the class and the words of MLflow's own client
            return RestException({"error_code": code, "message": _OURS.sub("", error.message)})
        return MlflowException(error.message, error_code=ErrorCode.Value(code))

    def opened(self, timeout: float | None = None) -> Any:
        """Return the worker's ``OpenStore``; embedded stores are opened once, whatever the timeout."""
        key = 0.0 if self._embedded else timeout or self._outbox.settings.read_timeout
        held = self._opened.get(key)
        if held is None:
            # Not by the other lock: a database may let this wait.
            with self._opening.held(
                lambda: Away("the call that was interrupted is still opening its store", sent=False)
            ):
                held = self._opened.get(key)
                if held is None:
                    held = delivery.open_store(self._outbox.destination, key or self._outbox.settings.read_timeout)
                    with self._lock:
                        self._opened[key] = held
        return held

    def kind(self) -> type:
        """Return the class of MLflow's store; nothing is asked for that, and no database opened that may be silent."""
        if self._embedded and self._outbox.destination.scheme != "file":
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # imported already, with the database's

            found: type = SqlAlchemyStore
            return found
        return type(self.opened().store)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def rest(self) -> bool:
        """Give connections back, unless a question is under way; the next one opens others. Return whether it did."""
        with self._lock:
            if self._under_way:
                return False
            opened, self._opened = self._opened, {}
        with delivery.using_store():
            for one in opened.values():
                one.close()
        return True

    def forked(self) -> None:
        """Begin anew in a forked child: connections and locks stayed with the parent's threads."""
        self._lock, self._opening = threading.RLock(), SoleLock()
        self._opened, self._under_way, self._aside = {}, 0, threading.Semaphore(_MOST_ASIDE)

    def needed(self, what: str, away: Away, *, call: str = "") -> MlflowException:
        """Return the error of a call that only the server can answer: its own, if it has said one.

        Args:
            what: begins a sentence about what needs the server.
            away: why it cannot be asked.
            call: the store's method, where it is one that is handed on; it would have changed something unless its name
                says otherwise.
        """
        if away.answer is not None:
            return away.answer
        if call and not READING.match(call):
            unless = " unless it was carried out all the same" if away.sent else ""
            then = (
                f"This call was not kept: make it again when the server is back{unless}. "
                "What was logged before is kept."
            )
        else:
            then = "What was logged is kept and will be delivered; ask again when the server is back."
        return MlflowException(
            f"{what} needs the tracking server, and {self.uri} cannot be asked now ({away}). {then}",
            error_code=TEMPORARILY_UNAVAILABLE,
        )


def delegating(base: type) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that hands each method which a class does not define to its ``_delegate``.

    So a method that MLflow adds to its stores works without a change here.

    Args:
        base: MLflow's abstract store.
    """

    def decorate(cls: type[T]) -> type[T]:
        theirs = {part for part in base.__mro__ if part is not object}
        for name, function in inspect.getmembers(base, inspect.isfunction):
            owner = next(part for part in cls.__mro__ if name in part.__dict__)
            if owner in theirs and not name.startswith("__"):
                setattr(cls, name, _delegated(name, function))
        return _concrete(cls)

    return decorate


def _delegated(name: str, function: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._delegate(name, *args, **kwargs)

    call.__name__, call.__doc__ = name, function.__doc__
    return call


def _concrete(cls: type[T]) -> type[T]:
    import abc

    return abc.update_abstractmethods(cls)
