"""The one place where an exception of MLflow, a database or a file system becomes a ``SinkError``.

Statuses are those that MLflow's server would answer with, because ``outcome`` decides by status. Where MLflow hides
the true error (the file store wraps a conflicting param, a full disk and a bug alike as INTERNAL_ERROR), the cause
decides. An exception that is not known here counts as a failure of the store, never of the event: it is retried,
and nothing is discarded.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterable, Iterator

import requests
from google.protobuf.json_format import Error as FormError  # type: ignore[import-untyped]  # no stubs in the package
from google.protobuf.message import Error as ProtobufError  # type: ignore[import-untyped]  # as above
from mlflow.exceptions import MlflowException
from mlflow.utils.logging_utils import suppress_logs_in_thread as quiet

from mlflow_outbox_worker.sink import SinkError

#: Characters of a foreign message that are kept: enough for a sentence of MLflow, too few for a page of HTML.
MESSAGE_CHARS = 400

#: How MySQL's errors begin that are about a text which a column or its collation cannot hold, whatever class its driver
#: gives them.
OF_A_TEXT = re.compile(r"\(?(?:1366|1267|3988)\b")

__all__ = ["OF_A_TEXT", "Refused", "clean", "quiet", "translate", "translated"]

_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
#: An address and its query, which of a place in a storage is the right to write there: a signature, a token.
_QUERY = re.compile(r"((?:://|\burl: )[^\s?'\"]*\?)[^\s'\"]+")
#: Which of urllib3's objects said something; the address is said beside it anyway.
_SPEAKER = re.compile(r"\b_?HTTPS?(?:Connection|Pool|ConnectionPool)\(host='[^']*', port=\d+\): ")
_SPACE = re.compile(r"\s+")


class Refused(MlflowException):  # type: ignore[misc]  # mlflow is not followed by mypy
    """Raised inside MLflow's stores when a server said no, so that they can react to its code; holds the SinkError."""

    def __init__(self, error: SinkError, number: int) -> None:
        super().__init__(str(error), error_code=number)
        self.sink_error = error


def clean(text: object, secrets: Iterable[str] = ()) -> str:
    """Return a foreign message on one line, cut to size, without the credentials and queries of URLs in it.

    Args:
        text: the message, or an exception.
        secrets: what must not be in it either: servers and gateways repeat what they were sent.
    """
    words = str(text)
    for secret in secrets:
        words = words.replace(secret, "***")
    line = _SPEAKER.sub("", _QUERY.sub(r"\1***", _USERINFO.sub("", _SPACE.sub(" ", words).strip())))
    return line if len(line) <= MESSAGE_CHARS else f"{line[:MESSAGE_CHARS]}..."


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Let nothing but SinkError out, and keep MLflow's loggers quiet in this thread."""
    with quiet():
        try:
            yield
        except SinkError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: every one becomes a classified SinkError
            raise translate(error) from None


def translate(error: BaseException) -> SinkError:
    """Return the SinkError that says what an exception means."""
    if isinstance(error, SinkError):
        return error
    if isinstance(error, Refused):
        return error.sink_error
    if isinstance(error, MlflowException):
        return _of_mlflow(error)
    if _is_of_database(error):
        return _of_database(error)
    if isinstance(error, requests.RequestException) and error.response is None:
        return SinkError(clean(error), kind="connection")
    status = _status_of(error)
    if status is not None:
        return SinkError(clean(error), kind="answer", status=status)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ImportError):
        return SinkError(clean(f"a package is missing: {error}"), kind="not_mlflow", sent=False)
    if isinstance(error, (ValueError, TypeError, OverflowError, RecursionError, ProtobufError, FormError)):
        # Only the content of a request can make its encoding fail: a number that has no 64-bit form, or no word in
        # JSON, or what is nested more deeply than a message may be.
        return SinkError(clean(error), kind="answer", status=400, code="INVALID_PARAMETER_VALUE")
    return SinkError(f"{type(error).__name__}: {clean(error)}", kind="answer", status=500, code="INTERNAL_ERROR")


def _of_mlflow(error: MlflowException) -> SinkError:
    message = clean(error)
    cause = error.__cause__ or error.__context__
    if cause is not None and _is_of_database(cause) and error.error_code != "RESOURCE_ALREADY_EXISTS":
        return _of_database(cause)
    if error.error_code == "INTERNAL_ERROR" and cause is not None:
        inner = translate(cause)
        if inner.code or inner.status != 500:  # noqa: PLR2004 - the cause says more than "internal error"
            return inner
    if "out-of-date database schema" in message:
        # Retrying never helps: somebody has to run ``mlflow db upgrade``.
        return SinkError(message, kind="answer", status=409, code="INVALID_STATE", sent=False)
    return SinkError(message, kind="answer", status=error.get_http_status_code(), code=error.error_code)


def _is_of_database(error: BaseException) -> bool:
    # Where SQLAlchemy is not imported, for a tracking server, it has raised nothing.
    return "sqlalchemy.exc" in sys.modules and isinstance(error, sys.modules["sqlalchemy.exc"].SQLAlchemyError)


def _of_database(error: BaseException) -> SinkError:
    import sqlalchemy.exc  # only here: it was raised by it

    message = clean(getattr(error, "orig", None) or error)
    if isinstance(error, (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError)):
        # The text would repeat the URL, and with it the password.
        return SinkError("the database URL cannot be read", kind="not_mlflow", sent=False)
    about_content = isinstance(error, (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.DataError)) or (
        isinstance(error, sqlalchemy.exc.StatementError)
        and (not isinstance(error, sqlalchemy.exc.DBAPIError) or OF_A_TEXT.match(message) is not None)
    )
    if about_content:
        return SinkError(message, kind="answer", status=400, code="BAD_REQUEST")
    if "readonly database" in message and getattr(error, "connection_invalidated", False):
        return SinkError(message, kind="connection")  # by ``database``, which opens the file again
    if "readonly database" in message or "password authentication failed" in message:
        return SinkError(message, kind="answer", status=403, code="PERMISSION_DENIED")
    return SinkError(message, kind="answer", status=503, code="TEMPORARILY_UNAVAILABLE")


def _of_system(error: OSError) -> SinkError:
    # The name of a file is worth more to a person than its number; a full disk empties, a missing right does not
    # come by itself.
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return SinkError(clean(error), kind="answer", status=403, code="PERMISSION_DENIED")
    if error.errno == errno.ENAMETOOLONG:  # it will never be shorter
        return SinkError(clean(error), kind="answer", status=400, code="INVALID_PARAMETER_VALUE")
    return SinkError(clean(error), kind="answer", status=503, code="TEMPORARILY_UNAVAILABLE")


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an exception of requests, botocore, Google's or Azure's library."""
    response = getattr(error, "response", None)
    candidates = [
        getattr(response, "status_code", None),
        getattr(error, "status_code", None),
        getattr(error, "code", None),
    ]
    if isinstance(response, dict):
        candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for candidate in candidates:
        if isinstance(candidate, int) and 400 <= candidate < 600:  # noqa: PLR2004 - the statuses of errors
            return int(candidate)
    return None
